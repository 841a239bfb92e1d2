"""One real Kubernetes of one node with the driver on it, for all tests of this folder.

A module that wants other cards says so: `CARDS = "h100x8"`. A module with `INSTALLED = True` has the driver as operators
have it: our image, installed in pods by our chart, on Kubernetes 1.37 and later. Elsewhere the driver is a process beside
the kubelet. Tests with the same wishes come one after the other, so that there is one start for each kind of cluster.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kit.cluster.live import Cluster
from tests.kit.cluster.wanted import HACK_CLUSTER, HERE, refusal, version

# Two cards: one can be held in a mode while the other is free for the next.
_CARDS = "h100x2"
_INSTALLED_SINCE = (1, 37)
_SINCE = (1, 36)  # has what most tests are about; a module that is about less says its own, or UNTIL when


@dataclass(frozen=True, slots=True, order=True)
class Wish:
    """What kind of cluster a test needs."""

    installed: bool
    cards: str

    @classmethod
    def of(cls, item: pytest.Item) -> Wish:
        module = getattr(item, "module", None)
        installed = getattr(module, "INSTALLED", False) and _number(version(item.config)) >= _INSTALLED_SINCE
        return cls(installed, getattr(module, "CARDS", _CARDS))


def _number(release: str) -> tuple[int, ...]:
    """(1, 37) of 1.37.1."""
    return tuple(int(part) for part in release.split(".")[:2])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out where they cannot run (tests/conftest.py says why); else give each its time, in which the
    first need not build and start a cluster."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    if refusal(config):
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]
        return
    release = version(config)
    for item in ours:
        item.add_marker(pytest.mark.timeout(180, func_only=True))
        if reason := _not_of(item, release):
            item.add_marker(pytest.mark.skip(reason=reason))
    turns = iter(sorted(ours, key=Wish.of))
    items[:] = [next(turns) if item in ours else item for item in items]


def _not_of(item: pytest.Item, release: str) -> str:
    """Why a test says nothing about this release; "" if it does."""
    module = getattr(item, "module", None)
    number = _number(release)
    since = getattr(module, "SINCE", _SINCE)
    if number < since and since > _SINCE:
        return f"Kubernetes {release} does not have what {item.path.name} is about"
    if number < since:
        return f"Kubernetes {release} does not keep overlapping devices apart; tests/e2e/test_static.py is for it"
    if number > getattr(module, "UNTIL", number):
        return f"Kubernetes {release} keeps overlapping devices apart, so that nothing is planned statically there"
    return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside a failure stands what the cluster shows of it, from before anything is removed."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        report.sections += [(f"cluster: {title}", text) for title, text in cluster.diagnosis()]
    return report


def _processes_of(folder: Path) -> list[str]:
    """Command lines with this folder in them; process ids say nothing, for they are used again."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found.append(path.read_text(errors="replace").replace("\0", " "))
    return [command for command in found if str(folder) in command]


class Machine:
    """Has room for one cluster."""

    def __init__(self, arguments: list[str]) -> None:
        self._arguments = arguments
        self._cluster: Cluster | None = None
        self._has: Wish | None = None

    def as_wished(self, wish: Wish) -> Cluster:
        """The cluster that runs, or another one if that is of another kind or has something on it that could not be
        removed."""
        if self._cluster is not None and (self._has != wish or self._cluster.spoiled):
            self.end()
        if self._cluster is None:
            self._cluster = self._start(wish)
            self._has = wish
        return self._cluster

    def _start(self, wish: Wish) -> Cluster:
        started = subprocess.run(
            [*HACK_CLUSTER, "up", "--gpus", wish.cards, *(["--install"] if wish.installed else []), *self._arguments],
            env={**os.environ, "SIMULATE_LATENCY": "zero"},
            stdout=subprocess.DEVNULL,  # stderr is shown: a build is slow, and says how far it is
            check=False,
        )
        assert started.returncode == 0, "the cluster did not start; it said why above"
        return Cluster()

    def end(self) -> None:
        if self._cluster is None:
            return
        cluster, self._cluster = self._cluster, None
        subprocess.run([*HACK_CLUSTER, "down"], capture_output=True, check=True)
        assert not cluster.folder.exists()
        assert str(cluster.folder) not in Path("/proc/mounts").read_text()
        assert _processes_of(cluster.folder) == []


@pytest.fixture(scope="session")
def machine(pytestconfig: pytest.Config) -> Iterator[Machine]:
    machine = Machine(["--version", version(pytestconfig)])
    try:
        yield machine
    finally:
        machine.end()


@pytest.fixture
def cluster(machine: Machine, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The cluster with nothing on it; pods and claims of a test are removed after it, and nothing of them may stay."""
    cluster = machine.as_wished(Wish.of(request.node))
    yield cluster
    cluster.clear()
