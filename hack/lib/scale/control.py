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
from typing import Any

from hack.lib import api
from hack.lib.api import ApiServer
from hack.lib.scale.errors import ScaleError

_CLUSTER = str(Path(__file__).parents[2] / "cluster")


def cpu_s(pid: int) -> float:
    """The processor time of all threads of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
        return cpu_s(self.pid)

    def profile(self, server: ApiServer, seconds: int) -> bytes:
        """A CPU profile of the scheduler for this many seconds from now on, for `go tool pprof -top`."""
        return api.fetch(f"{self.url}/debug/pprof/profile?seconds={seconds}", server.token)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Start a control plane for the block, and end it after the block. Nothing of it stays."""
    if _run("up", "--control-plane"):
        raise ScaleError("the control plane did not start; the reason is above")
    try:
        yield
    finally:
        _run("down")


@contextlib.contextmanager
def control_plane() -> Iterator[tuple[ApiServer, Scheduler]]:
    """As `running`. Yields the API server and the scheduler."""
    with running():
        facts = _facts()
        with contextlib.closing(ApiServer.of_kubeconfig(kubeconfig())) as server:
            yield server, Scheduler(facts["processes"]["kube-scheduler"], facts["scheduler"])


def kubeconfig() -> Path:
    """The kubeconfig file of the administrator."""
    return Path(_facts()["folder"]) / "admin.conf"


def api_server_pid() -> int:
    """The process of the API server. Each start makes a new one."""
    return int(_facts()["processes"]["kube-apiserver"])


def end_api_server() -> None:
    if _run("stop", "kube-apiserver"):
        raise ScaleError("the API server could not be ended; the reason is above")


def start_api_server() -> None:
    """Start the API server, and return when it serves."""
    if _run("start", "kube-apiserver"):
        raise ScaleError("the API server did not start again; the reason is above")


def _facts() -> dict[str, Any]:
    status = subprocess.run([_CLUSTER, "status", "--json"], capture_output=True, text=True, check=True).stdout
    facts: dict[str, Any] = json.loads(status)
    return facts


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
