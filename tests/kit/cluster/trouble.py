"""What goes wrong on a node, on demand, and what tells whether anybody noticed."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.kit.cluster.live import Cluster
from tests.kit.cluster.wanted import HACK_CLUSTER, ROOT

_TIMEOUT_S = 90  # a kubelet that was away looks every minute for claims of pods that went meanwhile


def hack_cluster(*arguments: str) -> None:
    done = subprocess.run([*HACK_CLUSTER, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"hack/cluster {' '.join(arguments)}: {done.stderr}"


@contextlib.contextmanager
def without(part: str) -> Iterator[None]:
    """For as long as this lasts the part is away, as after a crash; afterwards it serves again."""
    try:
        hack_cluster("stop", part)
        yield
    finally:
        hack_cluster("start", part)


def versions(cluster: Cluster) -> dict[str, tuple[str, str]]:
    """Each ResourceSlice with what changes when anybody writes or makes it again."""
    slices = [body["metadata"] for body in cluster.get("resourceslices")]
    return {one["name"]: (one["uid"], one["resourceVersion"]) for one in slices}


def warnings(cluster: Cluster, pod: str) -> list[str]:
    """The warnings that a pod has which is there, the scheduler's wait left out: that is no failure."""
    uid = cluster.kubectl("get", f"pod/{pod}", "--output=jsonpath={.metadata.uid}")
    events = cluster.get("events", "--field-selector", f"involvedObject.uid={uid},type=Warning")
    return [f"{event['reason']}: {event['message']}" for event in events if event["reason"] != "FailedScheduling"]


def runs_on(pid: int, seconds: float) -> bool:
    """Whether a process outlives this time."""
    handle = os.pidfd_open(pid)
    try:
        return not select.select([handle], [], [], seconds)[0]
    finally:
        os.close(handle)


class Instances:
    """Drivers on the node beside the playground's own, started like that one, with the flags that are given here."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._running: list[subprocess.Popen[bytes]] = []
        driver = Path(f"/proc/{cluster.process('driver')}")
        self._command = (driver / "cmdline").read_text().split("\0")[:-1]
        variables = (driver / "environ").read_text().split("\0")
        self._environment = dict(pair.split("=", 1) for pair in variables if "=" in pair)

    def start(self, *more: str) -> Path:
        """The log of a new one. It has these flags too, and a pod UID: two without one would have the same sockets."""
        number = len(self._running)
        log = self._cluster.folder / "log" / f"driver-{number}.log"
        inside = ["nsenter", "--target", str(self._cluster.process("kubelet")), "--mount"]
        own = ["--http-endpoint", f"127.0.0.1:{_free_port()}", "--pod-uid", f"instance-{number}"]
        with log.open("wb") as written:
            process = subprocess.Popen(
                [*inside, *self._command, *own, *more],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                env=self._environment,
                cwd=ROOT,
            )
        self._running.append(process)
        return log

    def code(self) -> int:
        """The exit code of the last one, once it has ended of itself."""
        return self._running[-1].wait(timeout=_TIMEOUT_S)

    def end(self) -> None:
        """None of them is left, whatever state it is in: a cluster's end would not end them."""
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def kill(self) -> None:
        """SIGKILL to the last one."""
        self._running[-1].kill()
        self._running[-1].wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def until_logged(cluster: Cluster, words: str) -> Iterator[None]:
    """Leave the block when the driver has logged these words since its begin."""
    log = cluster.folder / "log" / "driver.log"
    begin = log.stat().st_size
    yield
    wait_logged(log, words, begin)


def wait_logged(log: Path, words: str, begin: int = 0) -> None:
    """Return when these words stand in the log, after its first `begin` bytes."""
    follow = ["timeout", str(_TIMEOUT_S), "tail", f"--bytes=+{begin + 1}", "--follow=name", str(log)]
    with subprocess.Popen(follow, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        try:
            assert any(words in line for line in tail.stdout), f"{log.name} did not say {words!r} within {_TIMEOUT_S} s"
        finally:
            tail.kill()


def wait_restarted(cluster: Cluster, name: str) -> None:
    """Return when the pod's container was started a second time and is ready."""
    cluster.kubectl(
        "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", f"pod/{name}", "--timeout=60s"
    )
    cluster.runs(name)


def wait_deleted(cluster: Cluster, *names: str) -> None:
    """Return when the objects of these pods are deleted."""
    cluster.kubectl("wait", "--for=delete", *(f"pod/{name}" for name in names), "--timeout=60s")


def wait_cleared(cluster: Cluster) -> None:
    """Return when the claims of pods that have gone are gone too, and all that they held."""
    if claims := [f"resourceclaim/{body['metadata']['name']}" for body in cluster.get("resourceclaims")]:
        cluster.kubectl("wait", "--for=delete", *claims, "--timeout=30s")
    cluster.nothing_stays()
