"""Inventory and taints → the ResourceSlices of each pool, planned as a whole. Equal input gives equal bytes.

A selector that names a missing key is a CEL error, and the scheduler then fails the pod again and again. Two rules
prevent this. Every device has the same attribute keys of our domain ("" if one has no meaning). Every device has the same
capacity names ("0" if it has none of it, or if the hardware does not report it).

The set of devices is static: if an allocated device vanished, the scheduler would free its counters and allocate it a
second time (kubernetes/kubernetes#140802). So an unusable device gets a taint. Counters are computed from the whole
inventory, also from devices that are not published at the moment.

A shared device has a request policy for each capacity, because without a policy the first share takes the whole capacity.
Some capacities cannot be divided (engines, or clients of a time slice). Selectors see their value, but a share takes
nothing of them, and the policy refuses every request for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import assert_never

from gpuslice.core import layout, quantity, share
from gpuslice.core.inventory import Device, Inventory, Pool, sm_percent
from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.layout import ProfilePlacement
from gpuslice.core.model import (
    DeviceRef,
    Exclusive,
    MigProfile,
    MigSlice,
    Monitor,
    Mps,
    Offer,
    PoolName,
    Sharing,
    Slice,
    Taint,
    TimeSlicing,
    WholeGpu,
)
from gpuslice.core.pools import counters
from gpuslice.core.pools.counters import Counters
from gpuslice.errors import StateError

COUNTER_SET = "card"  # one per pool; the API needs a name that is unique in the pool
DEVICES_PER_SLICE = 64  # with taints or counters; 128 without, but a first taint must not move devices
_TEXT = 64  # bytes of a string attribute
_ALL_SMS = 100  # percent
_NOTHING = {"default": "0", "validValues": ["0"]}  # the policy of a capacity that no share takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The fields of ResourceSlices that the API server keeps. The driver must not rely on fields that it drops."""

    partitionable: bool  # DRAPartitionableDevices
    consumable: bool  # DRAConsumableCapacity
    taints: bool  # DRADeviceTaints


@dataclass(frozen=True, slots=True)
class PoolSlices:
    """The wanted state of one pool: the part of each slice's spec that depends on the pool, in order.

    Each part is `{"sharedCounters": […]}` or `{"devices": […]}`, never both. The publisher adds driver, node, generation,
    slice count and names.
    """

    name: PoolName
    specs: tuple[ReadOnlyBody, ...]


def resource_slices(
    inventory: Inventory,
    taints: Mapping[DeviceRef, tuple[Taint, ...]],
    *,
    driver: str,
    features: Features,
    held: frozenset[DeviceRef] = frozenset(),
) -> tuple[PoolSlices, ...]:
    """The slices of every pool. `driver` is the domain of the taints' keys.

    `held`: the devices that claims hold now. They always stay published. Other tainted devices are left out if the API
    server has no taints. All shared devices are left out if it has no consumable capacity, because a single claim would
    get the whole card. StateError if a pool needs counters that the API server drops, because the scheduler would then
    allocate the same memory twice.
    """
    return tuple(_pool(pool, taints, driver, features, held) for pool in inventory.pools)


def _pool(
    pool: Pool,
    taints: Mapping[DeviceRef, tuple[Taint, ...]],
    driver: str,
    features: Features,
    held: frozenset[DeviceRef],
) -> PoolSlices:
    needed = counters_of(pool)
    if needed.chosen and not features.partitionable:
        raise StateError(
            f"pool {pool.name} cannot be published without counters, which this API server drops; plan it statically"
        )
    usable = [
        d
        for d in pool.devices
        if (features.taints or d.ref in held or d.ref not in taints)
        and (features.consumable or not _is_shared(d.offer.sharing))
    ]
    marks = taints if features.taints else {}
    bodies = [_device(d, _published(d.offer, pool, needed), marks.get(d.ref, ()), driver) for d in usable]
    specs: list[ReadOnlyBody] = [{"sharedCounters": [_counter_set(needed)]}] if needed.chosen else []
    specs += [{"devices": chunk} for chunk in _chunks(bodies)] or [{"devices": []}]
    return PoolSlices(pool.name, tuple(specs))


def _chunks(bodies: Sequence[ReadOnlyBody]) -> Iterator[Sequence[ReadOnlyBody]]:
    for start in range(0, len(bodies), DEVICES_PER_SLICE):
        yield bodies[start : start + DEVICES_PER_SLICE]


# ---------------------------------------------------------------- counters


def counters_of(pool: Pool) -> Counters:
    """The counters that keep this pool's devices apart. Empty if no device excludes another one."""
    at: dict[ProfilePlacement, int] = {}
    wholes = 0
    for device in pool.devices:
        if isinstance(device.offer.sharing, Monitor) or _part(device.offer.sharing) is not None:
            continue  # devices that take nothing, and fixed parts of a static plan, which exist together
        match device.offer.slice_:
            case WholeGpu():
                wholes += 1
            case MigSlice(profile=profile, placement=placement):
                place = ProfilePlacement(profile, placement)
                at[place] = at.get(place, 0) + 1
            case _:
                assert_never(device.offer.slice_)
    return counters.minimal(pool.gpu.profiles, tuple(at), tuple(at.values()), wholes)


def _part(sharing: Sharing) -> int | None:
    return sharing.part if isinstance(sharing, Mps | TimeSlicing) else None


def _is_shared(sharing: Sharing) -> bool:
    return isinstance(sharing, Mps | TimeSlicing) and sharing.part is None


def _counter_set(needed: Counters) -> ReadOnlyBody:
    return {"name": COUNTER_SET, "counters": _values(needed.whole())}


def _values(amounts: Mapping[str, int]) -> dict[str, ReadOnlyBody]:
    return {name: {"value": str(amount)} for name, amount in amounts.items()}


# ---------------------------------------------------------------- devices


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedDevice:
    """The published fields that depend on the kind of the device. Each kind of offer has its own values."""

    uuid: str = ""
    profile: str = ""
    interval: str = ""
    memory_mib: int
    sm_percent: int = 0
    clients: int = 0
    shares: int = 0
    engines: MigProfile | None = None  # the profile whose engine counts the device has
    consumed: Mapping[str, int]
    policies: Mapping[str, ReadOnlyBody] | None = (
        None  # request policies of the capacities that a share takes; None: an exclusive device
    )


def _published(offer: Offer, pool: Pool, needed: Counters) -> PublishedDevice:
    match offer.sharing:
        case Monitor():  # admin access is charged for counters too (kubernetes/kubernetes#140729), so it has none
            return PublishedDevice(uuid=offer.gpu.uuid, memory_mib=0, consumed={})
        case Exclusive():
            return _exclusive(offer.slice_, pool, needed)
        case Mps() as mps:
            return _mps(mps, _exclusive(offer.slice_, pool, needed), pool.least_share_mib)
        case TimeSlicing() as timeslice:
            return _timeslice(timeslice, _exclusive(offer.slice_, pool, needed), pool.least_share_mib)
        case _:
            assert_never(offer.sharing)


def _exclusive(slice_: Slice, pool: Pool, needed: Counters) -> PublishedDevice:
    match slice_:
        case WholeGpu(gpu):
            return PublishedDevice(
                uuid=gpu.uuid,
                memory_mib=pool.memory_mib,
                sm_percent=sm_percent(slice_),
                engines=layout.full(gpu.profiles),
                consumed=needed.whole(),
            )
        case MigSlice(_, profile, placement):  # a partition has a UUID only while it exists
            return PublishedDevice(
                profile=profile.name,
                memory_mib=profile.memory_mib,
                sm_percent=sm_percent(slice_),
                engines=profile,
                consumed=needed.at(ProfilePlacement(profile, placement)),
            )
        case _:
            assert_never(slice_)


def _mps(mps: Mps, alone: PublishedDevice, least_mib: int) -> PublishedDevice:
    """The same hardware, shared. A fixed part has its fraction of all divisible capacities.

    `smPercent` refers to the multiprocessors of the shared slice, a partition included, because MPS counts in this way
    (CUDA_MPS_ACTIVE_THREAD_PERCENTAGE).
    """
    shared = replace(
        alone,
        memory_mib=mps.memory_mib,
        sm_percent=_ALL_SMS,
        clients=mps.clients,
    )
    if mps.part is not None:
        return _fixed(replace(shared, clients=mps.clients // mps.shares, sm_percent=_ALL_SMS // mps.shares), mps)
    policies = {
        "memory": _memory_policy(mps, least_mib),
        "smPercent": _policy(0, 0, _ALL_SMS),  # a ceiling, not a reservation; 0 is "no ceiling"
        "clients": _policy(mps.clients // mps.shares, 1, mps.clients),
    }
    return replace(shared, policies=policies)


def _timeslice(sharing: TimeSlicing, alone: PublishedDevice, least_mib: int) -> PublishedDevice:
    shared = replace(
        alone,
        interval="" if alone.profile else sharing.interval,  # partitions have no adjustable interval
        memory_mib=sharing.memory_mib,
        sm_percent=0,  # time-slicing has no ceiling on compute
        shares=sharing.shares,
    )
    if sharing.part is not None:
        return _fixed(replace(shared, shares=1), sharing)
    return replace(
        shared, policies={"memory": _memory_policy(sharing, least_mib), "shares": _policy(1, 1, sharing.shares)}
    )


def _fixed(whole: PublishedDevice, sharing: Mps | TimeSlicing) -> PublishedDevice:
    return replace(whole, memory_mib=sharing.memory_mib // sharing.shares, consumed={})


def _memory_policy(sharing: Mps | TimeSlicing, least_mib: int) -> ReadOnlyBody:
    """Any amount from the least on, and an equal part by default. The scheduler raises a smaller request to the least.

    There is no step. With DRAFractionalCapacityRange the scheduler divides a request by a step in thousandths. If the request
    has more decimals, as 7.7777Gi has, the scheduler ends its attempt for the whole pod
    (k8s.io/dynamic-resource-allocation v0.37.1, `roundUpRange`).
    """
    if sharing.memory_mib < sharing.shares:  # a card without memory of its own
        only = quantity.mebibytes(sharing.memory_mib)
        return {"default": only, "validValues": [only]}
    part_mib = sharing.memory_mib // sharing.shares
    least = quantity.mebibytes(min(least_mib, part_mib))
    return {"default": quantity.mebibytes(part_mib), "validRange": {"min": least}}


def _policy(default: int, least: int, value: int) -> ReadOnlyBody:
    """Whole numbers from `least`. A single possible value is listed, because the API requires that a range has one step."""
    if value <= least:
        return {"default": str(value), "validValues": [str(value)]}
    return {"default": str(default), "validRange": {"min": str(least), "step": "1"}}


def _device(device: Device, shown: PublishedDevice, taints: Iterable[Taint], driver: str) -> ReadOnlyBody:
    body: dict[str, object] = {
        "name": device.ref.device,
        "attributes": _attributes(device.offer, shown),
        "capacity": _capacity(shown),
    }
    if shown.policies is not None:
        body["allowMultipleAllocations"] = True
    if shown.consumed:
        body["consumesCounters"] = [{"counterSet": COUNTER_SET, "counters": _values(shown.consumed)}]
    marks = [{"key": f"{driver}/{taint.key}", "value": taint.value, "effect": taint.effect} for taint in sorted(taints)]
    if marks:
        body["taints"] = marks
    return body


def _attributes(offer: Offer, shown: PublishedDevice) -> ReadOnlyBody:
    """NVIDIA's names if they exist. Whole cards have their own UUID as `parentUUID`, so it groups all devices of a card."""
    gpu = offer.gpu
    found: dict[str, ReadOnlyBody] = {
        "architecture": _text(gpu.architecture),
        "cudaComputeCapability": _version(gpu.compute_capability),
        "cudaDriverVersion": _version(gpu.cuda_version),
        "driverVersion": _version(gpu.driver_version),
        "index": {"int": gpu.index},
        "memoryEnforcement": _text(share.enforcement(offer.sharing)),
        "parentUUID": _text(gpu.uuid),
        "productName": _text(gpu.product),
        "profile": _text(shown.profile),
        "timeSliceInterval": _text(shown.interval),
        "type": _text(share.mode(offer.sharing, offer.slot)),
        "uuid": _text(shown.uuid),
        "resource.kubernetes.io/pciBusID": _text(gpu.bus_id),
    }
    if gpu.pcie_root is not None:
        found["resource.kubernetes.io/pcieRoot"] = _text(gpu.pcie_root)
    if gpu.numa_node is not None and gpu.numa_node >= 0:
        found["resource.kubernetes.io/numaNode"] = {"int": gpu.numa_node}
    return found


def _capacity(shown: PublishedDevice) -> ReadOnlyBody:
    """Memory, the capacities that shares divide, and the engine counts by NVIDIA's names (KEP-4815)."""
    engines = shown.engines
    found = {"memory": {"value": quantity.mebibytes(shown.memory_mib)}} | _values(
        {
            "clients": shown.clients,
            "copyEngines": engines.copy_engines if engines else 0,
            "decoders": engines.decoders if engines else 0,
            "encoders": engines.encoders if engines else 0,
            "jpegEngines": engines.jpegs if engines else 0,
            "multiprocessors": engines.multiprocessors if engines else 0,
            "ofaEngines": engines.ofas if engines else 0,
            "shares": shown.shares,
            "smPercent": shown.sm_percent,
        }
    )
    if shown.policies is None:
        return found
    return {name: {**value, "requestPolicy": shown.policies.get(name, _NOTHING)} for name, value in found.items()}


def _text(value: str) -> ReadOnlyBody:
    """As many whole characters as the API accepts. The API counts bytes (DRA contract, C9)."""
    return {"string": value.encode("utf-8", "replace")[:_TEXT].decode("utf-8", "ignore")}


def _version(value: str) -> ReadOnlyBody:
    """Strict semver of three numbers. The API refuses "580.65.06", because of the leading zero."""
    numbers = [str(int(part)) for part in re.findall(r"\d+", value)]
    return {"version": ".".join([*numbers, "0", "0", "0"][:3])}
