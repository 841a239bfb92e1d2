"""Claim → Plan, and Record → undo: every decision of prepare and unprepare, as pure functions.

The scheduler's counters alone are not reliable: schedulers before Kubernetes 1.36.2 do not charge committed shares again
(kubernetes/kubernetes#139040). So `make` checks the holder of each device. If another record holds it, the claim is `Busy`,
because that holder may leave soon. A partition without a record is foreign, and the claim is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from itertools import combinations
from typing import assert_never

from gpuslice.core import cdi, layout, params, share
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import (
    Allocation,
    Claim,
    ClaimRef,
    ClaimUid,
    Exclusive,
    Gpu,
    GpuUuid,
    LiveGpu,
    MigSlot,
    MigUuid,
    Monitor,
    Mps,
    Partition,
    TimeSlicing,
)
from gpuslice.core.record import (
    AdjustMps,
    Busy,
    CreateMig,
    DestroyMig,
    Done,
    Grant,
    Plan,
    PreparedClaim,
    PreparedDevice,
    Record,
    ResetComputeMode,
    ResetTimeSlice,
    SetComputeMode,
    SetMigMode,
    SetTimeSlice,
    StartMps,
    Step,
    StopMps,
    Undo,
)
from gpuslice.errors import ClaimError, DeviceError

Live = Mapping[GpuUuid, LiveGpu]


def make(
    ref: ClaimRef, wanted: tuple[Grant, ...], inventory: Inventory, records: Iterable[Record], live: Live
) -> Plan | Busy:
    """The plan for a claim without a valid record, or the claims that block it.

    `wanted`: the `grants` of the claim. `records`: all other records on this node. `live`: a look at each GPU of the claim,
    taken under the GPU's lock. ClaimError if only the author or the scheduler can help, DeviceError if the node must
    change first.
    """
    others = tuple(records)
    for one, two in combinations(wanted, 2):
        if _exclude(one, two, inventory):
            raise ClaimError(
                f"claim {ref} was allocated {one.allocation.device} and {two.allocation.device}, which cannot exist "
                "together; delete the pod to have it scheduled again"
            )
    _refuse_several_daemons(ref, wanted)
    for number, grant in enumerate(wanted):
        too_much = share.excess(grant, [other for other in wanted[:number] if share.coexists(grant, other)])
        if too_much:
            raise ClaimError(
                f"claim {ref} was allocated {too_much} on {grant.allocation.device}; delete the pod to have it "
                "scheduled again"
            )
    holders = blockers(wanted, others, inventory)
    if holders:
        return Busy(holders)
    steps: list[Step] = []
    for grant in wanted:
        steps += (step for step in _steps(grant, inventory, others, live) if step not in steps)
    return Plan(ref, wanted, tuple(steps))


def _refuse_several_daemons(ref: ClaimRef, wanted: Sequence[Grant]) -> None:
    """Refuse a claim with several MPS daemons: one environment and one /dev/shm make a container a client of one daemon."""
    requests = [grant.allocation.request for grant in wanted if isinstance(grant.sharing, Mps)]
    for request in requests:
        if requests.count(request) > 1:
            raise ClaimError(
                f"request {request} of claim {ref} has {requests.count(request)} MPS shares, but a container can use "
                "only one; ask for one share of the size that it needs"
            )


def blockers(wanted: Sequence[Grant], records: Sequence[Record], inventory: Inventory) -> tuple[ClaimRef, ...]:
    """Claims that hold a device of `wanted`, or too many shares of it. At least one of these claims must leave."""
    held = [(record.plan.ref, grant) for record in records for grant in record.plan.grants]
    found = {ref for ref, other in held if any(_exclude(grant, other, inventory) for grant in wanted)}
    for grant in wanted:
        sharers = [(ref, other) for ref, other in held if share.coexists(grant, other)]
        mine = [other for other in wanted if other is not grant and share.coexists(grant, other)]
        if share.excess(grant, [*mine, *(other for _, other in sharers)]):
            found |= {ref for ref, _ in sharers}
    return tuple(sorted(found))


def grants(claim: Claim, inventory: Inventory) -> tuple[Grant, ...]:
    """The hardware behind each allocation. ClaimError as in `make`, or if the claim has a mistake."""
    if claim.mistakes:
        raise ClaimError(claim.mistakes[0])
    return tuple(_grant(claim.ref, allocation, inventory) for allocation in claim.allocations)


def serves(record: Record, claim: Claim) -> bool:
    """Whether a record is finished and has the same allocation. Then the present inventory does not matter."""
    return record.prepared is not None and tuple(g.allocation for g in record.plan.grants) == claim.allocations


def stands(record: Record, live: Live) -> bool:
    """Whether the hardware of a finished record still exists as it was made, and whether its monitored partitions are
    the same."""
    now = {(MigSlot(gpu, p.profile, p.placement), p.uuid) for gpu, look in live.items() for p in look.partitions}
    made = {done.uuid for done in record.done if done.uuid is not None}
    devices = () if record.prepared is None else record.prepared.devices
    watched = {
        (grant.slot, device.uuid)
        for grant, device in zip(record.plan.grants, devices, strict=False)
        if isinstance(grant.sharing, Monitor) and grant.slot is not None
    }
    return made <= {uuid for _, uuid in now} and watched <= now


def prepared_claim(record: Record, live: Live, kind: str) -> PreparedClaim:
    """The devices of the claim, with the CDI names that the kubelet passes on. Pure; see `plugin/cdi_writer.py`."""
    uid = record.plan.ref.uid
    return PreparedClaim(
        record.plan.ref,
        tuple(
            PreparedDevice(
                request=grant.allocation.request,
                device=grant.allocation.device,
                share_id=grant.allocation.share_id,
                uuid=_uuid(grant, live[grant.gpu]),
                cdi_ids=(cdi.qualified(kind, cdi.device_name(uid, number)),),
            )
            for number, grant in enumerate(record.plan.grants)
        ),
    )


def _uuid(grant: Grant, live: LiveGpu) -> GpuUuid | MigUuid:
    if grant.slot is None:
        return grant.gpu
    there = live.at(grant.slot)
    if there is None or there.uuid is None:
        raise DeviceError(
            f"the partition of {grant.allocation.device} vanished while the claim was prepared; the kubelet tries again"
        )
    return there.uuid


def undo(record: Record, others: Iterable[Record]) -> tuple[Undo, ...]:
    """The undos of a record's steps, last step first. Hardware that another record still uses stays."""
    kept = {step for other in others for step in other.plan.steps}
    return tuple(undoing for step in reversed(record.plan.steps) for undoing in _undo_step(step, record.done, kept))


def leftover(record: Record, gpu: GpuUuid) -> Record:
    """The record of the hardware that a claim leaves on a lost card. It is unfinished. It has a name of its own, because
    the claim itself is unprepared and may get other devices.

    A partition whose creation was not confirmed is left out: only a reset brings a card back, a reset removes all
    partitions, and a later partition in the slot is foreign.
    """
    suffix = f"-on-{gpu}"
    uid = record.plan.ref.uid
    ref = replace(record.plan.ref, uid=uid if uid.endswith(suffix) else ClaimUid(uid + suffix))
    done = tuple(made for made in record.done if made.slot.gpu == gpu and made.uuid is not None)
    slots = {made.slot for made in done}
    steps = (step for step in record.plan.steps if step.gpu == gpu)
    kept = tuple(step for step in steps if not isinstance(step, CreateMig) or step.slot in slots)
    return Record(Plan(ref, tuple(grant for grant in record.plan.grants if grant.gpu == gpu), kept), done)


def target(undoing: DestroyMig, live: LiveGpu) -> Partition | None:
    """The partition to destroy, or None if it is gone.

    Found by UUID if the record has a UUID. Without UUID, or if only the compute instance is gone, found by slot. This is
    safe: the slot was empty before the plan was written, and the caller holds the GPU's lock.
    """
    there = live.at(undoing.slot)
    if undoing.uuid is None:
        return there
    named = next((p for p in live.partitions if p.uuid == undoing.uuid), None)
    return named or (there if there is not None and there.ci is None else None)


def foreign_partitions(gpu: GpuUuid, live: LiveGpu, records: Iterable[Record]) -> tuple[Partition, ...]:
    """Partitions without a record. They are foreign, because the driver writes the record before it creates a partition."""
    slots = {step.slot for record in records for step in record.plan.steps if isinstance(step, CreateMig)}
    return tuple(p for p in live.partitions if MigSlot(gpu, p.profile, p.placement) not in slots)


# ---------------------------------------------------------------- grants


def _grant(ref: ClaimRef, allocation: Allocation, inventory: Inventory) -> Grant:
    device = allocation.device
    offer = inventory.offer(device)
    if offer is None:
        raise ClaimError(
            f"claim {ref} was allocated {device}, which this node does not offer now; delete the pod to have it "
            "scheduled again"
        )
    if isinstance(offer.sharing, Monitor) and not allocation.admin:
        raise ClaimError(
            f"{device} is for admin access only; set adminAccess: true on the request, in a namespace with the label "
            'resource.kubernetes.io/admin-access: "true"'
        )
    # A device with admin access is only monitored: this takes nothing from its holders (KEP-5018).
    sharing = Monitor() if allocation.admin else offer.sharing
    params.check(allocation.settings, replace(offer, sharing=sharing), device, inventory.kept(offer.gpu.uuid))
    return Grant(allocation=allocation, gpu=offer.gpu.uuid, slot=offer.slot, sharing=sharing)


def _exclude(one: Grant, two: Grant, inventory: Inventory) -> bool:
    """Whether claims cannot hold both grants at the same time."""
    if one.gpu != two.gpu or isinstance(one.sharing, Monitor) or isinstance(two.sharing, Monitor):
        return False
    if share.coexists(one, two):
        return False
    if one.slot is None or two.slot is None:
        return True
    gpu = inventory.gpu(one.gpu)
    return gpu is None or not layout.coexist(gpu, one.slot, two.slot)


# ---------------------------------------------------------------- steps


def _steps(grant: Grant, inventory: Inventory, records: Sequence[Record], live: Live) -> Iterator[Step]:
    """First the steps for the slice, then the steps for sharing. Each part is independent of the other."""
    gpu = inventory.gpu(grant.gpu)
    assert gpu is not None  # `_grant` found the offer in the same inventory
    now = live[grant.gpu]
    if not isinstance(grant.sharing, Monitor):
        foreign = foreign_partitions(gpu.uuid, now, records)
        if grant.slot is None:
            yield from _whole(grant, gpu, now, foreign)
        else:
            yield from _partition(grant, grant.slot, gpu, now, foreign)
    match grant.sharing:
        case Monitor():
            if grant.slot is not None and now.at(grant.slot) is None:
                raise ClaimError(
                    f"{grant.allocation.device} does not exist now, so admin access shows nothing; ask for the device monitor"
                )
        case Exclusive():
            yield from _time_slice(gpu, grant.allocation.settings.interval)
        case TimeSlicing(interval=interval):
            yield from _time_slice(gpu, interval if grant.slot is None else None)
        case Mps(enforced=enforced):
            # It is unknown whether a partition accepts a compute mode. The driver does not need it: see `docs/mps.md`.
            if grant.slot is None and enforced:
                yield SetComputeMode(gpu.uuid)
            yield StartMps(gpu.uuid, grant.slot)
        case _:
            assert_never(grant.sharing)


def _time_slice(gpu: Gpu, interval: str | None) -> Iterator[Step]:
    if interval not in (None, "default"):
        yield SetTimeSlice(gpu.uuid, str(interval))


def _whole(grant: Grant, gpu: Gpu, live: LiveGpu, foreign: Sequence[Partition]) -> Iterator[Step]:
    if foreign:
        raise DeviceError(
            f"{grant.allocation.device} has {_listed(foreign)}, which gpuslice did not make; destroy it to free the card"
        )
    yield from _mode(gpu, live, on=False)


def _partition(grant: Grant, slot: MigSlot, gpu: Gpu, live: LiveGpu, foreign: Sequence[Partition]) -> Iterator[Step]:
    blockers = [p for p in foreign if not layout.coexist(gpu, slot, MigSlot(gpu.uuid, p.profile, p.placement))]
    if blockers:
        raise DeviceError(
            f"the place of {grant.allocation.device} is taken by {_listed(blockers)}, which gpuslice did not make; "
            "destroy it to free the place"
        )
    yield from _mode(gpu, live, on=True)
    yield CreateMig(slot)


def _mode(gpu: Gpu, live: LiveGpu, *, on: bool) -> Iterator[Step]:
    """Switch MIG mode only if it differs, and only if the switch needs no reset (Hopper and later, NVML field 184)."""
    if live.mig_pending != live.mig:
        raise DeviceError(mode_advice(gpu, live, on=on))
    if live.mig == on or not (gpu.profiles or live.mig):
        return
    if not gpu.resetless:
        raise DeviceError(mode_advice(gpu, live, on=on))
    yield SetMigMode(gpu.uuid, on)


def mode_advice(gpu: Gpu, live: LiveGpu, *, on: bool) -> str:
    """Why this GPU is unavailable with MIG mode `on` now, and the remedy for the operator."""
    word, now = ("on", "off") if on else ("off", "on")
    if live.mig_pending != live.mig:
        return (
            f"GPU {gpu.index} ({gpu.uuid}) waits for a reset to finish a change of MIG mode; drain the node and reset "
            "the GPU"
        )
    return (
        f"GPU {gpu.index} ({gpu.product}) has MIG mode {now} and cannot switch it without a reset; drain the node, run "
        f"nvidia-smi -i {gpu.bus_id} -mig {int(on)} and reset the GPU to turn it {word}"
    )


def _listed(partitions: Sequence[Partition]) -> str:
    return ", ".join(map(str, partitions))


def _undo_step(step: Step, done: Sequence[Done], kept: Set[Step]) -> Iterator[Undo]:
    match step:
        case SetMigMode():
            return  # MIG mode stays on: the next claim of another mode switches it off, and MIG after MIG needs no switch
        case StartMps(gpu, slot):
            yield AdjustMps(gpu, slot) if step in kept else StopMps(gpu, slot)
        case _ if step in kept:
            return
        case CreateMig(slot):
            made = [d for d in done if d.slot == slot]
            yield DestroyMig(slot, made[-1].uuid if made else None)
        case SetComputeMode(gpu):
            yield ResetComputeMode(gpu)
        case SetTimeSlice(gpu):
            # By GPU, not by interval: after a change of the policy, a later share may have another interval.
            if not any(isinstance(other, SetTimeSlice) and other.gpu == gpu for other in kept):
                yield ResetTimeSlice(gpu)
        case _:
            assert_never(step)
