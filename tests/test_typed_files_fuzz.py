"""Random changes of every file and flag that a person writes: the answer is always one sentence, never a trace.

The changes have seeds, so that a failure can be repeated. The text of a failure has the seed and the input.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from gpuslice import cli, config, node
from gpuslice.commands.parser import parse, tree
from gpuslice.core import params
from gpuslice.core.inventory import Inventory
from gpuslice.errors import ClaimError, ConfigError, DriverError
from gpuslice.kube import Kube
from gpuslice.nvml.sim import spec

from tests.kit.builders import a_gpu

CASES = 500  # of each kind of input

ODD: list[Any] = [None, True, 0, -1, 3.5, 10**30, float("nan"), "", "x", "0", "…", "\x00", "a\nb", "*", [], {}, [[]], {"a": 1},
                  [None], "2026-13-41", "GPU-", "1g.10gb", "16Ei", "999999999999999999999Ti", "/", "../x"]  # fmt: skip
ODD_TEXT = ["{", "}", "[", "]", ":", "- ", "&a ", "*a", "? ", "|", "\t", "\x00", "\ufeff", "!!binary ", "!!python/none ",
            "<<: ", "---\n", "...\n", "%", "@", "`", "'", '"', "9" * 5000, "[" * 3000, "\ud800"]  # fmt: skip

POLICY = {
    "apiVersion": "gpuslice.dev/v1alpha1",
    "kind": "Policy",
    "default": {"suffixes": ["+me"], "mps": {"shares": 8, "clients": 40}, "static": {"1g.10gb": 2}},
    "gpus": [
        {"match": {"product": "NVIDIA L4"}, "modes": ["gpu", "timeslice"], "timeslice": {"shares": 6, "interval": "short"}},
        {"match": {"index": [0, 1]}, "modes": ["mig"], "profiles": ["3g.40gb", 19], "sharedPartitions": ["mps"]},
        {"match": {"uuid": "GPU-3f8d2c7e"}, "reserve": "2Gi", "keep": ["timeSlice"]},
    ],
}  # fmt: skip
NODE = {
    "driverVersion": "580.65.06",
    "cudaVersion": "13.0",
    "gpus": [{"product": "mine", "count": 2, "mig": False, "numaNode": 1}, {"product": "l4"}],
    "products": {"mine": None},
}
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "current-context": "c",
    "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:9", "certificate-authority-data": "aGVsbG8=",
                                           "insecure-skip-tls-verify": False, "tls-server-name": "x"}}],
    "users": [{"name": "u", "user": {"token": "t", "username": "a", "password": "b", "client-key-data": "aGVsbG8="}}],
    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "d"}}],
}  # fmt: skip
RUNNING = {"node_name": "n", "policy": "", "simulate": "l4", "simulate_folder": "", "simulate_latency": "zero"}
PARAMETERS = {
    "apiVersion": "gpuslice.dev/v1alpha1",
    "kind": "SliceConfig",
    "enforcement": "required",
    "timeSlicing": {"interval": "short"},
}


# ---------------------------------------------------------------- changes


def places(body: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in the document."""
    keys = body.keys() if isinstance(body, dict) else range(len(body)) if isinstance(body, list) else ()
    for key in list(keys):
        yield body, key
        yield from places(body[key])


def changed(body: Any, by: random.Random) -> Any:
    """The document with one to three values that are changed, missing, renamed, or duplicate."""
    new = copy.deepcopy(body)
    for _ in range(by.randint(1, 3)):
        if not (found := [*places(new)]):
            return by.choice(ODD)
        container, key = by.choice(found)
        match by.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[by.choice(["x", "", 1, None, True, (1, 2), "…"])] = container.pop(key)
            case 2 if isinstance(container, list):
                container.append(copy.deepcopy(container[key]))
            case 3:
                container[key] = copy.deepcopy(by.choice(found)[0])
            case _:
                container[key] = copy.deepcopy(by.choice(ODD))
    return new


def torn(text: str, by: random.Random) -> str:
    """The text with damage, by a person or a disk, at one to four places."""
    for _ in range(by.randint(1, 4)):
        at, end = sorted(by.randrange(len(text) + 1) for _ in range(2))
        match by.randrange(4):
            case 0:
                text = text[:at] + text[min(end, at + 20) :]
            case 1:
                text = text[:at]
            case 2:
                text = text[:at] + text[at:end] + text[at:]
            case _:
                text = text[:at] + by.choice(ODD_TEXT) + text[at:]
    return text


def documents(body: Any, write: Callable[[Any], str]) -> Iterator[bytes]:
    """Changed documents, and incomplete documents. The seed is the number of the case."""
    text = write(body)
    for seed in range(CASES):
        by = random.Random(seed)
        new = write(changed(body, by)) if seed % 2 else torn(text, by)
        data = new.encode("utf-8", errors="surrogatepass")
        yield bytes([by.randrange(256)]) + data if seed % 25 == 0 else data


def as_yaml(body: Any) -> str:
    return yaml.dump(body, allow_unicode=True)


def attempt(
    kind: str,
    inputs: Iterator[Any],
    read: Callable[[Any], object],
    allowed: tuple[type[Exception], ...] = (DriverError,),
) -> None:
    """Each input is accepted, or refused with a sentence of one line."""
    refused = count = 0
    for count, given in enumerate(inputs, 1):
        try:
            read(given)
        except allowed as e:
            refused += 1
            assert "\n" not in str(e), f"{kind}, case {count}: {str(e)!r} has several lines, for {given!r}"
        except Exception as e:
            raise AssertionError(f"{kind}, case {count}: {type(e).__name__}: {e}, for {given!r}") from e
    sys.stdout.write(f"{kind}: {count} cases tried, {refused} refused\n")
    assert count == CASES
    assert 0 < refused < count, "some are to be right and some wrong, or the changes are of no use"


# ---------------------------------------------------------------- files


def test_a_policy_is_taken_or_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    gpus = (a_gpu("h100"), a_gpu("l4", 1))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        policy = node.read_policy(path)
        for static in (False, True):
            misfits = Inventory.of(gpus, policy, "n", static=static).notes
            assert {*policy.suiting_none(misfits, gpus)} <= {*misfits}
        policy.unused(gpus)

    attempt("policy", documents(POLICY, as_yaml), read)


def test_a_node_file_is_taken_or_refused_with_a_sentence(tmp_path: Path) -> None:
    from gpuslice.nvml.sim.models import catalogue

    path = tmp_path / "node.yaml"
    a30 = json.loads(json.dumps(catalogue()["a30"]))

    def read(data: bytes) -> None:
        path.write_bytes(data)
        spec.parse(path)

    attempt("node file", documents({**NODE, "products": {"mine": a30}}, as_yaml), read)


def test_a_kubeconfig_is_taken_or_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        kube = Kube(path)
        try:
            if kube.server == "127.0.0.1:9":  # no name is looked up
                with suppress(DriverError):
                    kube.version()
        finally:
            kube.close()

    attempt("kubeconfig", documents(KUBECONFIG, as_yaml), read, (ConfigError,))


def test_the_settings_of_a_running_driver_are_taken_or_refused_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "plugins/gpuslice.dev/running.json"
    path.parent.mkdir(parents=True)
    settings = config.Config(kubelet_plugins_directory_path=tmp_path / "plugins")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        node.records(settings)
        with node.snapshot(settings):
            pass

    attempt("running.json", documents(RUNNING, partial(json.dumps, skipkeys=True)), read)


def test_opaque_parameters_are_taken_or_refused_with_a_sentence() -> None:
    bodies = (changed(PARAMETERS, random.Random(seed)) for seed in range(CASES))

    attempt("opaque parameters", bodies, lambda body: params.parse(body, "parameters"), (ClaimError,))


# ---------------------------------------------------------------- flags


WORDS = ["", "-", "--", "x", "0", "-1", "/", "../x", "~/x", "a b", "\n", "é", "\udcff", "x" * 300, "h100", "H100x2", "h100x99",
         "l4+", "loud", "[::]:1", "=", "--x=y", "-o", "json", "GPU.example"]  # fmt: skip


def command_lines() -> Iterator[list[str]]:
    commands = [(path, at) for path, at in tree(cli.parser()) if path and path[0] != "help"]
    for seed in range(CASES):
        by = random.Random(seed)
        path, at = by.choice(commands)
        flags = [option for action in at._actions for option in action.option_strings if action.nargs != 0]
        given = [by.choice(WORDS)] if path[0] in ("policy", "completion") else []
        for _ in range(by.randint(0, 3) if flags else 0):
            given += [by.choice(flags), by.choice(WORDS)]
        yield [*path, *given]


class WrongUsageError(Exception):
    """The parser has printed its sentence and would exit."""


def test_flags_are_taken_or_refused_with_a_sentence() -> None:
    def read(arguments: list[str]) -> None:
        said = StringIO()
        try:
            with redirect_stderr(said):
                parsed = parse(cli.parser(), arguments)
        except SystemExit as e:
            raise WrongUsageError(said.getvalue().splitlines()[-1]) from e
        settings = config.check_paths(config.read(parsed, {}))
        if settings.simulate and "/" not in settings.simulate:
            spec.parse(settings.simulate)

    attempt("flags", command_lines(), read, (DriverError, WrongUsageError))
