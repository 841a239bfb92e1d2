"""A control plane without a node, started by `hack/cluster`: its API server, and its scheduler, which can be paused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hack.lib import api
from hack.lib.api import ApiServer
from hack.lib.scale.errors import ScaleError

_CLUSTER = str(Path(__file__).parents[2] / "cluster")


@dataclass(frozen=True, slots=True)
class Scheduler:
    pid: int
    url: str

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The scheduler is stopped inside the block, so that new pods wait."""
        os.kill(self.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def cpu_s(self) -> float:
        """CPU seconds of the scheduler so far, over all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def profile(self, server: ApiServer, seconds: int) -> bytes:
        """A CPU profile of the scheduler for this many seconds from now on, for `go tool pprof -top`."""
        return api.fetch(f"{self.url}/debug/pprof/profile?seconds={seconds}", server.token)


@contextlib.contextmanager
def control_plane() -> Iterator[tuple[ApiServer, Scheduler]]:
    """Start a control plane for the block, and remove it at the end."""
    if _run("up", "--control-plane"):
        raise ScaleError("the control plane did not start; the reason is above")
    try:
        status = subprocess.run([_CLUSTER, "status", "--json"], capture_output=True, text=True, check=True).stdout
        facts = json.loads(status)
        with contextlib.closing(ApiServer.of_kubeconfig(Path(facts["folder"]) / "admin.conf")) as server:
            yield server, Scheduler(facts["processes"]["kube-scheduler"], facts["scheduler"])
    finally:
        _run("down")


def _run(*arguments: str) -> int:
    """Run hack/cluster in its own session. Then only this process gets Ctrl-C, and ends the command in order."""
    process = subprocess.Popen([_CLUSTER, *arguments], stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        if arguments[0] == "up":
            process.terminate()
        process.wait()
        raise
