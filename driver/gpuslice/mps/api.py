"""The driver's interface to MPS: one daemon for each card or partition that claims share by MPS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gpuslice.core.model import GpuUuid, MigUuid


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonSpec:
    """The wanted state of a daemon. The ceilings are the same for every client; None: no ceiling.

    `key` is a DNS label and names the daemon's folder. It has at most 24 characters, because socket paths have at most
    107 bytes (unix(7)). `threads_percent` is a ceiling on multiprocessors, 1 … 100. It reserves nothing.
    """

    key: str
    device: GpuUuid | MigUuid
    memory_mib: int | None
    threads_percent: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonStatus:
    """The present state of a daemon. It has the ceilings that the daemon reports, not the wanted ceilings.

    `restarts` counts since the supervisor first started the daemon. `problem` is one sentence about the last failure; a
    successful `ensure` makes it "".
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
        """Make this daemon run with these ceilings. Returns at once if it does. After an error, nothing of the daemon
        is left.

        New ceilings apply to new clients. Connected clients keep their ceilings.
        """

    def stop(self, key: str) -> None:
        """Terminate the clients by MPS, then the daemon, and remove its folder. Succeeds if there is no daemon of this
        key."""

    def statuses(self) -> tuple[DaemonStatus, ...]:
        """The status of every daemon, sorted by key. Includes daemons with a problem."""

    def seen(self) -> tuple[str, tuple[DaemonStatus, ...]]:
        """`incarnation` and `statuses` in one request, for frequent callers."""

    def incarnation(self) -> str:
        """The identity of the supervisor process. After a change, the driver ensures all daemons from the records."""

    def pipe(self, key: str) -> Path:
        """CUDA_MPS_PIPE_DIRECTORY for the clients of this daemon. The folder need not exist."""

    def shm(self, key: str) -> Path:
        """The folder that the clients of this daemon need as /dev/shm."""

    def log(self, key: str) -> Path:
        """The folder where the daemon and its servers write their logs."""
