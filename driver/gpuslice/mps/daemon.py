"""One daemon's process: start, adoption, ceilings, checks, drain. No threads and no policy here.

The supervisor starts it with `-f`, so that the daemon does not fork, and with `-multiuser-server`, because the uids of
containers differ: without this option one uid waits until the clients of another uid have left. The option needs root and
an NVIDIA driver that has it. If the driver does not have it, the daemon starts without it, and the log reports this.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from gpuslice.core.typed import Fields
from gpuslice.errors import DeviceError, DriverError, HungError
from gpuslice.mps import launch, wire
from gpuslice.mps.api import DaemonSpec
from gpuslice.mps.control import Control, one_line
from gpuslice.mps.paths import Paths
from gpuslice.mps.process import PidfdProcess, ProcessId, boot_id, kill_all, wait
from gpuslice.system import files
from gpuslice.system.files import write_atomic
from gpuslice.system.folder_watch import FolderWatch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timeouts:
    """`probe_s`: time between two checks. `answer_s`: a control program that takes longer means a hung daemon."""

    probe_s: float = 15.0
    answer_s: float = 5.0


START_S = 10.0
DRAIN_S = 3.0  # for servers to end after their clients were terminated
_FLAGS = ((("-f", "-multiuser-server"), ("-f",)), (("-f",),))  # for root, for others
_LAUNCHER = (sys.executable, "-I", "-S", launch.__file__)
_REFUSED_S = 0.05
_MOST_TICKS = 2**53  # clock ticks from boot to the start of a process, at most
_SOCKETS = {"control", ""}  # NVIDIA's name; an overflow of the kernel's queue has no name


class MpsDaemon:
    """A running daemon. `ceilings` are (memory in MiB, percent of multiprocessors), as the daemon reports them."""

    def __init__(self, pipe: Path, control: Control, pidfd: PidfdProcess) -> None:
        self._pipe, self.control, self.pidfd = pipe, control, pidfd
        self.ceilings: tuple[int | None, int | None] = (None, None)

    @property
    def pid(self) -> int:
        return self.pidfd.id.pid

    def limit(self, daemon: DaemonSpec) -> None:
        """Set these ceilings. If the daemon refuses them, it keeps its old ones. HungError if the daemon hangs."""
        before = self.ceilings
        try:
            self.ceilings = self.control.limit(daemon.device, daemon.memory_mib, daemon.threads_percent)
        except HungError:
            raise
        except DeviceError:
            with suppress(DeviceError):
                self.control.limit(daemon.device, *before)
            raise

    def probe(self) -> str:
        """The problem of the daemon, or "". HungError if the daemon does not answer."""
        for server in self.control.servers():
            if "FAULT" in self.control.status(server).upper():
                return f"MPS server {server} is in FAULT after a fatal error of one client"
        return ""

    def stop(self, *, drain: bool = True) -> str:
        """Terminate the clients, then the daemon. Kill everything that stays. Returns how the daemon ended, as a clause."""
        try:
            if drain and not self.pidfd.ended():
                # This comes first, because the kill of a client or its server during work can block the GPU for all.
                ended = self.control.terminate_clients()
                log.info("terminated the clients of an MPS daemon before its end pid=%d clients=%d", self.pid, ended)
                self.control.run(f"quit -t {DRAIN_S:.0f}")
                self.pidfd.ended(DRAIN_S)
        except DeviceError as e:
            log.warning("an MPS daemon could not be drained, so it is killed pid=%d: %s", self.pid, e)
        self.pidfd.kill()
        # Its servers must end too, because they block the card for the servers of the next daemon.
        kill_all(self._pipe, DRAIN_S)
        self.pidfd.ended(DRAIN_S)
        return self.pidfd.reap()


def start(paths: Paths, daemon: DaemonSpec, command: Sequence[str], answer_s: float) -> MpsDaemon:
    """Start a daemon in its folder and set its ceilings. After a DeviceError, no process of it runs."""
    paths.make(daemon.key)
    files.remove(paths.ended(daemon.key))
    _give_shm(paths, daemon.key)
    *first, last = _FLAGS[0] if os.geteuid() == 0 else _FLAGS[1]
    for flags in first:
        try:
            return _start(paths, daemon, command, answer_s, flags)
        except _EndedError as e:
            why = e
    process = _start(paths, daemon, command, answer_s, last)
    if first:
        log.warning(
            "an MPS daemon serves only one uid at a time key=%s: with -multiuser-server it fails: %s", daemon.key, why
        )
    return process


def remove(paths: Paths, key: str) -> None:
    """Remove the folder of a daemon, and the tmpfs on it. DeviceError if the folder belongs to another user."""
    if paths.folder(key).exists():
        paths.own(key)
        launch.take_tmpfs(str(paths.shm(key)))
    paths.remove(key)


def discard(paths: Paths, key: str) -> None:
    """End the processes of a folder that no supervisor watches, and remove the folder."""
    if paths.folder(key).exists():
        paths.own(key)
        kill_all(paths.pipe(key), DRAIN_S)
    remove(paths, key)


def _give_shm(paths: Paths, key: str) -> None:
    try:
        if launch.give_tmpfs(str(paths.shm(key))):
            return
        why = "mounts do not propagate from here"
    except OSError as e:
        why = e.strerror or str(e)
    log.warning(
        "shared memory of MPS clients fills the root folder key=%s root=%s: no tmpfs, because %s", key, paths.root, why
    )


class _EndedError(DeviceError):
    """The daemon ended before it accepted a command."""


def _start(
    paths: Paths, daemon: DaemonSpec, command: Sequence[str], answer_s: float, flags: Sequence[str]
) -> MpsDaemon:
    env = _environment(paths, daemon)
    console = paths.log(daemon.key) / "console"
    with closing(FolderWatch(paths.pipe(daemon.key), arrivals=True)) as watch:
        pidfd = PidfdProcess(
            ProcessId.of(_spawn([*_LAUNCHER, str(paths.shm(daemon.key)), *command, *flags], env, console))
        )
        process = MpsDaemon(paths.pipe(daemon.key), Control(command, env, answer_s), pidfd)
        try:
            remember(paths, daemon, process)  # before the daemon can have clients that the supervisor does not know
            _wait(process, watch, console, daemon.device)
            process.ceilings = process.control.limit(daemon.device, daemon.memory_mib, daemon.threads_percent)
        except DriverError:
            process.stop(drain=False)
            raise
    if warning := next((line for line in _lines(console) if line.startswith(launch.NO_SHM)), ""):
        log.warning("an MPS daemon has %s key=%s", warning.removeprefix("gpuslice: "), daemon.key)
    return process


def _spawn(command: Sequence[str], env: Mapping[str, str], console: Path) -> int:
    try:
        with console.open("wb") as output:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=env,
                cwd="/",
                umask=0o022,  # clients of other uids connect to the sockets that the daemon makes
                start_new_session=True,  # Ctrl-C of a terminal is for the supervisor, not for the daemon
            )
    except OSError as e:
        raise DeviceError(
            f"cannot start an MPS daemon: {e.strerror} ({e.filename}); check that file and its rights"
        ) from e
    child.returncode = 0  # the supervisor reaps it, not this object, as with processes that are not its children
    return child.pid


def _wait(process: MpsDaemon, watch: FolderWatch, console: Path, device: str) -> None:
    """Wait until the daemon accepts commands."""
    until = time.monotonic() + START_S
    why = "its control socket did not appear"
    while (left := until - time.monotonic()) > 0:
        # The new socket wakes this thread. The daemon's listen call does not, so there is a limit.
        ready = wait(min(left, _REFUSED_S), watch.fileno(), process.pidfd.descriptor)
        if process.pidfd.descriptor in ready:
            lines = one_line(" ".join(_lines(console)[-3:]))
            raise _EndedError(
                f"the MPS daemon of {device} {process.pidfd.reap()} at its start and says "
                f"{lines!r}; check the device and the NVIDIA driver"
            )
        if ready and not _SOCKETS & set(watch.read()):
            continue
        try:
            process.control.servers()
            return
        except DeviceError as e:
            why = str(e)
    raise DeviceError(
        f"the MPS daemon of {device} took no command within {START_S:g} s after its start: {why}; see the logs in "
        f"{console.parent}"
    )


def adopt(paths: Paths, key: str, command: Sequence[str], answer_s: float) -> tuple[DaemonSpec, MpsDaemon | None]:
    """Read what a former supervisor left in this folder: the spec of the daemon, and its process if it runs and answers.

    DeviceError if the folder names no daemon, or a daemon of an earlier boot.
    """
    daemon, process_id = left(paths, key)
    if process_id.boot != boot_id():
        raise DeviceError(f"{paths.record(key)} is of an earlier boot")
    try:
        pidfd = PidfdProcess(process_id)
    except ProcessLookupError:
        kill_all(paths.pipe(key), DRAIN_S)
        return daemon, None
    process = MpsDaemon(paths.pipe(key), Control(command, _environment(paths, daemon), answer_s), pidfd)
    try:
        process.ceilings = (process.control.memory(daemon.device), process.control.threads())
    except DeviceError as e:
        log.warning("an MPS daemon of a former supervisor does not answer, so it is killed key=%s: %s", key, e)
        process.stop(drain=False)
        return daemon, None
    return daemon, process


def left(paths: Paths, key: str) -> tuple[DaemonSpec, ProcessId]:
    """The daemon and the process in the file of this folder. The process may have ended. DeviceError if the file names no
    daemon."""
    paths.own(key)  # otherwise another user could choose the process that the supervisor takes for the daemon
    path = paths.record(key)
    try:
        body = json.loads(files.read_plain(path))
        process = Fields(body, "").part("process")
        daemon = wire.daemon_of(Fields(body, "").value("daemon"))
        if daemon.key != key:
            raise ValueError(f"it is of daemon {daemon.key[:40]!r}")
        return daemon, ProcessId(
            process.number("pid", 1), process.number("started", 0, _MOST_TICKS), process.text("boot")
        )
    except (OSError, ValueError, RecursionError, DeviceError) as e:
        raise DeviceError(f"{path} names no MPS daemon ({e})") from e


def clear(paths: Paths, key: str) -> None:
    """End the processes of a folder that names no daemon. Remove the folder if there were no processes.

    If there were processes, containers have the folder mounted, and the next start of this daemon repairs it.
    """
    paths.own(key)
    if not kill_all(paths.pipe(key), DRAIN_S):
        remove(paths, key)


def remember(paths: Paths, daemon: DaemonSpec, process: MpsDaemon) -> None:
    """Write the spec and the process of this daemon to disk, for the next supervisor."""
    body = {"daemon": wire.daemon_body(daemon), "process": asdict(process.pidfd.id)}
    write_atomic(paths.record(daemon.key), json.dumps(body) + "\n")


def _environment(paths: Paths, daemon: DaemonSpec) -> Mapping[str, str]:
    """Our environment without the variables that CUDA reads, plus the variables of this daemon."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
    return {
        **ours,
        "CUDA_VISIBLE_DEVICES": daemon.device,
        "CUDA_MPS_PIPE_DIRECTORY": str(paths.pipe(daemon.key)),
        "CUDA_MPS_LOG_DIRECTORY": str(paths.log(daemon.key)),
    }


def _lines(console: Path) -> list[str]:
    try:
        return console.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
