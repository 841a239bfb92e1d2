"""Every piece of YAML and every command line of README and docs/ is what the product, or Kubernetes, takes."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import kubernetes_validate
import pytest
import yaml
from gpuslice.config import DRIVER_NAME
from gpuslice.core import params
from gpuslice.core.model import API_VERSION
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ConfigError
from gpuslice.nvml.sim import spec

from hack.lib.docs import devices
from tests.kit import commands, markdown
from tests.kit.cel import selected
from tests.kit.markdown import PAGES, ROOT, CodeBlock

Body = Mapping[str, Any]

RELEASES = ("1.36", "1.37")  # with all that a page may show; tests/deploy has the older ones for deploy/
BLOCKS = [block for page in PAGES for block in markdown.blocks(page)]
CLASSES = {
    body["metadata"]["name"]
    for body in yaml.safe_load_all((ROOT / "deploy/deviceclasses.yaml").read_text(encoding="utf-8"))
}

# What looks like YAML and is none, by how it begins, and why.
NOT_YAML = {
    "policy file policy.yaml: gpus[1].match": "a sentence of the driver",
}
# YAML that nothing reads as it stands, by how it begins, and why.
SHORTENED = {
    "# node.yaml": "the product of one's own is left out with …; tests/nvml/sim/test_spec.py reads such files",
}
# Programs on command lines beside ours, kubectl and helm: not checked, and why.
NOT_CHECKED = {
    "ctr": "containerd's, on a node",
    "docker": "an image needs a container runtime; the e2e tests run the driver as a process",
    "git": "the address is the reader's",
    **dict.fromkeys(("cd", "curl", "grep", "mkdir", "sort", "source", "uniq"), "a program of the machine"),
}


def documents(block: CodeBlock) -> list[Any]:
    """What a block is as YAML: none where it is something else."""
    if block.language not in ("", "yaml") or block.text.startswith((*NOT_YAML, *SHORTENED)):
        return []
    try:
        found = [*yaml.safe_load_all(block.text)]
    except yaml.YAMLError as e:
        assert not block.language, f"{block} is no YAML: {e}"
        return []
    return found if block.language else [body for body in found if isinstance(body, dict | list)]


YAML = [(block, number, body) for block in BLOCKS for number, body in enumerate(documents(block))]


@pytest.mark.parametrize(("block", "number", "body"), YAML, ids=[f"{block}-{number}" for block, number, _ in YAML])
def test_yaml_is_what_its_reader_takes(block: CodeBlock, number: int, body: Any) -> None:
    assert isinstance(body, dict), "a list by itself; show the object that it belongs to"
    match body.get("apiVersion"), body.get("kind"):
        case None, None if body.keys() == {"requests"}:  # a part of a claim
            claim = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": "one"}}
            check_object({**claim, "spec": {"devices": body}})
        case None, None if body.keys() <= {"driverVersion", "cudaVersion", "gpus", "products"}:
            spec.from_body(str(block), body)
        case None, None if body.keys() <= {"default", "gpus"}:
            Policy.parse(body)
        case version, "Policy" if version == API_VERSION:
            Policy.parse(body)
        case version, params.KIND if version == API_VERSION:
            params.parse(body, "parameters")
        case _:
            check_object(body)


def check_object(body: Body) -> None:
    for release in RELEASES:
        kubernetes_validate.validate(body, release, strict=True)
    spec_ = body.get("spec", {})
    check_claim(spec_.get("spec", spec_).get("devices", {}))
    if "policy.yaml" in body.get("data", {}):
        Policy.parse(yaml.safe_load(body["data"]["policy.yaml"]))


def check_claim(claim: Body) -> None:
    for request in claim.get("requests", ()):
        for option in request.get("firstAvailable") or [request["exactly"]]:
            assert option["deviceClassName"] in CLASSES
            for selector in option.get("selectors", ()):
                answers = [selected(selector["cel"]["expression"])(device) for device in devices.published()]
                assert any(answers), f"selects nothing: {selector}"
    for config in claim.get("config", ()):
        assert config["opaque"]["driver"] == DRIVER_NAME
        params.parse(config["opaque"]["parameters"], "parameters")


def test_what_is_named_as_no_yaml_is_still_there() -> None:
    for start in (*NOT_YAML, *SHORTENED):
        assert [block for block in BLOCKS if block.text.startswith(start)], f"no block begins with {start!r}"


# ---------------------------------------------------------------- commands


def mentions() -> Iterator[tuple[str, str]]:
    """(place, command line) of every span of code that is one."""
    for page in PAGES:
        for number, span in markdown.spans(page):
            yield from ((f"{markdown.name(page)}:{number}", command) for command in commands.commands(span))


LINES = [(str(block), command) for block in BLOCKS for command in commands.commands(block.text)]
MENTIONS = [*mentions()]


@pytest.mark.parametrize(("place", "command"), LINES, ids=[f"{place}-{command}" for place, command in LINES])
def test_a_command_line_is_one_that_its_program_takes(place: str, command: str) -> None:
    commands.check(command)


@pytest.mark.parametrize(("place", "command"), MENTIONS, ids=[f"{place}-{command}" for place, command in MENTIONS])
def test_a_command_that_a_sentence_names_is_one_of_its_program(place: str, command: str) -> None:
    commands.mention(command)


@pytest.mark.parametrize(
    "command",
    [
        "gpuslice rum",
        "gpuslice run --policies mine.yaml",
        "gpuslice demo --simulate h1000",
        "gpuslice run --log-level loud",
        "python -m gpuslice.nothing",
        "hack/nothing",
        "hack/bench --fast",
        "hack/demo --gpus h100",
        "hack/test --cluster=1.2.3",
        "sudo hack/cluster up --gpu h100",
        "hack/cluster kubectl apply -f deploy/nothing.yaml",
        "kubectl bake -f deploy",
        "helm install gpuslice deploy",
        "helm install gpuslice deploy/chart --set image.name=mine",
    ],
)
def test_a_command_line_that_its_program_refuses_is_found(command: str) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        commands.mention(command)


def test_every_other_program_is_named_as_not_checked() -> None:
    others = [line for block in BLOCKS for line in commands.others(block.text) if line.split()[0] not in NOT_CHECKED]

    assert others == []


def test_what_a_page_sets_is_a_value_of_the_chart() -> None:
    found = [span for page in PAGES for _, span in markdown.spans(page) if span.startswith("--set")]

    assert found
    for span in found:
        commands.set_values(span.split())


# ---------------------------------------------------------------- Python


def imports() -> Iterator[tuple[str, str, str]]:
    """(place, module, name) of what the pages import from us."""
    for block in BLOCKS:
        for line in block.text.splitlines():
            if line.startswith(("from gpuslice", "import gpuslice")):
                for node in ast.parse(line).body:
                    if isinstance(node, ast.ImportFrom):
                        yield from ((str(block), node.module or "", alias.name) for alias in node.names)


IMPORTS = [*imports()]


@pytest.mark.parametrize(("place", "module", "name"), IMPORTS, ids=[place for place, _, _ in IMPORTS])
def test_what_a_page_imports_is_there(place: str, module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)
