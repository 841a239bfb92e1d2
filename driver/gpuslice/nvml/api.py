"""The driver's interface to the GPUs of a node. Two implementations, one contract (tests/nvml/test_contract.py).

Every verb raises `DeviceError` with NVML's own code and a sentence that names the GPU. Verbs block; call them from
worker threads. Every verb may be called from several threads at once. After a destroy, NVML reuses the ids of GPU
instances and compute instances, but it never reuses a MIG UUID.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from gpuslice.core.model import INTERVALS, Gpu, GpuUuid, LiveGpu, MigUuid, Placement


class Code(IntEnum):
    """The `nvmlReturn_t` values that the driver distinguishes (nvml.h, CUDA 13.3)."""

    SUCCESS = 0
    UNINITIALIZED = 1
    INVALID_ARGUMENT = 2
    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    INSUFFICIENT_SIZE = 7
    DRIVER_NOT_LOADED = 9
    TIMEOUT = 10
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19
    INSUFFICIENT_RESOURCES = 23
    UNKNOWN = 999


FOR_GOOD = (
    Code.NOT_SUPPORTED,
    Code.FUNCTION_NOT_FOUND,
)  # the card, or its NVIDIA driver, does not have the verb at all

TIME_SLICES = tuple(range(len(INTERVALS)))  # a level is an index of INTERVALS; milliseconds are not published


XID_OFF_THE_BUS = 79
MPS_SERVER = "nvidia-cuda-mps-server"  # the name in NVML's lists of processes


class ComputeMode(IntEnum):
    """`nvmlComputeMode_t`; lost at reboot."""

    DEFAULT = 0
    EXCLUSIVE_THREAD = 1  # only old drivers have it; this driver never sets it
    PROHIBITED = 2
    EXCLUSIVE_PROCESS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuProcess:
    """A process on a GPU. `gi` and `ci` are None if it uses the whole GPU. Memory is None if NVML does not report it."""

    pid: int
    name: str = ""
    gi: int | None = None
    ci: int | None = None
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    total_bytes: int
    used_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class XidEvent:
    """A critical XID. `gi`, `ci`: None for the whole GPU. `gpu`: None if NVML lost a GPU and does not report which."""

    gpu: GpuUuid | None
    xid: int
    gi: int | None = None
    ci: int | None = None


class Nvml(Protocol):
    def gpus(self) -> tuple[Gpu, ...]:
        """All cards in index order, without cards that are unreadable or hang: `lost` names these."""

    def lost(self) -> tuple[str, ...]:
        """One sentence for each card that the last `gpus` could not read."""

    def notes(self) -> tuple[str, ...]:
        """One sentence for each value that the last `gpus` could not read or had to assume."""

    def look(self, gpu: GpuUuid) -> LiveGpu:
        """The present MIG mode and partitions. A GPU without MIG has `mig=False` and no partitions."""

    def minor(self, gpu: GpuUuid) -> int:
        """Number of the device node /dev/nvidia<minor>; may change when MIG mode is switched."""

    def set_mig_mode(self, gpu: GpuUuid, on: bool) -> None:
        """Switch MIG mode now. RESET_REQUIRED or IN_USE (also as activation status) are errors without a switch."""

    def create_gpu_instance(self, gpu: GpuUuid, profile: int, placement: Placement) -> int:
        """Id of the new GPU instance. INSUFFICIENT_RESOURCES if the place is taken, NOT_SUPPORTED while MIG is off,
        INVALID_ARGUMENT for an unknown profile or a place that the profile does not have."""

    def create_compute_instance(self, gpu: GpuUuid, gi: int) -> tuple[int, MigUuid]:
        """Id and UUID of a compute instance as wide as its GPU instance."""

    def destroy_compute_instance(self, gpu: GpuUuid, gi: int, ci: int) -> None:
        """Destroy a compute instance. NOT_FOUND if it does not exist, IN_USE while a process runs on it."""

    def destroy_gpu_instance(self, gpu: GpuUuid, gi: int) -> None:
        """Destroy a GPU instance. NOT_FOUND if it does not exist, IN_USE while it has a compute instance."""

    def processes(self, gpu: GpuUuid) -> tuple[GpuProcess, ...]:
        """Compute and graphics processes on the card and its partitions, each once."""

    def memory(self, device: GpuUuid | MigUuid) -> Memory:
        """Memory of a card or of an existing partition."""

    def compute_mode(self, gpu: GpuUuid) -> ComputeMode: ...

    def set_compute_mode(self, gpu: GpuUuid, mode: ComputeMode) -> None: ...

    def time_slice(self, gpu: GpuUuid) -> int:
        """Time slice of processes that share the card, as an index of INTERVALS. Lost at reboot.

        NOT_SUPPORTED on cards that cannot interrupt a running kernel, and while MIG mode is on.
        """

    def set_time_slice(self, gpu: GpuUuid, level: int) -> None:
        """Set the time slice. INVALID_ARGUMENT for a level that is not in TIME_SLICES, NOT_SUPPORTED as above."""

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        """The next XID since the first call, or None after the timeout. One caller only."""

    def close(self) -> None: ...


def suffix(name: str) -> str:
    """The part of a profile name after "gb": "1g.24gb+me.all" has "+me.all"."""
    return name.partition("gb")[2]
