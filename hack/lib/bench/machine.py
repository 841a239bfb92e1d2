"""The machine of the measurement, and how busy other processes keep it. On a busy machine the figures mean little."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import time
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_BUSY = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: proc(5), first line of /proc/stat


class MachineLoad:
    """CPU time of this machine since construction: ours, and that of other processes."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.monotonic(), _busy_s(), _own_s()

    def exclude(self, seconds: float) -> None:
        """Count this CPU time as ours. It is of processes that are neither this process nor its children."""
        self._own -= seconds

    def others(self) -> float:
        """How many CPUs other processes have kept busy, on average."""
        wall = time.monotonic() - self._began
        return max(0.0, (_busy_s() - self._busy) - (_own_s() - self._own)) / wall

    def facts(self) -> dict[str, object]:
        return {
            "cpus": os.cpu_count(),
            "busy_with_others": round(self.others(), 2),
            "python": platform.python_version(),
            "kernel": platform.release(),
        }


def cpu_s(pid: int) -> float:
    """CPU seconds of a process so far, over all threads, in ticks of 10 ms (proc(5), fields 14 and 15 of stat)."""
    return sum(_times(Path("/proc", str(pid)))[:2]) * _TICK_S


def namespace_cpu_s(pid: int) -> float:
    """CPU seconds of all processes, running or ended, in the process namespace of a process."""
    namespace, ticks = Path(f"/proc/{pid}/ns/pid").stat().st_ino, 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or may not be read
            if (folder / "ns" / "pid").stat().st_ino == namespace:
                ticks += sum(_times(folder))
    return ticks * _TICK_S


def _times(process: Path) -> list[int]:
    """Ticks in user and in system mode: of the process, then of the children that it has waited for."""
    fields = (process / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return [int(field) for field in fields[11:15]]


def _busy_s() -> float:
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    return sum(int(fields[at]) for at in _BUSY) * _TICK_S


def _own_s() -> float:
    """CPU seconds of this process and of its children that have ended."""
    usages = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
