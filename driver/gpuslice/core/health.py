"""Devices that are unavailable now, with the reason: taints by device, from one look at the node.

The set of published devices is static. If an allocated device vanished, the scheduler would free its counters and
allocate it a second time (kubernetes/kubernetes#140802). So an unusable device stays published and gets a taint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gpuslice.core import layout, plan, share
from gpuslice.core.inventory import Inventory
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
) -> Taints:
    """Taints of every device that has any.

    `unwell`: taints of GPUs that cannot be read (lost, hung), by GPU. `daemons`: problems of MPS daemons by their key;
    the key "" stands for all daemons (the supervisor is away).
    """
    known = tuple(records)
    found: dict[DeviceRef, tuple[Taint, ...]] = {}
    for pool in inventory.pools:
        gpu = pool.gpu
        now = live.get(gpu.uuid)
        foreign = () if now is None else plan.foreign_partitions(gpu.uuid, now, known)
        for device in pool.devices:
            here = [unwell[gpu.uuid]] if gpu.uuid in unwell else []
            if now is not None and not isinstance(device.offer.sharing, Monitor):
                here += _mode(device.offer, gpu, now)
                here += _foreign(device.offer, gpu, foreign)
            here += _daemon(device.offer, daemons)
            if here:
                found[device.ref] = tuple(sorted(set(here)))
    return found


def _mode(offer: Offer, gpu: Gpu, live: LiveGpu) -> Iterator[Taint]:
    """Taints for a MIG mode that waits for a reset, or that is wrong for the device and needs a reset (Ampere)."""
    wanted = isinstance(offer.slice_, MigSlice)
    if live.mig_pending != live.mig:
        yield Taint("mig-mode", "pending", reason=plan.mode_advice(gpu, live, on=wanted))
    elif live.mig != wanted and not gpu.resetless and gpu.profiles:
        yield Taint("mig-mode", "on" if live.mig else "off", reason=plan.mode_advice(gpu, live, on=wanted))


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
