"""From release 0.1.0 to this one and back, on a real kubelet, with pods of every mode.

The old driver and the old supervisor are processes from the commit of 0.1.0, on this tree's Python and cluster. The supervisor
stays: an upgrade of the chart does not replace it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.lib.cluster import parts
from hack.lib.cluster.layout import Facts, Place
from tests.kit.cluster.bodies import made_from, pod, template
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.operators import REQUESTS, Running, mps_client
from tests.kit.cluster.trouble import hack_cluster, wait_logged
from tests.kit.cluster.wanted import ROOT

CARDS = "h100x8"
_COMMIT = "68236a9"  # release 0.1.0, whose package was called `driver`
_WAIT_S = 60


class OldRelease:
    """Driver and supervisor of 0.1.0 on the node."""

    def __init__(self, cluster: Cluster, tree: Path) -> None:
        self._cluster, self._tree = cluster, tree
        self._place = Place(cluster.folder)
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def supervise(self) -> None:
        self._start("supervisor", parts.supervisor(self._place, Facts.read(self._place.facts)))

    def drive(self) -> Path:
        """Start the old driver beside another one. Returns its log."""
        flags = ["--pod-uid", "of-0-1-0", "--http-endpoint", ""]
        return self._start("driver", [*parts.driver(self._place, Facts.read(self._place.facts)), *flags])

    def _start(self, part: str, command: list[str]) -> Path:
        log = self._cluster.folder / "log" / f"0.1.0-{part}-{len(self._running)}.log"
        inside = ["nsenter", "--target", str(self._cluster.outlives), "--mount", "--pid"]
        old = [word if word != "gpuslice" else "driver" for word in command]
        environment = {**os.environ, "PYTHONPATH": str(self._tree), "SIMULATE_LATENCY": "zero"}
        with log.open("wb") as written:
            self._running[part] = subprocess.Popen(
                [*inside, *old], stdin=subprocess.DEVNULL, stdout=written, stderr=written, env=environment, cwd="/"
            )
        return log

    def end(self, part: str) -> None:
        """End it in order."""
        if process := self._running.pop(part, None):
            # nsenter waits for the program in the other namespace, and ends with it.
            for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGTERM)
            process.wait(_WAIT_S)

    def can_read_the_cards(self) -> None:
        """The simulator of 0.1.0 takes one state of a card only; the one of today adds states."""
        for path in self._place.simulated.glob("gpu?.json"):
            path.write_text(path.read_text(encoding="utf-8").splitlines()[-1])


@pytest.fixture
def old(cluster: Cluster, tmp_path: Path) -> Iterator[OldRelease]:
    archive = subprocess.run(["git", "archive", _COMMIT, "driver"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this clone has no commit {_COMMIT}, so the driver of 0.1.0 cannot be started")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    old = OldRelease(cluster, tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(hack_cluster, "start", "driver")
        stack.callback(hack_cluster, "start", "mps-supervisor")
        stack.callback(old.end, "supervisor")
        stack.callback(old.end, "driver")
        hack_cluster("stop", "driver", "--gently")
        hack_cluster("stop", "mps-supervisor", "--gently")
        old.supervise()
        wait_logged(old.drive(), "registered with the kubelet")
        yield old


@pytest.mark.timeout(300, func_only=True)
def test_no_pod_of_any_mode_notices_the_way_to_this_release_and_back(cluster: Cluster, old: OldRelease) -> None:
    cluster.create(*(template(mode, request) for mode, request in REQUESTS.items()))
    names = {f"{mode}-{n}": mode for mode in REQUESTS for n in (1, 2)}
    cluster.create(*(pod(name, made_from(mode)) for name, mode in names.items()))
    running = Running.of(cluster, tuple(names))
    with mps_client(cluster, "mps-1") as client:
        hack_cluster("start", "driver")
        old.end("driver")

        assert running.undisturbed()
        later = {f"new-{mode}": mode for mode in REQUESTS}
        cluster.create(*(pod(name, made_from(mode)) for name, mode in later.items()))
        cluster.runs(*later)

        old.can_read_the_cards()
        wait_logged(old.drive(), "registered with the kubelet")
        hack_cluster("stop", "driver", "--gently")

        assert running.undisturbed()
        assert client.quiet()
    cluster.create(pod("at-last", made_from("mps")))
    cluster.runs("at-last")
    cluster.delete(*names, *later, "at-last")
    cluster.nothing_stays()
