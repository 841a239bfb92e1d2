"""One real Kubernetes of one node with the driver on it, for all tests of this folder."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import Cluster
from tests.e2e.wanted import HERE, PLAYGROUND, refusal, version

# Two cards: one can be held in a mode while the other is free for the next.
_CARDS = "h100x2"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave these tests out where they cannot run (tests/conftest.py says why); else give each its time, in which the
    first need not build and start a cluster."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    if refusal(config):
        config.hook.pytest_deselected(items=ours)
        items[:] = [item for item in items if item not in ours]
    for item in ours:
        item.add_marker(pytest.mark.timeout(120, func_only=True))


@pytest.fixture(scope="session")
def live(pytestconfig: pytest.Config) -> Iterator[Cluster]:
    started = subprocess.run(
        [*PLAYGROUND, "up", "--gpus", _CARDS, *version(pytestconfig)],
        env={**os.environ, "SIMULATE_LATENCY": "zero"},
        stdout=subprocess.DEVNULL,  # stderr is shown: a build is slow, and says how far it is
        check=False,
    )
    assert started.returncode == 0, "the cluster did not start; it said why above"
    cluster = Cluster()
    try:
        yield cluster
    finally:
        subprocess.run([*PLAYGROUND, "down"], capture_output=True, check=True)
    assert not cluster.folder.exists()
    assert str(cluster.folder) not in Path("/proc/mounts").read_text()
    assert [pid for pid in cluster.facts["processes"].values() if Path(f"/proc/{pid}").exists()] == []


@pytest.fixture
def cluster(live: Cluster) -> Iterator[Cluster]:
    """The cluster with nothing on it; pods and claims of a test are removed after it."""
    assert not live.spoiled, f"an earlier test left something behind: {live.spoiled}"
    yield live
    live.clear()
