"""The offer of a node: every card with its devices, in the order in which the scheduler tries them.

Each card has one pool. The pool's name is the card's PCI bus id, which survives reboots and changes of MIG mode. A small
pool is cheap for the scheduler to check, and a problem of one card never makes the pool of another card incomplete.

The scheduler takes the first device that fits (DRA contract, 5.2). So partitions come first: the smallest profile first,
and within a profile the place that blocks the fewest other places. Then come the card's MPS shares, its time slices, and
the whole card. Shared partitions come after all exclusive partitions of their profile and before any larger partition.
So a claim for "9Gi, by any means" gets a free partition; if there is none, a share of such a partition; if there is none,
a larger partition.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import assert_never

from gpuslice.core import fit, layout
from gpuslice.core.layout import ProfilePlacement
from gpuslice.core.model import (
    DeviceRef,
    Exclusive,
    Gpu,
    GpuUuid,
    MigProfile,
    MigSlice,
    Monitor,
    Mps,
    Offer,
    PoolName,
    Setting,
    Sharing,
    Slice,
    TimeSlicing,
    WholeGpu,
)
from gpuslice.core.policy.rules import GpuPolicy, Misfit, Policy
from gpuslice.core.policy.schema import SHARED, Mode, Parts
from gpuslice.errors import ConfigError

_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_POOL_NAME = 253  # bytes (resource.k8s.io, `pool.name`)


@dataclass(frozen=True, slots=True)
class Device:
    ref: DeviceRef
    offer: Offer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """One card and its offers."""

    name: PoolName
    gpu: Gpu
    devices: tuple[Device, ...]
    reserve_bytes: int  # memory of the whole card that is not offered
    keep: frozenset[Setting] = frozenset()  # settings that the driver does not change on this card
    least_share_mib: int = 1  # a share is charged at least this much memory

    @property
    def memory_mib(self) -> int:
        """The memory that a claim for the whole card gets."""
        return fit.sellable_mib(self.gpu, self.reserve_bytes)


@dataclass(frozen=True, slots=True)
class Inventory:
    """All pools of a node, in bus order."""

    pools: tuple[Pool, ...]
    known: tuple[Pool, ...] = field(default=(), compare=False)  # not published, but `offer` finds their devices
    notes: tuple[Misfit, ...] = field(default=(), compare=False)  # the settings of the policy that a card cannot follow
    _offers: dict[DeviceRef, Offer] = field(init=False, repr=False, compare=False)
    _pools: dict[GpuUuid, Pool] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        offers = {device.ref: device.offer for pool in (*self.known, *self.pools) for device in pool.devices}
        object.__setattr__(self, "_offers", offers)
        object.__setattr__(self, "_pools", {pool.gpu.uuid: pool for pool in self.pools})

    @staticmethod
    def of(gpus: Iterable[Gpu], policy: Policy, node: str, *, static: bool = False) -> Inventory:
        """What these cards offer under this policy. A card that cannot follow the policy offers what it can, and `notes`
        names the rest. ConfigError only for a name of the node that no pool can have.

        `static` is for clusters without partitionable devices (Kubernetes 1.34 and 1.35). There, nothing keeps the
        scheduler from using two overlapping devices. So a card is either whole or divided as the policy's `static` says:
        into a MIG layout, or into equal parts for MPS or time-slicing. Each part is a plain exclusive device.
        """
        pools, notes = [], list[Misfit]()
        for gpu in sorted(gpus, key=lambda gpu: _bus(gpu.bus_id)):
            name = _pool_name(node, gpu)
            if name is None:
                sentence = (
                    f"GPU {gpu.index} ({gpu.product}) has the PCI bus id {gpu.bus_id!r}, which cannot name a pool"
                )
                notes.append(Misfit("", gpu.uuid, sentence))
                continue
            policy_here, misfits = fit.fitted(gpu, policy.of(gpu), static=static)
            pools.append(_pool(name, gpu, policy_here, static=static))
            notes += [*policy.misfits(gpu), *misfits]
        return Inventory(tuple(pools), notes=tuple(notes))

    def knowing(self, other: Inventory) -> Inventory:
        """The same pools, but `offer` finds the devices of `other` too. If both know a name, this inventory's device counts.

        So the driver still serves a claim that was allocated under another plan, before an upgrade of the API server.
        """
        return replace(self, known=other.pools)

    def offer(self, ref: DeviceRef) -> Offer | None:
        return self._offers.get(ref)

    def pool(self, uuid: GpuUuid) -> Pool | None:
        return self._pools.get(uuid)

    def kept(self, uuid: GpuUuid) -> frozenset[Setting]:
        """The settings of this card that the driver must not change."""
        pool = self._pools.get(uuid)
        return frozenset() if pool is None else pool.keep

    def gpu(self, uuid: GpuUuid) -> Gpu | None:
        pool = self._pools.get(uuid)
        return None if pool is None else pool.gpu


def offer_name(offer: Offer) -> str:
    """Name of the device in its pool, a DNS label. It contains the profile's id, because profile names change with the
    NVIDIA driver branch."""
    match offer.slice_:
        case WholeGpu():
            return _manner(offer.sharing) or "gpu"
        case MigSlice(profile=profile, placement=placement):
            partition = f"mig-{profile.compute_slices}g-{profile.id}-{placement.start}"
            return "-".join(filter(None, (partition, _manner(offer.sharing))))
        case _:
            assert_never(offer.slice_)


def _manner(sharing: Sharing) -> str:
    match sharing:
        case Exclusive():
            return ""
        case Monitor():
            return "monitor"
        case Mps(part=part):
            return "mps" if part is None else f"mps-{part}"
        case TimeSlicing(part=part):
            return "timeslice" if part is None else f"timeslice-{part}"
        case _:
            assert_never(sharing)


def sm_percent(slice_: Slice) -> int:
    """The slice's part of its card's multiprocessors in percent, rounded down. 100: a whole card. 0: unknown."""
    mine, card = _multiprocessors(slice_)
    return 100 * mine // card


def _multiprocessors(slice_: Slice) -> tuple[int, int]:
    """Multiprocessors of the slice, and of its card. Only their ratio is used."""
    match slice_:
        case WholeGpu():
            return 1, 1
        case MigSlice(gpu, profile, _):
            card = layout.full(gpu.profiles)
            return (profile.multiprocessors, card.multiprocessors) if card and card.multiprocessors else (0, 1)
        case _:
            assert_never(slice_)


def _bus(bus_id: str) -> str:
    """The bus id as part of a pool name. Its figures have a fixed width, so that the text sorts like the bus."""
    return re.sub(r"[:.]", "-", bus_id.lower())


def _pool(name: PoolName, gpu: Gpu, policy: GpuPolicy, *, static: bool) -> Pool:
    offers = [*(_static_offers(gpu, policy) if static else _offers(gpu, policy)), Offer(WholeGpu(gpu), Monitor())]
    devices = tuple(Device(DeviceRef(name, offer_name(offer)), offer) for offer in offers)
    return Pool(
        name=name,
        gpu=gpu,
        devices=devices,
        reserve_bytes=policy.reserve_bytes,
        keep=policy.keep,
        least_share_mib=policy.least_share_mib,
    )


def _pool_name(node: str, gpu: Gpu) -> PoolName | None:
    """None if the card has no place on the bus that could name its pool."""
    if _SUBDOMAIN.fullmatch(node) is None:
        raise ConfigError(f"{node!r} cannot be the name of a pool; --node-name must be the name of the Node object")
    if _SUBDOMAIN.fullmatch(_bus(gpu.bus_id)) is None:
        return None
    name = f"{node}/{_bus(gpu.bus_id)}"
    if len(name) > _POOL_NAME:
        raise ConfigError(
            f"the name of node {node} is too long, because pool names contain it and have at most {_POOL_NAME} bytes; "
            "shorten it"
        )
    return PoolName(name)


def _offers(gpu: Gpu, policy: GpuPolicy) -> Iterator[Offer]:
    for _, places in groupby(_in_order(gpu, policy.profiles), key=lambda place: place.profile):
        slices = [MigSlice(gpu, place.profile, place.placement) for place in places]
        for slice_ in slices:
            yield Offer(slice_, Exclusive())
        for mode in (mode for mode in SHARED if mode in policy.shared_partitions):
            for slice_ in slices:
                yield Offer(slice_, _sharing(mode, slice_, policy))
    whole = WholeGpu(gpu)
    for mode in (mode for mode in SHARED if mode in policy.modes):
        yield Offer(whole, _sharing(mode, whole, policy))
    if Mode.GPU in policy.modes:
        yield Offer(whole, Exclusive())


def _sharing(mode: Mode, slice_: Slice, policy: GpuPolicy) -> Mps | TimeSlicing:
    """How this slice is shared. A card has the memory and the clients of the policy, a partition its proportion of them."""
    gpu = slice_.gpu
    match slice_:
        case WholeGpu():
            memory, interval = fit.sellable_mib(gpu, policy.reserve_bytes), policy.interval
        case MigSlice(profile=profile):
            memory, interval = profile.memory_mib, "default"  # only a card's time slice can be set (nvidia-smi)
        case _:
            assert_never(slice_)
    mine, card = _multiprocessors(slice_)
    clients = max(1, policy.mps_clients * mine // card)
    if mode is Mode.MPS:
        enforced = isinstance(slice_, MigSlice) or Setting.COMPUTE_MODE not in policy.keep
        return Mps(fit.shares_of(memory, min(policy.mps_shares, clients)), memory, clients, enforced=enforced)
    return TimeSlicing(fit.shares_of(memory, policy.timeslice_shares), memory, interval)


def _static_offers(gpu: Gpu, policy: GpuPolicy) -> Iterator[Offer]:
    """The card as the policy divides it, or as a whole. Never both, because nothing would keep them apart."""
    whole = WholeGpu(gpu)
    if isinstance(policy.static, Parts):
        sharing = _parted(policy.static, gpu, policy)
        yield from (Offer(whole, replace(sharing, part=part)) for part in range(sharing.shares))
    elif policy.static:
        for place in _static_layout(gpu, policy.static):
            yield Offer(MigSlice(gpu, place.profile, place.placement), Exclusive())
    elif Mode.GPU in policy.modes:
        yield Offer(whole, Exclusive())


def _parted(parts: Parts, gpu: Gpu, policy: GpuPolicy) -> Mps | TimeSlicing:
    return _sharing(parts.mode, WholeGpu(gpu), replace(policy, mps_shares=parts.count, timeslice_shares=parts.count))


def _static_layout(gpu: Gpu, wanted: Sequence[tuple[MigProfile, int]]) -> list[ProfilePlacement]:
    places = fit.static_layout(gpu, wanted) or ()
    return sorted(places, key=lambda place: (_size(place.profile), place.placement))


def _in_order(gpu: Gpu, profiles: Sequence[MigProfile]) -> list[ProfilePlacement]:
    """All places of these profiles: smallest profile first, then the place that excludes fewest, then the highest."""
    card = layout.totals(gpu.profiles)
    places = [ProfilePlacement(profile, placement) for profile in profiles for placement in profile.placements]
    places = [place for place in places if place.profile.max_instances > 0]
    excluded = {place: sum(not layout.fits(card, (place, other)) for other in places) for place in places}
    return sorted(places, key=lambda place: (_size(place.profile), excluded[place], -place.placement.start))


def _size(profile: MigProfile) -> tuple[int, ...]:
    """Sort key: the part of the card that a partition takes, memory first. So a claim for memory takes few engines."""
    engines = profile.engines()
    return (profile.memory_mib, profile.compute_slices, profile.multiprocessors, sum(engines.values()), profile.id)
