"""Things that several claims use at once: a partition of the first claim, the MPS daemons, and a card with two names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from gpuslice.core.model import ClaimRef, GpuUuid, LiveGpu, MigUuid, Monitor, PoolName
from gpuslice.core.record import CreateMig, Done, Grant, Plan, PreparedClaim, Record, StartMps


def reusable(decided: Plan, records: Iterable[Record], live: Mapping[GpuUuid, LiveGpu]) -> tuple[Done, ...]:
    """Partitions of this plan that other claims have created already, so that this claim joins them as a further share.

    Only existing partitions count. If a partition vanished while claims share it, this claim creates it again, and
    `repointed` corrects the records of the others.
    """
    slots = {step.slot for step in decided.steps if isinstance(step, CreateMig)}
    there = {partition.uuid for gpu in live.values() for partition in gpu.partitions}
    finished = (done for record in records for done in record.done if done.uuid is not None and done.uuid in there)
    return tuple({done.slot: done for done in finished if done.slot in slots}.values())


def repointed(record: Record, others: Iterable[Record]) -> tuple[Record, ...]:
    """Corrected records of the other claims that name a partition of this record by an older UUID. These claims get the new
    UUID at their next prepare, and the last holder can find the partition to destroy."""
    new = {done.slot: done for done in record.done if done.uuid is not None}
    changed = []
    for other in others:
        done = tuple(new.get(made.slot, made) for made in other.done)
        if done != other.done:
            uuids = {old.uuid: made.uuid for old, made in zip(other.done, done, strict=True)}
            changed.append(replace(other, done=done, prepared=_renamed(other.prepared, uuids)))
    return tuple(changed)


def _renamed(prepared: PreparedClaim | None, uuids: Mapping[MigUuid | None, MigUuid | None]) -> PreparedClaim | None:
    if prepared is None:
        return None
    devices = (replace(device, uuid=uuids.get(MigUuid(device.uuid)) or device.uuid) for device in prepared.devices)
    return replace(prepared, devices=tuple(devices))


def daemons_of(records: Iterable[Record], gpu: GpuUuid | None = None) -> tuple[StartMps, ...]:
    """The MPS daemons that finished records use, each once. With a GPU, only the daemons of this GPU."""
    steps = (step for record in records if record.prepared is not None for step in record.plan.steps)
    return tuple(dict.fromkeys(s for s in steps if isinstance(s, StartMps) and gpu in (None, s.gpu)))


def shares_of(step: StartMps, records: Iterable[Record]) -> tuple[Grant, ...]:
    """Every share that uses this MPS daemon."""
    return tuple(
        grant
        for record in records
        if step in record.plan.steps
        for grant in record.plan.grants
        if (grant.gpu, grant.slot) == (step.gpu, step.slot)
    )


def under_other_names(gpu: GpuUuid, pool: PoolName, records: Iterable[Record]) -> tuple[tuple[ClaimRef, PoolName], ...]:
    """Claims that hold something of this card from a pool of another name, each with that name: the node was renamed, or the
    card is in another slot. The scheduler sees two pools, and cannot see what is taken from the other pool."""
    found = {
        (record.plan.ref, grant.allocation.device.pool)
        for record in records
        for grant in record.plan.grants
        if grant.gpu == gpu and grant.allocation.device.pool != pool and not isinstance(grant.sharing, Monitor)
    }
    return tuple(sorted(found))
