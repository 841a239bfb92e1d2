"""Devices that are unavailable now, with the reason: taints by device, from one look at the node.

The set of published devices is static. If an allocated device vanished, the scheduler would free its counters and
allocate it a second time (kubernetes/kubernetes#140802). So an unusable device stays published and gets a taint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from gpuslice.core import layout, plan, share, shared
from gpuslice.core.inventory import Inventory, Pool
from gpuslice.core.model import (
    ClaimUid,
    DeviceRef,
    Gpu,
    GpuUuid,
    LiveGpu,
    MigSlice,
    MigSlot,
    Monitor,
    Mps,
    Offer,
    Partition,
    Taint,
    TimeSlicing,
)
from gpuslice.core.record import Record

Taints = Mapping[DeviceRef, tuple[Taint, ...]]


@dataclass(frozen=True, slots=True)
class NodeLook:
    """The result of one look at a node. If a card has no entry in `live`, it could not be read."""

    inventory: Inventory
    live: Mapping[GpuUuid, LiveGpu]
    records: Mapping[ClaimUid, Record]
    taints: Taints


def taints(
    inventory: Inventory,
    live: Mapping[GpuUuid, LiveGpu],
    unwell: Mapping[GpuUuid, Taint],
    records: Iterable[Record],
    daemons: Mapping[str, Taint],
    unable: Mapping[GpuUuid, tuple[Taint, ...]] | None = None,
) -> Taints:
    """Taints of every device that has any.

    `unwell`: the taint of each unreadable GPU (lost, hung). `daemons`: the taint of each MPS daemon with a problem, by
    key; "" means all daemons (the supervisor is away). `unable`: permanent refusals of each card (see `needs`).
    """
    known = tuple(records)
    found: dict[DeviceRef, tuple[Taint, ...]] = {}
    for pool in inventory.pools:
        gpu = pool.gpu
        now = live.get(gpu.uuid)
        foreign = () if now is None else plan.foreign_partitions(gpu.uuid, now, known)
        renamed = tuple(_other_pool(pool, known))
        for device in pool.devices:
            here = [unwell[gpu.uuid]] if gpu.uuid in unwell and _is_hit(device.offer, unwell[gpu.uuid]) else []
            if now is not None and not isinstance(device.offer.sharing, Monitor):
                here += _mode(device.offer, gpu, now)
                here += _foreign(device.offer, gpu, foreign)
            here += () if isinstance(device.offer.sharing, Monitor) else renamed
            here += _daemon(device.offer, daemons)
            here += [taint for taint in (unable or {}).get(gpu.uuid, ()) if _is_needed(device.offer, taint)]
            if here:
                found[device.ref] = tuple(sorted(set(here)))
    return found


_REFUSED = {
    "minor": Taint("device-node", "none"),
    "time_slice": Taint("time-slice", "unsupported"),
    "compute_mode": Taint("compute-mode", "unsupported"),
    # For a claim that changes them: a card may tell a setting and still refuse to change it.
    "set_time_slice": Taint("time-slice", "unsupported"),
    "set_compute_mode": Taint("compute-mode", "unsupported"),
    "set_mig_mode": Taint("mig-mode", "unsupported"),
}


def needs(pool: Pool, live: LiveGpu) -> Iterator[str]:
    """The verbs of NVML that the card needs for its offers, as far as they can be tried now."""
    yield "minor"
    offers = [device.offer for device in pool.devices]
    for verb in ("time_slice", "compute_mode"):
        if not live.mig and any(_is_needed(offer, _REFUSED[verb]) for offer in offers):
            yield verb


def refused(verb: str, reason: str) -> Taint:
    """The taint of a card that permanently refuses this verb."""
    return replace(_REFUSED[verb], reason=reason)


def _is_needed(offer: Offer, taint: Taint) -> bool:
    """Whether a claim of this device needs the verb that the card refuses."""
    match offer.sharing:
        case _ if taint.key == "mig-mode":
            return isinstance(offer.slice_, MigSlice)
        case TimeSlicing(interval=interval) if taint.key == "time-slice":
            return offer.slot is None and interval != "default"
        case Mps(enforced=enforced) if taint.key == "compute-mode":
            return offer.slot is None and enforced
        case sharing:
            return taint.key == "device-node" and not isinstance(sharing, Monitor)


def _is_hit(offer: Offer, unwell: Taint) -> bool:
    """Whether the taint of the card applies to this device. A monitor must show a lost card, and a monitoring pod waits
    for the monitors of all cards (DRA contract, C6). A call on a hung card would hang the prepare of that pod, too."""
    return not isinstance(offer.sharing, Monitor) or unwell.value != "lost"


def _mode(offer: Offer, gpu: Gpu, live: LiveGpu) -> Iterator[Taint]:
    """Taints for a MIG mode that waits for a reset, or that is wrong for the device and needs a reset (Ampere)."""
    wanted = isinstance(offer.slice_, MigSlice)
    if live.mig_pending != live.mig:
        yield Taint("mig-mode", "pending", reason=plan.mode_advice(gpu, live, on=wanted))
    elif live.mig != wanted and not gpu.resetless and gpu.profiles:
        yield Taint("mig-mode", "on" if live.mig else "off", reason=plan.mode_advice(gpu, live, on=wanted))


def _other_pool(pool: Pool, records: Iterable[Record]) -> Iterator[Taint]:
    """Taints for the whole card, because the counters of this pool do not include what claims hold from the other pool."""
    if held := shared.under_other_names(pool.gpu.uuid, pool.name, records):
        names = ", ".join(f"{ref} ({other})" for ref, other in held)
        yield Taint(
            "other-pool",
            "held",
            reason=f"GPU {pool.gpu.index} is held from a pool of another name by {names}, because the node was renamed or the "
            "card was moved; delete their pods to free it",
        )


def _foreign(offer: Offer, gpu: Gpu, foreign: tuple[Partition, ...]) -> Iterator[Taint]:
    for partition in foreign:
        slot = MigSlot(gpu.uuid, partition.profile, partition.placement)
        if offer.slot is None or not layout.coexist(gpu, offer.slot, slot):
            yield Taint(
                "foreign-partition",
                f"profile-{partition.profile}-at-{partition.placement.start}",
                reason=f"GPU {gpu.index} has {partition}, which gpuslice did not make; destroy it to free its place",
            )


def _daemon(offer: Offer, daemons: Mapping[str, Taint]) -> Iterator[Taint]:
    if isinstance(offer.sharing, Mps):
        for key in ("", share.daemon_key(offer.gpu.uuid, offer.slot)):
            if key in daemons:
                yield daemons[key]
