"""The start of the simulated daemon: its refusals, its files, and its move into the background."""

from __future__ import annotations

import fcntl
import os
import time

from gpuslice.mps.sim.daemon import SimDaemon
from gpuslice.mps.sim.devices import VisibleError, visible
from gpuslice.mps.sim.server import name_myself

NODE = "GPUSLICE_SIMULATED_NODE"
_CONTROL = "nvidia-cuda-mps-control"


def run(pipe: str, *, background: bool, multiuser: bool) -> int:
    """Run the daemon until `quit`. Returns its exit status."""
    node, logs = os.environ.get(NODE, ""), os.environ.get("CUDA_MPS_LOG_DIRECTORY", "/var/log/nvidia-mps")
    try:
        devices = visible(node, os.environ.get("CUDA_VISIBLE_DEVICES"))
        lock = os.open(f"{pipe}/control_lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in ("control.log", "server.log"):
            os.close(os.open(f"{logs}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644))
        if why := _refusal(node, devices, multiuser):
            return _fail(why)
        if background and not _continue_in_background():
            return 0
        name_myself(_CONTROL)
        with open(f"{pipe}/{_CONTROL}.pid", "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        daemon = SimDaemon(node, pipe, devices, multiuser=multiuser, log=lambda line: _log(logs, line))
    except BlockingIOError:
        return _fail("An instance of this daemon is already running")
    except (OSError, VisibleError) as e:
        return _fail(str(e))
    daemon.serve()
    os.unlink(f"{pipe}/{_CONTROL}.pid")  # noqa: PTH108
    return 0


def _refusal(node: str, devices: tuple[str, ...], multiuser: bool) -> str:
    try:
        cues = set(os.listdir(f"{node}/mps"))  # noqa: PTH208
    except FileNotFoundError:
        cues = set()
    if not devices:
        return "No CUDA-capable device is detected"
    if multiuser and cues & {"refuse-multiuser", f"refuse-multiuser.{devices[0]}"}:
        return "unknown option -multiuser-server"
    if multiuser and os.geteuid() != 0:
        return "-multiuser-server requires root"
    if cues & {"refuse-start", f"refuse-start.{devices[0]}"}:
        return "Failed to start: a cue says so"
    return ""


def _continue_in_background() -> bool:
    """Fork. False in the first process, which then ends; True in the background process."""
    if os.fork():
        return False
    os.setsid()
    return True


def _fail(why: str) -> int:
    os.write(2, f"{why}\n".encode())
    return 1


def _log(folder: str, line: str) -> None:
    name = "server.log" if line.startswith(("server", "client")) else "control.log"
    try:
        with open(f"{folder}/{name}", "a", encoding="utf-8") as file:
            file.write(f"[{time.time():.3f} {os.getpid()}] {line}\n")
    except OSError:
        pass
