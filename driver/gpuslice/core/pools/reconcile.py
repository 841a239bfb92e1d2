"""The writes that turn the API's ResourceSlices into the wanted ones, by the rules of Kubernetes' own controller.

The order of the writes matters. Consumers read only the highest generation of a pool, and only when it is complete. So
no consumer ever sees half of a new state: first the driver deletes obsolete slices, then it updates the remaining slices
to the new generation, then it adds new slices. A change of a single slice is atomic and keeps the generation
(k8s.io/dynamic-resource-allocation, resourceslicecontroller.go; the DRA contract 4.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuslice.core import quantity
from gpuslice.core.json import Body, ReadOnlyBody
from gpuslice.core.model import RESOURCE_API, PoolName
from gpuslice.core.pools.pool import PoolSlices

PARTITIONABLE = "DRAPartitionableDevices"
CONSUMABLE = "DRAConsumableCapacity"
TAINTS = "DRADeviceTaints"
UNKNOWN = "unknown"
PROBED = ("sharedCounters", "consumesCounters", "allowMultipleAllocations", "requestPolicy", "taints")

_CONTENT = ("devices", "sharedCounters")
# Fields of a slice that the driver never sets. Kubernetes' controller compares the last two as well: with
# skipNodeOperations the kubelet starts pods without calling prepare (1.37, KEP-5945).
_NEVER = ("nodeSelector", "allNodes", "perDeviceNodeSelection", "partitionTypeAttribute", "skipNodeOperations")
_QUANTITIES = frozenset({"value", "default", "min", "max", "step", "validValues"})


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of the slices: this driver on this node. The driver never changes the slices of another owner."""

    driver: str
    node: str
    node_uid: str

    def reference(self) -> Body:
        return {"apiVersion": "v1", "kind": "Node", "name": self.node, "uid": self.node_uid, "controller": True}


@dataclass(frozen=True, slots=True)
class Delete:
    pool: PoolName
    body: Body  # the existing object; the delete succeeds only if it is unchanged


@dataclass(frozen=True, slots=True)
class Update:
    pool: PoolName
    index: int
    body: Body


@dataclass(frozen=True, slots=True)
class Create:
    pool: PoolName
    index: int
    body: Body


Change = Delete | Update | Create


def bodies(pool: PoolSlices) -> tuple[ReadOnlyBody, ...]:
    """At least one body: a pool without devices is one empty slice, which shows that the driver runs."""
    return pool.specs or ({},)


def changes(desired: Sequence[PoolSlices], existing: Sequence[Body], owner: Owner) -> tuple[Change, ...]:
    """The writes, in order within each pool; pools do not depend on each other. Empty when nothing has changed."""
    ours: dict[str, list[Body]] = {}
    for body in existing:
        if body["spec"].get("driver") == owner.driver and body["spec"].get("nodeName") == owner.node:
            ours.setdefault(body["spec"]["pool"]["name"], []).append(body)
    wanted = {pool.name for pool in desired}
    gone = [Delete(PoolName(name), body) for name in sorted(ours) if name not in wanted for body in ours[name]]
    return (*gone, *(change for pool in desired for change in _pool_changes(pool, ours.get(pool.name, []), owner)))


def _pool_changes(wanted: PoolSlices, existing: list[Body], owner: Owner) -> Iterator[Change]:
    current = max((body["spec"]["pool"].get("generation", 0) for body in existing), default=0)
    kept, obsolete = _matched(existing, len(bodies(wanted)), current)
    missing = [index for index in range(len(bodies(wanted))) if index not in kept]
    changed = [index for index, body in kept.items() if _differs(body, wanted, index, owner)]
    generation = current + (1 if missing or len(changed) > 1 else 0)

    yield from (Delete(wanted.name, body) for body in obsolete)
    for index in sorted(kept if generation != current else changed):
        yield Update(wanted.name, index, _updated(kept[index], _spec(wanted, index, generation, owner), owner))
    # Counters before the devices that consume them. If the server drops counters, no device is published yet.
    for index in sorted(missing, key=lambda i: ("sharedCounters" not in bodies(wanted)[i], i)):
        meta = {"generateName": name_base(index, len(bodies(wanted)), owner), "ownerReferences": [owner.reference()]}
        yield Create(wanted.name, index, _object(meta, _spec(wanted, index, generation, owner)))


def _matched(existing: list[Body], count: int, generation: int) -> tuple[dict[int, Body], list[Body]]:
    """Slices by the index in their name, and slices that are outdated, out of range, misnamed or duplicate.

    Of two slices with one index, the older slice stays. So two instances of the driver that both created it agree.
    """
    kept: dict[int, Body] = {}
    obsolete: list[Body] = []
    for body in sorted(existing, key=lambda b: (b["metadata"].get("creationTimestamp", ""), b["metadata"]["name"])):
        index = _index(body["metadata"]["name"], count)
        outdated = body["spec"]["pool"].get("generation", 0) < generation
        if outdated or index is None or index in kept:
            obsolete.append(body)
        else:
            kept[index] = body
    return kept, obsolete


def _width(count: int) -> int:
    return max(5, len(f"{count - 1:x}"))


def _index(name: str, count: int) -> int | None:
    prefix, dash, _ = name.partition("-")
    if not dash or len(prefix) != _width(count) or not set(prefix) <= set("0123456789abcdef"):
        return None
    index = int(prefix, 16)
    return index if index < count else None


def name_base(index: int, count: int, owner: Owner) -> str:
    """The start of the name of the index-th of `count` slices. The index has as many hex digits as the last index needs.

    The index comes first: the API server cuts the base of a generated name at 58 characters.
    """
    return f"{index:0{_width(count)}x}-{owner.driver}-{owner.node}-"


def _spec(wanted: PoolSlices, index: int, generation: int, owner: Owner) -> Body:
    pool = {"name": wanted.name, "generation": generation, "resourceSliceCount": len(bodies(wanted))}
    content = {key: value for key, value in bodies(wanted)[index].items() if key in _CONTENT}
    return {"driver": owner.driver, "nodeName": owner.node, "pool": pool, **content}


def _object(metadata: Body, spec: Body) -> Body:
    return {"apiVersion": RESOURCE_API, "kind": "ResourceSlice", "metadata": metadata, "spec": spec}


def _differs(body: Body, wanted: PoolSlices, index: int, owner: Owner) -> bool:
    spec = body["spec"]
    return (
        spec["pool"].get("resourceSliceCount") != len(bodies(wanted))
        or any(spec.get(key) for key in _NEVER)
        or owner.node_uid
        not in [o.get("uid") for o in body["metadata"].get("ownerReferences") or () if o.get("controller")]
        or not same(spec, bodies(wanted)[index])
    )


def _updated(body: Body, spec: Body, owner: Owner) -> Body:
    """The existing object with a new spec, and with the times at which its taints were added."""
    times = {
        (device["name"], *_taint(taint)): taint["timeAdded"]
        for device in body["spec"].get("devices") or ()
        for taint in device.get("taints") or ()
        if "timeAdded" in taint
    }
    if times and "devices" in spec:
        spec = spec | {"devices": [_dated(device, times) for device in spec["devices"]]}
    return _object(body["metadata"] | {"ownerReferences": [owner.reference()]}, spec)


def _dated(device: Body, times: Mapping[tuple[str, str, str, str], str]) -> Body:
    taints = device.get("taints") or ()
    known = [times.get((device["name"], *_taint(taint))) for taint in taints]
    if not any(known):
        return device
    return device | {"taints": [t | {"timeAdded": at} if at else t for t, at in zip(taints, known, strict=True)]}


def _taint(taint: Body) -> tuple[str, str, str]:
    return taint["key"], taint.get("value", ""), taint["effect"]


# ---------------------------------------------------------------- comparison with the server's answers


def same(one: ReadOnlyBody, other: ReadOnlyBody) -> bool:
    """Whether devices and counters are equal for the API.

    The order of lists matters. The spelling of quantities does not matter (a server answers 2Gi to 2048Mi). Empty fields
    and the times of taints do not matter either, because the server sets and rounds the times.
    """
    # First a plain comparison, because usually both are exactly equal.
    return all(one.get(key) == other.get(key) or _plain(one.get(key)) == _plain(other.get(key)) for key in _CONTENT)


def sharing(sent: ReadOnlyBody, returned: Body) -> Body:
    """The returned body, in which the sent objects replace all returned objects that are equal.

    To keep both costs a megabyte for eight cards (measured).
    """
    spec = returned["spec"]
    return {
        **returned,
        "spec": {**spec, **{key: sent[key] for key in _CONTENT if key in spec and spec[key] == sent.get(key)}},
    }


def _plain(node: Any, key: str = "") -> Any:
    if isinstance(node, Mapping):
        if key == "taint":
            return _taint(dict(node))
        inside = {k: v if k == "attributes" else _plain(v, k) for k, v in node.items()}
        return {k: v for k, v in inside.items() if v not in (None, [], {})} or None
    if isinstance(node, list | tuple):
        return [_plain(item, "taint" if key == "taints" else key) for item in node] or None
    if key in _QUANTITIES and isinstance(node, str):
        try:
            return quantity.parse(node)
        except ValueError:
            return node
    return node


def dropped(sent: ReadOnlyBody, returned: ReadOnlyBody) -> frozenset[str]:
    """The gates that are off in the server: it dropped their fields from a slice's spec. Empty if it kept all fields."""
    if same(sent, returned):
        return frozenset()
    theirs = {device["name"]: device for device in returned.get("devices") or ()}
    pairs = [(device, theirs.get(device["name"], {})) for device in sent.get("devices") or ()]
    lost = {
        PARTITIONABLE: (sent.get("sharedCounters") and not returned.get("sharedCounters"))
        or any(mine.get("consumesCounters") and not kept.get("consumesCounters") for mine, kept in pairs),
        CONSUMABLE: any(_shared(mine) and not _shared(kept) for mine, kept in pairs),
        TAINTS: any(len(mine.get("taints") or ()) > len(kept.get("taints") or ()) for mine, kept in pairs),
    }
    return frozenset(name for name, is_lost in lost.items() if is_lost) or frozenset({UNKNOWN})


def _shared(device: ReadOnlyBody) -> bool:
    policies = ["requestPolicy" in capacity for capacity in (device.get("capacity") or {}).values()]
    return bool(device.get("allowMultipleAllocations")) and (not policies or any(policies))


def probes(driver: str) -> dict[str, tuple[Body, ...]]:
    """Test slices by gate. Only a server with the gate returns all their fields. Only for dry runs."""
    consumption = {"counterSet": "probe", "counters": {"probe": {"value": "1"}}}
    policy = {"default": "1Mi", "validRange": {"min": "1Mi", "step": "1Mi"}}
    shares = {"memory": {"value": "2Mi", "requestPolicy": policy}}
    return {
        PARTITIONABLE: (
            {"sharedCounters": [{"name": "probe", "counters": {"probe": {"value": "1"}}}]},
            {"devices": [{"name": "probe", "consumesCounters": [consumption]}]},
        ),
        CONSUMABLE: ({"devices": [{"name": "probe", "allowMultipleAllocations": True, "capacity": shares}]},),
        TAINTS: ({"devices": [{"name": "probe", "taints": [{"key": f"{driver}/probe", "effect": "NoSchedule"}]}]},),
    }


def probe(driver: str, node: str, content: Body) -> Body:
    """The object for one of the `probes`."""
    owner = Owner(driver, node, "")
    wanted = PoolSlices(PoolName(f"{node}/probe"), (content,))
    return _object({"generateName": name_base(0, 1, owner)}, _spec(wanted, 0, 1, owner))
