"""docs/reference/ says what the code does: each table is generated, and what a person wrote is held against the driver."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice import cli
from gpuslice.core.params import parse
from gpuslice.core.policy.rules import Policy
from gpuslice.core.policy.schema import SHARES
from gpuslice.core.share import MODES
from gpuslice.errors import ClaimError, ConfigError, DriverError, RemovalError
from gpuslice.standin.cluster import StandInCluster
from gpuslice.system.host import RealHost

from hack.lib.docs import attributes, container, devices, flags, metrics, params, policy, taints
from hack.lib.docs.errors import DocsError
from hack.lib.docs.pages import PAGES, TABLES
from hack.lib.docs.text import filled, paired, places
from tests.kit import node_tree
from tests.kit.builders import a_gpu
from tests.kit.cel import selected

NODES = Path(__file__).parents[1] / "golden/nodes"


@pytest.mark.parametrize("path", sorted(PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_is_what_the_code_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    assert text == filled(text, TABLES), "write it again: hack/docs"


def test_each_table_is_on_one_page() -> None:
    found = [name for path in PAGES.glob("*.md") for name in places(path.read_text(encoding="utf-8"))]

    assert sorted(found) == sorted(TABLES)


@pytest.mark.parametrize(("found", "said"), [(["new"], {}), ([], {"old": ""})])
def test_a_name_that_only_the_code_or_only_the_page_has_is_an_error(found: list[str], said: dict[str, str]) -> None:
    with pytest.raises(DocsError, match=r"new|old"):
        paired("names", found, said)


# ---------------------------------------------------------------- attributes and capacities


@pytest.mark.parametrize(("name", "expression"), [*attributes.examples()], ids=lambda value: value.partition(" ")[0])
def test_the_example_of_an_attribute_selects_some_devices_and_fails_for_none(name: str, expression: str) -> None:
    check = selected(expression)

    answers = [check(device) for device in devices.published()]

    assert name.rpartition("/")[2] in expression
    assert any(answers)
    assert not all(answers)


def test_what_is_published_has_every_kind_of_device() -> None:
    assert {devices.type_of(device) for device in devices.published()} == set(MODES)


# ---------------------------------------------------------------- what a container finds


def injected() -> Iterator[tuple[str, set[str]]]:
    """(kind of device, names of its variables) of every CDI file in the golden files."""
    for path in NODES.glob("*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("cdi/"):
                for device in json.loads(line.partition(" ")[2])["devices"]:
                    env = dict(entry.split("=", 1) for entry in device["containerEdits"]["env"])
                    yield kind(env), {re.sub("^GPUSLICE_GPU_0_", container.REQUEST, name) for name in env}


def kind(env: dict[str, str]) -> str:
    """By the name of the device: "gpu", "mig-1g-19-0", "mig-1g-19-0-mps", "timeslice-2"."""
    parts = env["GPUSLICE_GPU_0_DEVICE"].rpartition("/")[2].split("-")
    return next(mode for mode in ("mps", "timeslice", "monitor", "mig", "gpu") if mode in parts)


def test_a_container_finds_the_variables_that_the_page_lists_for_its_kind_of_device(tmp_path: Path) -> None:
    node_tree.fill_driver_root(tmp_path / "root")
    node_tree.fill_proc(tmp_path / "proc")
    real = RealHost(tmp_path / "root", proc=tmp_path / "proc", sys=tmp_path, dev=tmp_path).common().env
    found = {(name, mode) for mode, names in injected() for name in names}

    said = {(name, mode) for name, variable in container.VARIABLES.items() for mode in variable.types}

    assert found | {(name, mode) for name in real for mode in MODES} == said


# ---------------------------------------------------------------- metrics


async def test_a_running_driver_has_the_metrics_of_the_page(short: Path) -> None:
    async with StandInCluster(short, "l4") as cluster:
        driver = await cluster.start("--http-endpoint", "127.0.0.1:0")
        port = driver.log.read_text().rpartition("probes on 127.0.0.1:")[2].split()[0]
        with await asyncio.to_thread(urllib.request.urlopen, f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()

    lines = [line.split() for line in text.splitlines() if line.startswith("# TYPE ")]
    assert {(name, kind) for _, _, name, kind in lines if not name.endswith("_created")} == {
        (metrics.name_of(family), family.type) for family in metrics.families()
    }


# ---------------------------------------------------------------- taints, policy, exit codes


def test_every_taint_keeps_new_claims_away_and_lets_pods_run_on() -> None:
    assert taints.effects() == {"NoSchedule"}
    assert len(taints.found()) == len(taints.TAINTS)


def test_the_defaults_of_the_policy_page_are_those_of_the_driver() -> None:
    mine = Policy.default().of(a_gpu("h100"))

    assert (mine.mps_shares, mine.timeslice_shares, mine.interval) == (SHARES, SHARES, "default")
    assert mine.modes == {"gpu", "mig", "mps", "timeslice"}
    assert not mine.shared_partitions
    assert not mine.static
    assert not mine.keep
    assert mine.profiles
    assert {profile.suffix for profile in mine.profiles} == {""}


def test_the_policy_page_has_every_key_of_the_document() -> None:
    with pytest.raises(ConfigError, match=f"known keys: {', '.join(policy.DOCUMENT)}$"):
        Policy.parse({"colour": "red"})


@pytest.mark.parametrize("key", params.KEYS.values(), ids=lambda key: key.path)
def test_the_parameters_page_has_every_value(key: params.SettingText) -> None:
    with pytest.raises(ClaimError, match=f"one of: {', '.join(key.values)}$"):
        parse(params.body(key.path, "other"), "parameters")


def all_errors(base: type[DriverError] = DriverError) -> Iterator[type[DriverError]]:
    for error in base.__subclasses__():
        yield from (error, *all_errors(error))


@pytest.mark.parametrize("error", [*all_errors()], ids=lambda error: error.__name__)
def test_a_command_that_fails_ends_with_an_exit_code_of_the_page(error: type[DriverError]) -> None:
    failed = {1} if error is RemovalError else flags.documented().keys() - {0, 1}
    assert cli.exit_code(error("a sentence")) in failed


def test_a_command_that_is_interrupted_ends_with_an_exit_code_of_the_page() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "gpuslice", "demo", "--simulate", "l4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as demo:
        assert demo.stdout is not None
        demo.stdout.readline()
        demo.send_signal(signal.SIGINT)
        demo.communicate(timeout=30)

    assert demo.returncode in flags.documented().keys() - {0, 1}
