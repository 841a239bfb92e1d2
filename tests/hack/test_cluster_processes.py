"""The processes of a cluster, without one."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.lib.cluster.layout import Place
from hack.lib.cluster.processes import Processes


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    before = signal.getsignal(signal.SIGCHLD)
    place = Place(tmp_path)
    for folder in (place.logs, place.stopped, place.pids.parent):
        folder.mkdir(parents=True, exist_ok=True)
    yield place
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, before)


def test_a_part_that_has_ended_is_still_a_part_of_the_cluster(place: Place) -> None:
    processes = Processes(place, Path("/nowhere"), os.environ)
    processes.spawn("driver", ["true"])
    assert json.loads(place.pids.read_text())["driver"] > 0

    while json.loads(place.pids.read_text())["driver"]:
        processes.restart_ended()

    assert json.loads(place.pids.read_text()) == {"driver": 0}
