"""A stand-in for the scheduler's allocator: the first fit, found in the same way as in Kubernetes 1.37.

Like the real one (`k8s.io/dynamic-resource-allocation/structured`, variant "incubating"): the order of pools, slices and
devices; no scoring; combinations, never permutations, within a request; counters charged once per device, not per share;
capacity charged per share, rounded by its policy. Left out: CEL (predicates replace it), constraints, binding conditions,
node selectors of slices, several claims in one search.

Pure: dicts in, dict out.
"""

from __future__ import annotations

import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, NamedTuple

from gpuslice.core.json import ReadOnlyBody
from gpuslice.standin.capacity import charged, exact, spelled, whole

Where = Mapping[str, str | int | bool] | Callable[[ReadOnlyBody], bool]


class SelectorError(Exception):
    """A selector names something that a device does not have. In the real scheduler this CEL error fails the whole pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a claim.

    where: the wanted device, by attribute or capacity name: a value for "equal", text such as ">=9Gi" for "at
      least"; or a function of the device. Devices of other drivers than `driver` are skipped ("" skips none).
    count: None for "All". capacity: name → quantity. alternatives: `firstAvailable`, in order; then nothing else counts.
    """

    name: str
    driver: str = ""
    where: Where = field(default_factory=dict)
    count: int | None = 1
    capacity: Mapping[str, str] = field(default_factory=dict)
    admin: bool = False
    tolerations: Sequence[ReadOnlyBody] = ()
    alternatives: tuple[Request, ...] = ()

    def body(self) -> dict[str, Any]:
        """The request in a ResourceClaim, without its selectors."""
        if self.alternatives:
            options = [{"name": one.name, **one.body()["exactly"]} for one in self.alternatives]
            return {"name": self.name, "firstAvailable": options}
        asked = {"capacity": {"requests": dict(self.capacity)}} if self.capacity else {}
        return {"name": self.name, "exactly": asked}


class DeviceId(NamedTuple):
    driver: str
    pool: str
    device: str


@dataclass(frozen=True, slots=True)
class _Device:
    id: DeviceId
    body: ReadOnlyBody

    @property
    def shared(self) -> bool:
        return bool(self.body.get("allowMultipleAllocations", False))


@dataclass(frozen=True, slots=True)
class _Pick:
    request: Request
    device: _Device
    consumed: Mapping[str, Decimal]


@dataclass(frozen=True, slots=True)
class _Allocated:
    """What the claims hold: exclusive devices, shared devices, and the used capacity of shared devices."""

    exclusive: frozenset[DeviceId]
    consumed: Mapping[DeviceId, Mapping[str, Decimal]]  # its keys are the shared devices

    @classmethod
    def of(cls, claims: Iterable[ReadOnlyBody]) -> _Allocated:
        exclusive: set[DeviceId] = set()
        consumed: dict[DeviceId, dict[str, Decimal]] = {}
        allocations = ((claim.get("status") or {}).get("allocation") or {} for claim in claims)
        for result in (entry for body in allocations for entry in body.get("devices", {}).get("results", [])):
            device = DeviceId(result["driver"], result["pool"], result["device"])
            if "shareID" in result:
                used = consumed.setdefault(device, {})
                for name, text in result.get("consumedCapacity", {}).items():
                    used[name] = used.get(name, Decimal(0)) + exact(text)
            elif not result.get("adminAccess"):
                exclusive.add(device)
        return cls(frozenset(exclusive), consumed)

    def __contains__(self, device: DeviceId) -> bool:
        return device in self.exclusive or device in self.consumed


def allocate(
    slices: Iterable[ReadOnlyBody],
    claims: Iterable[ReadOnlyBody],
    requests: Sequence[Request],
    *,
    node: str,
    configs: Sequence[ReadOnlyBody] = (),
    new_share_id: Callable[[], str] = lambda: str(uuid.uuid4()),
    fractional: bool = False,
) -> dict[str, Any] | None:
    """`status.allocation` of a ResourceClaim (resource.k8s.io/v1) with these requests on this node. None if nothing fits.

    slices: ResourceSlices of the cluster. claims: all ResourceClaims; their allocations are in use.
    configs: entries of `devices.config`, already with their source. SelectorError for an absent attribute.
    fractional: the gate DRAFractionalCapacityRange is on. CapacityError for a request with more than three decimals.
    """
    search = _Search(_pools(slices, node), _Allocated.of(claims), fractional=fractional)
    picks = search.first(requests, ())
    if picks is None:
        return None
    term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
    results = [_result(pick, new_share_id) for pick in picks]
    devices = {"results": results} | ({"config": list(configs)} if configs else {})
    return {"devices": devices, "nodeSelector": {"nodeSelectorTerms": [term]}}


def _result(pick: _Pick, new_share_id: Callable[[], str]) -> dict[str, Any]:
    driver, pool, device = pick.device.id
    result: dict[str, Any] = {"request": pick.request.name, "driver": driver, "pool": pool, "device": device}
    if pick.request.admin:
        result["adminAccess"] = True
    if pick.request.tolerations:
        result["tolerations"] = list(pick.request.tolerations)
    if pick.device.shared:
        result["shareID"] = new_share_id()
        result["consumedCapacity"] = {name: spelled(value) for name, value in pick.consumed.items()}
    return result


# ---------------------------------------------------------------- pools


class _Pool(NamedTuple):
    devices: tuple[_Device, ...]
    counters: Mapping[tuple[str, str], int]  # (counter set, counter) → value


def _pools(slices: Iterable[ReadOnlyBody], node: str) -> dict[tuple[str, str], _Pool]:
    """Complete and valid pools in the order of the scheduler's search."""
    by_name: defaultdict[tuple[str, str], list[ReadOnlyBody]] = defaultdict(list)
    for body in slices:
        by_name[body["spec"]["driver"], body["spec"]["pool"]["name"]].append(body)
    found = {name: _pool(name, by_name[name], node) for name in sorted(by_name)}
    return {name: pool for name, pool in found.items() if pool is not None}


def _pool(name: tuple[str, str], slices: Sequence[ReadOnlyBody], node: str) -> _Pool | None:
    newest = max(body["spec"]["pool"]["generation"] for body in slices)
    specs = [
        body["spec"]
        for body in sorted(slices, key=lambda body: str(body["metadata"]["name"]))
        if body["spec"]["pool"]["generation"] == newest
        and (body["spec"].get("nodeName") == node or body["spec"].get("allNodes"))
    ]
    if not specs or len(specs) < specs[0]["pool"]["resourceSliceCount"]:
        return None
    counters = {
        (counter_set["name"], counter): whole(value["value"])
        for spec in specs
        for counter_set in spec.get("sharedCounters", [])
        for counter, value in counter_set["counters"].items()
    }
    devices = tuple(_Device(DeviceId(*name, body["name"]), body) for spec in specs for body in spec.get("devices", []))
    names = {device.id for device in devices}
    dangling = any(counter not in counters for device in devices for counter in _needs(device))
    return None if dangling or len(names) != len(devices) else _Pool(devices, counters)


def _needs(device: _Device) -> dict[tuple[str, str], int]:
    return {
        (entry["counterSet"], counter): whole(value["value"])
        for entry in device.body.get("consumesCounters", [])
        for counter, value in entry["counters"].items()
    }


# ---------------------------------------------------------------- the search


class _Search:
    """Depth first over requests and devices. A partial solution is the tuple of its picks."""

    def __init__(
        self, pools: Mapping[tuple[str, str], _Pool], allocated: _Allocated, *, fractional: bool = False
    ) -> None:
        self._fractional = fractional
        self._devices = [device for pool in pools.values() for device in pool.devices]
        self._allocated = allocated
        self._free = {name: self._remaining(pool) for name, pool in pools.items()}

    def _remaining(self, pool: _Pool) -> Counter[tuple[str, str]]:
        """The pool's counters without those of its allocated devices: once per device, for any number of shares."""
        left = Counter(pool.counters)
        for device in pool.devices:
            if device.id in self._allocated:
                left.subtract(_needs(device))
        return left

    def first(self, requests: Sequence[Request], picks: tuple[_Pick, ...]) -> tuple[_Pick, ...] | None:
        if not requests:
            return picks
        for chosen in self._choices(requests[0], picks):
            if (found := self.first(requests[1:], picks + chosen)) is not None:
                return found
        return None

    def _choices(self, request: Request, picks: tuple[_Pick, ...]) -> Iterator[tuple[_Pick, ...]]:
        """Every way to serve one request in addition to the picks, in the scheduler's order."""
        if request.alternatives:
            for option in request.alternatives:
                yield from self._choices(replace(option, name=f"{request.name}/{option.name}"), picks)
            return
        fitting = [device for device in self._devices if _matches(request, device)]
        if fitting:
            yield from self._combinations(request, fitting, request.count or len(fitting), picks)

    def _combinations(
        self, request: Request, devices: Sequence[_Device], count: int, picks: tuple[_Pick, ...]
    ) -> Iterator[tuple[_Pick, ...]]:
        """Never the same device twice, because two shares of one device do not serve `count: 2`."""
        if count == 0:
            yield ()
            return
        for at in range(len(devices) - count + 1):
            pick = self._pick(request, devices[at], picks)
            if pick is not None:
                for more in self._combinations(request, devices[at + 1 :], count - 1, (*picks, pick)):
                    yield (pick, *more)

    def _pick(self, request: Request, device: _Device, picks: tuple[_Pick, ...]) -> _Pick | None:
        """The checks of one candidate against the devices that claims hold and those that this solution has picked."""
        beside = [pick for pick in picks if pick.device.id == device.id]
        if not request.admin and not self._available(device, beside):
            return None
        consumed = self._consumed(request, device, beside)
        if consumed is None or not self._counters_allow(device, beside, picks) or _tainted(request, device):
            return None
        return _Pick(request, device, consumed)

    def _available(self, device: _Device, beside: Sequence[_Pick]) -> bool:
        if device.shared:
            return device.id not in self._allocated.exclusive
        return device.id not in self._allocated and all(pick.request.admin for pick in beside)

    def _counters_allow(self, device: _Device, beside: Sequence[_Pick], picks: tuple[_Pick, ...]) -> bool:
        """Admin access is charged too, by a defect of the real scheduler (kubernetes #140729) that drivers must tolerate."""
        if device.shared and (beside or device.id in self._allocated.consumed):
            return True
        name = device.id[:2]
        left = Counter(self._free[name])
        for other in {pick.device.id: pick.device for pick in picks if pick.device.id[:2] == name}.values():
            if other.id not in self._allocated:
                left.subtract(_needs(other))
        return all(left[counter] >= value for counter, value in _needs(device).items())

    def _consumed(self, request: Request, device: _Device, beside: Sequence[_Pick]) -> dict[str, Decimal] | None:
        """The part of each capacity that this share takes: none of an exclusive device. None if there is not enough."""
        capacity: ReadOnlyBody = device.body.get("capacity", {})
        if request.capacity.keys() - capacity.keys():
            return None
        if not device.shared:
            enough = all(exact(capacity[name]["value"]) >= exact(text) for name, text in request.capacity.items())
            return {} if enough else None
        # All of them first, because a CapacityError ends everything, even if another capacity does not fit.
        taken = {
            name: charged(request.capacity.get(name), entry, fractional=self._fractional)
            for name, entry in capacity.items()
        }
        consumed = {name: value for name, value in taken.items() if value is not None}
        used = self._allocated.consumed.get(device.id, {})
        for name, value in consumed.items():
            before = used.get(name, Decimal(0)) + sum(pick.consumed[name] for pick in beside)
            if before + value > exact(capacity[name]["value"]):
                return None
        return consumed if len(consumed) == len(taken) else None


def _tainted(request: Request, device: _Device) -> bool:
    taints = (taint for taint in device.body.get("taints", []) if taint["effect"] in ("NoSchedule", "NoExecute"))
    return any(not any(_tolerates(t, taint) for t in request.tolerations) for taint in taints)


def _tolerates(toleration: ReadOnlyBody, taint: ReadOnlyBody) -> bool:
    if toleration.get("effect") not in (None, "", taint["effect"]):
        return False
    if toleration.get("operator", "Equal") == "Exists":
        return toleration.get("key") in (None, "", taint["key"])
    return bool(toleration.get("key") == taint["key"] and toleration.get("value", "") == taint.get("value", ""))


# ---------------------------------------------------------------- predicates


def _matches(request: Request, device: _Device) -> bool:
    if request.driver not in ("", device.id.driver):
        return False
    if callable(request.where):
        return request.where(device.body)
    return all(_holds(device, name, wanted) for name, wanted in request.where.items())


def _holds(device: _Device, name: str, wanted: str | int | bool) -> bool:
    value = _value(device, name)
    if isinstance(wanted, str) and wanted.startswith(">="):
        return whole(str(value)) >= whole(wanted[2:].strip())
    return type(value) is type(wanted) and value == wanted  # True does not equal 1 here


def _value(device: _Device, name: str) -> object:
    """An attribute, or the text of a capacity. Names without a domain belong to the driver."""
    for key in (name, f"{device.id.driver}/{name}"):
        if key in device.body.get("attributes", {}):
            return next(iter(device.body["attributes"][key].values()))
        if key in device.body.get("capacity", {}):
            return device.body["capacity"][key]["value"]
    raise SelectorError(
        f"device {'/'.join(device.id)} has no attribute or capacity {name}; a selector must guard against it"
    )
