"""What the driver asks of MPS: one daemon for each card or partition that is shared so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpuslice.core.model import GpuUuid, MigUuid


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSpec:
    """A daemon as it is to be. The ceilings hold for every client alike; None: no ceiling.

    `key` names its folder (a DNS label of at most 24 characters), so that socket paths stay below 108 bytes (unix(7)).
    `threads_percent` is a ceiling on multiprocessors, 1 … 100, no reservation.
    """

    key: str
    device: GpuUuid | MigUuid
    memory_mib: int | None
    threads_percent: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStatus:
    """A daemon as it is. The ceilings are those that it reports, not those that it was given.

    `restarts` counts since the supervisor first started it; `problem` is one sentence about the last thing that went
    wrong, "" once the daemon was ensured again.
    """

    key: str
    device: GpuUuid | MigUuid
    pid: int
    memory_mib: int | None
    threads_percent: int | None
    restarts: int
    problem: str


class MpsDaemons(Protocol):
    """Every verb blocks, may be called from several threads, and raises `DeviceError` with one sentence."""

    def ensure(self, daemon: DaemonSpec) -> DaemonStatus:
        """Have this daemon running with these ceilings; at once where it is so already. Nothing stays incomplete.

        Ceilings that changed hold for new clients; those that are connected keep theirs.
        """

    def stop(self, key: str) -> None:
        """Terminate its clients through MPS, then the daemon, and remove its folder; gone is success."""

    def statuses(self) -> tuple[DaemonStatus, ...]:
        """All daemons, by key, those in trouble included."""

    def seen(self) -> tuple[str, tuple[DaemonStatus, ...]]:
        """`incarnation` and `statuses` by one question, for who asks all the time."""

    def incarnation(self) -> str:
        """Another one each time that the supervisor process was replaced: then ensure everything from the records."""

    def pipe(self, key: str) -> Path:
        """CUDA_MPS_PIPE_DIRECTORY of this daemon's clients; a path only, whether it exists or not."""

    def shm(self, key: str) -> Path:
        """What its clients need as /dev/shm."""

    def log(self, key: str) -> Path:
        """Where the daemon and its servers write their logs."""
