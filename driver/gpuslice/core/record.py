"""One claim's way through the node: the steps that make its devices, their undos, the plan, and the record that is kept of it.

A step names devices and slots, never UUIDs alone, so that a later one may serve a partition which an earlier one makes.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuslice.core.model import Allocation, ClaimRef, DeviceRef, GpuUuid, MigSlot, MigUuid, Monitor, Sharing


@dataclass(frozen=True, slots=True)
class SetMigMode:
    gpu: GpuUuid
    on: bool


@dataclass(frozen=True, slots=True)
class CreateMig:
    """Create the partition of this slot, which was seen empty before the plan was written."""

    slot: MigSlot

    @property
    def gpu(self) -> GpuUuid:
        return self.slot.gpu


@dataclass(frozen=True, slots=True)
class SetComputeMode:
    """Only the MPS server may open the GPU, so that a client which misses the daemon fails instead of running unlimited."""

    gpu: GpuUuid


@dataclass(frozen=True, slots=True)
class SetTimeSlice:
    gpu: GpuUuid
    interval: str


@dataclass(frozen=True, slots=True)
class StartMps:
    """Have the daemon of this card or partition running, with ceilings for the largest share of those that hold it."""

    gpu: GpuUuid
    slot: MigSlot | None


Step = SetMigMode | CreateMig | SetComputeMode | SetTimeSlice | StartMps


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One allocation and the hardware it takes; enough to know a holder without any inventory."""

    allocation: Allocation
    gpu: GpuUuid
    slot: MigSlot | None = None
    sharing: Sharing


@dataclass(frozen=True, slots=True)
class Plan:
    ref: ClaimRef
    grants: tuple[Grant, ...]
    steps: tuple[Step, ...]

    @property
    def gpus(self) -> tuple[GpuUuid, ...]:
        """GPUs the claim takes (not those it only monitors), in the one global order."""
        return tuple(sorted({grant.gpu for grant in self.grants if grant.sharing != Monitor()}))

    @property
    def named(self) -> tuple[GpuUuid, ...]:
        """Every GPU of the claim, those it only monitors included."""
        return tuple(sorted({grant.gpu for grant in self.grants}))


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeMig:
    """What a `CreateMig` brought into being so far."""

    slot: MigSlot
    gi: int
    ci: int | None = None
    uuid: MigUuid | None = None


Done = MadeMig


@dataclass(frozen=True, slots=True)
class DestroyMig:
    """Destroy what stands in the slot; with a UUID only that very partition, because ids and slots are used again."""

    slot: MigSlot
    uuid: MigUuid | None

    @property
    def gpu(self) -> GpuUuid:
        return self.slot.gpu


@dataclass(frozen=True, slots=True)
class ResetComputeMode:
    gpu: GpuUuid


@dataclass(frozen=True, slots=True)
class ResetTimeSlice:
    gpu: GpuUuid


@dataclass(frozen=True, slots=True)
class StopMps:
    gpu: GpuUuid
    slot: MigSlot | None


@dataclass(frozen=True, slots=True)
class AdjustMps:
    """The daemon stays for the other shares; its ceilings are for the largest of those."""

    gpu: GpuUuid
    slot: MigSlot | None


Undo = DestroyMig | ResetComputeMode | ResetTimeSlice | StopMps | AdjustMps


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDevice:
    """One device as the kubelet gets it in the answer, with the UUID that it turned out to have."""

    request: str
    device: DeviceRef
    share_id: str | None = None
    uuid: GpuUuid | MigUuid
    cdi_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PreparedClaim:
    ref: ClaimRef
    devices: tuple[PreparedDevice, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a claim. `prepared` is None until it is finished: that *is* the phase."""

    plan: Plan
    done: tuple[Done, ...] = ()
    prepared: PreparedClaim | None = None


@dataclass(frozen=True, slots=True)
class Busy:
    """The devices are free for this claim as soon as these other claims have left."""

    holders: tuple[ClaimRef, ...]
