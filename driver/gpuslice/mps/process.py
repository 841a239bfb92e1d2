"""A process that may not be our child: identified by pid, start and boot, watched by a descriptor (pidfd_open(2))."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MPS = b"nvidia-cuda-mps"  # the part of both program names that the kernel keeps (15 bytes, proc(5))


def boot_id() -> str:
    return _BOOT.read_text(encoding="ascii").strip()


@dataclass(frozen=True, slots=True)
class ProcessId:
    """The kernel reuses pids, and start times repeat after a boot. All three values together are unique."""

    pid: int
    started: int  # clock ticks since boot (proc(5), field 22)
    boot: str

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """The identity of a running process. ProcessLookupError if there is none with this pid."""
        return cls(pid, _start_ticks(pid), boot_id())

    def alive(self) -> bool:
        with contextlib.suppress(ProcessLookupError):
            return self == ProcessId.of(self.pid)
        return False


class PidfdProcess:
    """A process. `descriptor` becomes readable when it ends.

    The last reference closes the descriptor, and no call does. Otherwise another thread that still uses the number could
    reach the descriptor of another process.
    """

    def __init__(self, process: ProcessId) -> None:
        self.id = process
        self.descriptor = os.pidfd_open(process.pid)
        weakref.finalize(self, os.close, self.descriptor)
        if not process.alive():  # it ended, and another process got its pid, before the descriptor was open
            raise ProcessLookupError(process.pid)

    def ended(self, timeout_s: float = 0.0) -> bool:
        """Wait at most this time for its end. Returns whether it has ended."""
        return bool(wait(timeout_s, self.descriptor))

    def reap(self) -> str:
        """How it ended, as a clause; only "ended" for a process that is not our child."""
        try:
            _, status = os.waitpid(self.id.pid, os.WNOHANG)
        except ChildProcessError:
            return "ended"
        code = os.waitstatus_to_exitcode(status)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)


class Wakeup:
    """Wakes a thread that waits in poll(2) on `descriptor`. The last reference closes it, as above."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        weakref.finalize(self, os.close, self.descriptor)

    def set(self) -> None:
        os.eventfd_write(self.descriptor, 1)

    def clear(self) -> bool:
        """Whether it was set since the last call."""
        with contextlib.suppress(BlockingIOError):
            return os.eventfd_read(self.descriptor) > 0
        return False


def wait(timeout_s: float, *descriptors: int) -> frozenset[int]:
    """The descriptors that became readable within the time. Not select(2), which has only 1024 descriptors."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return frozenset(descriptor for descriptor, _ in poll.poll(timeout_s * 1000))


def kill_all(pipe: Path, timeout_s: float) -> int:
    """Kill every MPS process of this pipe directory and wait for their ends. Returns their number.

    The processes are found by their environment, not by process group or an older list: servers survive a killed daemon, they
    block the card for the servers of the next daemon, and a new supervisor knows none of them. The name is checked as
    well, because clients have the same variable.
    """
    wanted = f"CUDA_MPS_PIPE_DIRECTORY={pipe}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and _read(entry / "comm").startswith(_MPS):
            with contextlib.suppress(ProcessLookupError):
                process = PidfdProcess(ProcessId.of(int(entry.name)))
                if wanted in _read(entry / "environ").split(b"\0"):
                    process.kill()
                    found.append(process)
    until = time.monotonic() + timeout_s
    for process in found:
        process.ended(max(0.0, until - time.monotonic()))
    return len(found)


def _start_ticks(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError) as e:
        raise ProcessLookupError(pid) from e
    fields = text.rpartition(")")[2].split()  # the name before it may contain spaces
    return int(fields[19])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended, or belongs to another user
        return b""
