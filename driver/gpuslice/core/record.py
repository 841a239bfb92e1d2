"""The data of one claim on the node: the steps that create its devices, the undos of the steps, the plan, and the record.

A step names devices and slots, never only UUIDs, so that a later step can use a partition which an earlier step creates.
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
    """Create the partition of this slot. The slot was empty before the plan was written."""

    slot: MigSlot

    @property
    def gpu(self) -> GpuUuid:
        return self.slot.gpu


@dataclass(frozen=True, slots=True)
class SetComputeMode:
    """Let only the MPS server open the GPU. So a client that does not find the daemon fails and does not run unlimited."""

    gpu: GpuUuid


@dataclass(frozen=True, slots=True)
class SetTimeSlice:
    gpu: GpuUuid
    interval: str


@dataclass(frozen=True, slots=True)
class StartMps:
    """Make the daemon of this card or partition run, with ceilings for the largest share of its holders."""

    gpu: GpuUuid
    slot: MigSlot | None


Step = SetMigMode | CreateMig | SetComputeMode | SetTimeSlice | StartMps


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One allocation and its hardware. It describes a holder without any inventory."""

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
        """GPUs that the claim takes, in the one global order. GPUs that it only monitors are not included."""
        return tuple(sorted({grant.gpu for grant in self.grants if grant.sharing != Monitor()}))

    @property
    def named(self) -> tuple[GpuUuid, ...]:
        """Every GPU of the claim, including GPUs that it only monitors."""
        return tuple(sorted({grant.gpu for grant in self.grants}))


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeMig:
    """The hardware that a `CreateMig` step has created so far."""

    slot: MigSlot
    gi: int
    ci: int | None = None
    uuid: MigUuid | None = None


Done = MadeMig


@dataclass(frozen=True, slots=True)
class DestroyMig:
    """Destroy the partition in the slot. With a UUID, only the partition with this UUID, because ids and slots are reused."""

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
    """Keep the daemon for the other shares, with ceilings for the largest of them."""

    gpu: GpuUuid
    slot: MigSlot | None


Undo = DestroyMig | ResetComputeMode | ResetTimeSlice | StopMps | AdjustMps


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedDevice:
    """One device of the answer to the kubelet, with the UUID of its hardware."""

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
    """The stored state of a claim. `prepared` is None until the prepare is finished: there is no other field for the phase."""

    plan: Plan
    done: tuple[Done, ...] = ()
    prepared: PreparedClaim | None = None


@dataclass(frozen=True, slots=True)
class Busy:
    """The devices become free for this claim when these other claims have left."""

    holders: tuple[ClaimRef, ...]
