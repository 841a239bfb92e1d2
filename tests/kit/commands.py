"""Checks the command lines of our pages without a run of them: by the parsers of our commands, and by the names in them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml
from gpuslice import cli, config
from gpuslice.nvml.sim import spec

from hack.lib import manifests
from hack.lib.bench import __main__ as bench
from hack.lib.cluster import __main__ as cluster
from hack.lib.cluster.layout import REAL
from hack.lib.cluster.versions import VERSIONS
from hack.lib.gpu import __main__ as gpu
from hack.lib.image import __main__ as image
from hack.lib.scale import __main__ as scale
from tests.kit.markdown import ROOT

OURS = re.compile(r"((sudo|\w+=\S*) +)*(\.venv/bin/)?(hack/\w+|gpuslice|python3? -m \S+|kubectl|helm)( |$)")
_VERBS = {"annotate", "apply", "cordon", "create", "delete", "describe", "drain", "events", "exec", "explain", "get",
          "label", "logs", "patch", "port-forward", "rollout", "scale", "taint", "uncordon", "version", "wait"}  # fmt: skip
_NOTE = re.compile(r"( {3,}[^-\s].*|\s#\s.*)$")  # the note of a page behind a line

_LEFT_OUT = re.compile("arguments are required: |expected one argument")

Words = Sequence[str]


def commands(text: str) -> Iterator[str]:
    """The command lines of a block of code that start one of our programs, kubectl or helm."""
    yield from (command for command in lines(text) if OURS.match(command))


def others(text: str) -> Iterator[str]:
    """The other command lines of a block with such a line. Lines after an empty line are output."""
    parts = [*lines(text.partition("\n\n")[0])]
    if any(map(OURS.match, parts)):
        yield from (command for command in parts if not OURS.match(command))


def lines(text: str) -> Iterator[str]:
    """Every command of a block, also those behind `&&` and `|`, without comments."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        for part in re.split(r"&&|;|\|", _NOTE.sub("", line)):
            command = part.removeprefix("$ ").strip().removesuffix("&").strip()
            if command and not command.startswith("#"):
                yield command


def mention(command: str) -> None:
    """As `check`, for a command in a sentence: its required arguments may be missing."""
    try:
        check(command)
    except AssertionError as e:
        if not _LEFT_OUT.search(str(e)):
            raise


def check(command: str) -> None:
    """AssertionError names the mistake in a command line. After … anything may follow."""
    words = [word for word in shlex.split(command.partition("…")[0]) if word not in ("sudo", "[", "]")]
    while words and "=" in words[0]:
        words.pop(0)  # a variable of its environment
    program, *arguments = words
    if re.fullmatch(r"(\.venv/bin/)?python3?", program):
        program, arguments = arguments[1], arguments[2:]
        assert importlib.util.find_spec(program), f"there is no module {program}"
    elif program.startswith("hack/"):
        path = ROOT / program
        assert path.is_file(), f"there is no {program}"
        assert os.access(path, os.X_OK) or not arguments, f"{program} is no program"
    if program in _CHECKS and "…" not in command:
        _CHECKS[program](arguments)


def set_values(arguments: Words) -> None:
    """`--set a.b=c` must name a value of the chart."""
    values = yaml.safe_load((ROOT / "deploy/chart/values.yaml").read_text(encoding="utf-8"))
    for flag, text in itertools.pairwise(arguments):
        if flag in ("--set", "--set-file", "--set-string"):
            inner: Any = values
            for key in text.partition("=")[0].split("."):
                assert isinstance(inner, dict), f"{text}: the chart has no such value"
                assert key in inner, f"{text}: the chart has no such value"
                inner = inner[key]


def _parsed(parse: Callable[[Words], object]) -> Callable[[Words], None]:
    """An argument that a parser refuses is a mistake."""

    def check(arguments: Words) -> None:
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                parse(arguments)
            except SystemExit as e:
                assert e.code == 0, said.getvalue().strip().splitlines()[-1]

    return check


def _gpuslice(arguments: Words) -> None:
    parsed = cli.parser().parse_args(arguments or ["--help"])
    config.read(parsed, {})  # ConfigError: a value that every start refuses
    _cards(getattr(parsed, "simulate", None))


def _cluster(arguments: Words) -> None:
    if arguments[:1] == ["kubectl"]:
        _kubectl(arguments[1:])
    elif arguments:
        _cards(getattr(cluster.parser().parse_args(arguments), "gpus", ""))


def _cards(node: str | None) -> None:
    """ConfigError if there are no such cards to simulate."""
    if node and not node.isupper() and node != REAL:
        spec.parse(node)


def _gpu(arguments: Words) -> None:
    if arguments and arguments[0] != "test":
        gpu.parser().parse_args(arguments)


def _test(arguments: Words) -> None:
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag == "--cluster":
            assert value in ("", "all", *VERSIONS), f"hack/test knows no release {value}"


def _nothing(arguments: Words) -> None:
    assert not arguments, f"it takes no arguments: {arguments}"


def _kubectl(arguments: Words) -> None:
    pairs = [*itertools.pairwise(("kubectl", *arguments))]
    verb = next((word for flag, word in pairs if not word.startswith("-") and flag not in ("-n", "--namespace")), "")
    assert not verb or verb in _VERBS, f"kubectl {verb} is not known to this test"
    for flag, path in pairs:
        if flag in ("-f", "--filename"):
            assert path in ("-", "-n") or path.isupper() or (ROOT / path).exists(), f"there is no {path}"
    if "--" in arguments:
        for command in commands(shlex.join(arguments[arguments.index("--") + 1 :])):
            check(command)


def _helm(arguments: Words) -> None:
    verb, *rest = arguments or ["version"]
    assert verb in ("install", "upgrade", "rollback", "uninstall", "version", "template"), (
        f"helm {verb} is not known to this test"
    )
    if verb in ("install", "upgrade", "template") and rest:
        assert any((ROOT / word / "Chart.yaml").is_file() for word in rest), f"none of {rest} is a chart"
    set_values(rest)


_CHECKS: dict[str, Callable[[Words], None]] = {
    "gpuslice": _parsed(_gpuslice),
    "hack/bench": _parsed(bench.options_of),
    "hack/cluster": _parsed(_cluster),
    "hack/demo": _parsed(lambda arguments: _gpuslice(["demo", *arguments])),
    "hack/docs": _nothing,
    "hack/gpu": _parsed(_gpu),
    "hack/image": _parsed(image.parser().parse_args),
    "hack/manifests": _parsed(manifests.parse),
    "hack/scale": _parsed(scale.options_of),
    "hack/test": _test,
    "kubectl": _kubectl,
    "helm": _helm,
}
