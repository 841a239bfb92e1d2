"""The nouns, all frozen and compared by value.

Spelling of "slice", which means four things in this field: `Slice` is what we allocate (a whole GPU or a partition),
`resource_slice` the API object, `time_slice` the scheduler quantum of the GPU, `Placement` the memory slices inside one.

A `Slice` *may* exist; hardware with a UUID *does* exist. Steps and records name devices and slots, never only UUIDs, so
that a later step can use a partition which an earlier step has just created.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

GpuUuid = NewType("GpuUuid", str)  # "GPU-…", NVML's
MigUuid = NewType("MigUuid", str)  # "MIG-…", NVML's; new at each creation, even at the same place
ClaimUid = NewType("ClaimUid", str)  # Kubernetes'
PoolName = NewType("PoolName", str)  # "<node>/<pci bus id>"

MIB = 1024 * 1024
RESOURCE_API = "resource.k8s.io/v1"  # of claims and slices; in Kubernetes since 1.34
API_VERSION = "gpuslice.dev/v1alpha1"  # of the objects that users write: policies and opaque parameters


# ---------------------------------------------------------------- hardware as it could be


@dataclass(frozen=True, slots=True, order=True)
class Placement:
    """Memory slices [start, start + size) of one GPU (nvml.h, `nvmlGpuInstancePlacement_t`)."""

    start: int
    size: int

    def overlaps(self, other: Placement) -> bool:
        return self.start < other.start + other.size and other.start < self.start + self.size


@dataclass(frozen=True, slots=True, kw_only=True)
class MigProfile:
    """A GPU-instance profile as NVML reports it; `id` is stable across driver branches, `name` is only a label.

    `suffix` is "" for a plain profile, else what NVIDIA's names carry: "+me", "-me", "+gfx", "+me.all".
    """

    id: int
    name: str
    suffix: str = ""
    memory_mib: int
    compute_slices: int
    multiprocessors: int
    copy_engines: int = 0
    decoders: int = 0
    encoders: int = 0
    jpegs: int = 0
    ofas: int = 0
    max_instances: int
    placements: tuple[Placement, ...]

    def engines(self) -> dict[str, int]:
        """Engine counts by counter name (a DNS label). The counts of all partitions add up to at most the GPU's counts."""
        return {
            "multiprocessors": self.multiprocessors,
            "copy-engines": self.copy_engines,
            "decoders": self.decoders,
            "encoders": self.encoders,
            "jpegs": self.jpegs,
            "ofas": self.ofas,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One card: facts that do not change while the NVIDIA driver is loaded. The device minor may change: read it in a
    prepare."""

    uuid: GpuUuid
    index: int
    bus_id: str  # extended BDF, lower case, 4-digit domain: "0000:3b:00.0"
    product: str  # nvmlDeviceGetName: "NVIDIA H100 80GB HBM3"
    architecture: str  # "Hopper"
    compute_capability: str  # "9.0"
    memory_bytes: int  # nvmlMemory_v2.total
    reserved_bytes: int = 0  # nvmlMemory_v2.reserved: memory that the NVIDIA driver keeps for itself
    driver_version: str  # "580.65.06"
    cuda_version: str  # "13.0"
    profiles: tuple[MigProfile, ...] = ()  # empty: cannot be partitioned
    resetless: bool = False  # MIG mode can be switched without a GPU reset (Hopper and later)
    numa_node: int | None = None
    pcie_root: str | None = None  # "pci0000:16"

    def profile(self, profile_id: int) -> MigProfile | None:
        return next((profile for profile in self.profiles if profile.id == profile_id), None)


# ---------------------------------------------------------------- hardware as it is now


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """An existing GPU instance. `ci` and `uuid` are None while it has no compute instance."""

    profile: int
    placement: Placement
    gi: int
    ci: int | None = None
    uuid: MigUuid | None = None

    def __str__(self) -> str:
        """Its name in a sentence: the UUID, or profile and place while it has no UUID."""
        without = f"of profile {self.profile} at {self.placement.start} (no compute instance)"
        return f"partition {self.uuid or without}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveGpu:
    """The result of one look at a GPU. `mig_pending` differs from `mig` while a switch waits for a reset."""

    mig: bool
    mig_pending: bool
    partitions: tuple[Partition, ...] = ()

    def at(self, slot: MigSlot) -> Partition | None:
        """The partition that is exactly in this slot."""
        return next(
            (p for p in self.partitions if p.profile == slot.profile and p.placement == slot.placement),
            None,
        )


# ---------------------------------------------------------------- the offer


@dataclass(frozen=True, slots=True, order=True)
class MigSlot:
    """The position of a partition. It survives restarts, unlike the UUID and the instance ids of the partition."""

    gpu: GpuUuid
    profile: int
    placement: Placement


@dataclass(frozen=True, slots=True)
class WholeGpu:
    gpu: Gpu


@dataclass(frozen=True, slots=True)
class MigSlice:
    """A partition that may exist. Only a look at the card shows whether it exists."""

    gpu: Gpu
    profile: MigProfile
    placement: Placement

    @property
    def slot(self) -> MigSlot:
        return MigSlot(self.gpu.uuid, self.profile.id, self.placement)


Slice = WholeGpu | MigSlice


@dataclass(frozen=True, slots=True)
class Exclusive:
    """One claim uses the slice alone."""


@dataclass(frozen=True, slots=True)
class Monitor:
    """Admin access to a whole card while other claims use the card. It takes nothing from the card."""


@dataclass(frozen=True, slots=True)
class TimeSlicing:
    """Up to `shares` claims use the slice by time-slicing. `memory_mib` is their common budget; nothing enforces it.

    `interval` is the level that the policy fixes for the card. `part` is the number of a fixed part in a static plan: a
    plain exclusive device of 1/`shares`. It is None for a device that many claims share.
    """

    shares: int
    memory_mib: int
    interval: str = "default"
    part: int | None = None


@dataclass(frozen=True, slots=True)
class Mps:
    """Up to `shares` claims (by default) run at once on the slice, through one MPS daemon.

    `clients` is the largest number of CUDA contexts that the daemon serves. `memory_mib` is the memory for all shares.
    `part` as in `TimeSlicing`. `enforced` is false if the card keeps its compute mode: then a program can use the card
    without the daemon.
    """

    shares: int
    memory_mib: int
    clients: int
    part: int | None = None
    enforced: bool = True


Sharing = Exclusive | Monitor | TimeSlicing | Mps

INTERVALS = ("default", "short", "medium", "long")  # nvidia-smi compute-policy --set-timeslice 0 … 3


class Setting(StrEnum):
    """A setting of a card that the driver changes unless the operator keeps it."""

    COMPUTE_MODE = "computeMode"  # EXCLUSIVE_PROCESS while claims share a whole card by MPS
    TIME_SLICE = "timeSlice"  # an interval other than the default (nvidia-smi compute-policy)


@dataclass(frozen=True, slots=True)
class Offer:
    """The meaning of a device name: its hardware and the way in which claims use it."""

    slice_: Slice
    sharing: Sharing

    @property
    def gpu(self) -> Gpu:
        return self.slice_.gpu

    @property
    def slot(self) -> MigSlot | None:
        """None for a whole card."""
        return self.slice_.slot if isinstance(self.slice_, MigSlice) else None


@dataclass(frozen=True, slots=True, order=True)
class DeviceRef:
    """A device name with its pool, because every card has the same device names."""

    pool: PoolName
    device: str

    def __str__(self) -> str:
        return f"{self.pool}/{self.device}"


# ---------------------------------------------------------------- one claim


@dataclass(frozen=True, slots=True, order=True)
class ClaimRef:
    namespace: str
    name: str
    uid: ClaimUid

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name} ({self.uid})"


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of the opaque config for one allocation. None for each key that the config does not have."""

    enforcement: str | None = None  # "required" or "preferred"
    interval: str | None = None  # time slice of an exclusive card for the containers of its claim, one of `INTERVALS`


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One result of the allocation for our driver, with the opaque config that applies to it."""

    request: str  # base request name, subrequest stripped
    device: DeviceRef
    admin: bool = False
    share_id: str | None = None
    consumed: Mapping[str, int] = field(default_factory=dict)  # capacity that the scheduler charged
    settings: Settings = Settings()


@dataclass(frozen=True, slots=True)
class Claim:
    """`mistakes`: one sentence for each request that its author cannot mean. They count only before the claim is prepared."""

    ref: ClaimRef
    allocations: tuple[Allocation, ...]
    mistakes: tuple[str, ...] = ()


# ---------------------------------------------------------------- unavailable devices


@dataclass(frozen=True, slots=True, order=True)
class Taint:
    """The reason why a device is unavailable now. `key` has no domain. `reason` is one sentence for logs and commands."""

    key: str
    value: str
    effect: str = "NoSchedule"
    reason: str = field(default="", compare=False)
