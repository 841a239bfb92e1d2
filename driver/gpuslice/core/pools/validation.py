"""The check before each write: finds faults that the API refuses, and faults that it accepts but the scheduler ignores.

It checks all slices of a pool together; no API server does that. If two devices have one name, or a device consumes a
counter that no slice of the pool has, the scheduler ignores the whole pool, without event or log. Figures:
resource.k8s.io/v1 types and validation, Kubernetes 1.37 (the DRA contract 4.1, statements 55, 61, 62).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from gpuslice.core import quantity
from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.pools.pool import PoolSlices

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_POOL = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?([./][a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?/)?[A-Za-z_][A-Za-z0-9_]{0,31}")
_TAINT_KEY = re.compile(r"([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
_TAINT_VALUE = re.compile(r"([A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?)?")
_VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)([-+][-+.0-9A-Za-z]+)?")
_LISTS = frozenset({"ints", "bools", "strings", "versions"})


def problems(pool: PoolSlices) -> tuple[str, ...]:
    """Every fault of the slices of a pool, one sentence each. Empty if the pool may be sent."""
    return tuple(f"pool {pool.name}: {fault}" for fault in _faults(pool))


def _faults(pool: PoolSlices) -> Iterator[str]:
    if len(pool.name) > 253 or not _POOL.fullmatch(pool.name):
        yield "its name must be DNS subdomains separated by slashes, at most 253 characters"
    sets = [s for spec in pool.specs for s in _list(spec, "sharedCounters")]
    devices = [d for spec in pool.specs for d in _list(spec, "devices")]
    yield from (f"counter set {name} occurs {n} times" for name, n in _repeated(s["name"] for s in sets))
    yield from (f"device {name} occurs {n} times" for name, n in _repeated(d["name"] for d in devices))
    for index, spec in enumerate(pool.specs):
        yield from _slice_faults(f"slice {index}", spec)
    counters = {(s["name"], counter) for s in sets for counter in s["counters"]}
    for device in devices:
        yield from (f"device {device['name']}: {fault}" for fault in _device_faults(device))
        for used in _consumed(device) - counters:
            yield f"device {device['name']} draws on {'/'.join(used)}, which no slice of the pool has"


def _slice_faults(at: str, spec: ReadOnlyBody) -> Iterator[str]:
    devices, sets = _list(spec, "devices"), _list(spec, "sharedCounters")
    if devices and sets:
        yield f"{at} has both devices and counters; put them into slices of their own"
    most = 64 if any(_is_costly(device) for device in devices) else 128
    if len(devices) > most:
        yield f"{at} has {len(devices)} devices, at most {most} are allowed; spread them over more slices"
    if len(sets) > 8:
        yield f"{at} has {len(sets)} counter sets, at most 8 are allowed"
    for counter_set in sets:
        yield from _counter_faults(f"counter set {counter_set['name']}", counter_set["name"], counter_set["counters"])


def _is_costly(device: ReadOnlyBody) -> bool:
    lists = any(_LISTS & set(value) for value in (device.get("attributes") or {}).values())
    return bool(device.get("taints") or device.get("consumesCounters") or lists)


def _device_faults(device: ReadOnlyBody) -> Iterator[str]:
    if not _LABEL.fullmatch(device["name"]):
        yield "its name is not a DNS label of at most 63 characters"
    attributes, capacity = device.get("attributes") or {}, device.get("capacity") or {}
    if len(attributes) + len(capacity) > 32:
        yield f"it has {len(attributes) + len(capacity)} attributes and capacities, at most 32 are allowed"
    values = [v for value in attributes.values() for v in _values(value)]
    if len(values) > 48:
        yield f"it has {len(values)} attribute values, at most 48 are allowed"
    yield from (
        f"key {key} is not a C identifier of at most 32 characters"
        for key in (*attributes, *capacity)
        if not _KEY.fullmatch(key)
    )
    for key, value in attributes.items():
        if len(value) != 1:
            yield f"attribute {key} needs exactly one value"
        if any(isinstance(v, str) and len(v.encode()) > 64 for v in _values(value)):
            yield f"attribute {key} is longer than 64 bytes"
        if "version" in value and not _VERSION.fullmatch(str(value["version"])):
            yield f"attribute {key} is {value['version']!r}, which is not a semantic version"
    if device.get("allowMultipleAllocations") and not capacity:
        yield "a shared device needs a capacity, or its counters are charged for each share"
    for key, value in capacity.items():
        yield from (f"capacity {key}: {fault}" for fault in _capacity_faults(value, device))
    yield from _use_faults(_list(device, "consumesCounters"))
    yield from _taint_faults(_list(device, "taints"))


def _capacity_faults(capacity: ReadOnlyBody, device: ReadOnlyBody) -> Iterator[str]:
    value, policy = _amount(capacity.get("value")), capacity.get("requestPolicy")
    if value is None:
        yield f"{capacity.get('value')!r} is not a quantity"
    if not device.get("allowMultipleAllocations"):
        if policy:
            yield "a request policy needs allowMultipleAllocations"
        return
    if not policy:
        # The API accepts it; each share would then take the whole capacity.
        yield "a shared device needs a request policy for each capacity"
    elif value is not None:
        yield from _policy_faults(policy, value)


def _policy_faults(policy: ReadOnlyBody, value: int) -> Iterator[str]:
    default, bounds = _amount(policy.get("default")), policy.get("validRange")
    if default is None:
        yield "its request policy needs a default"
        return
    if bounds and policy.get("validValues"):
        yield "its request policy has a range and values; keep one of them"
    if bounds:
        low, high, step = (_amount(bounds.get(key)) for key in ("min", "max", "step"))
        if low is None or not low <= default <= (value if high is None else high) <= value:
            yield "its request policy breaks min <= default <= max <= value"
        elif step is not None and (
            step < 1 or low + step > value or (default - low) % step or ((high or low) - low) % step
        ):
            yield "its request policy's step does not lead from min to default and max within the value"
    elif values := [_amount(v) for v in policy.get("validValues") or ()]:
        known = [v for v in values if v is not None]
        ordered = len(known) == len(values) <= 10 and known == sorted(known) and known[-1] <= value
        if not ordered or default not in known:
            yield "its request policy needs at most 10 valid values, ascending up to the value, the default among them"


def _use_faults(uses: list[ReadOnlyBody]) -> Iterator[str]:
    if len(uses) > 2:
        yield f"it draws on {len(uses)} counter sets, at most 2 are allowed"
    yield from (f"it names counter set {name} {n} times" for name, n in _repeated(use["counterSet"] for use in uses))
    for use in uses:
        yield from _counter_faults(f"counter set {use['counterSet']}", use["counterSet"], use["counters"])


def _counter_faults(at: str, name: str, counters: ReadOnlyBody) -> Iterator[str]:
    if not 0 < len(counters) <= 32:
        yield f"{at} has {len(counters)} counters, 1 to 32 are allowed"
    wrong = [text for text in (name, *counters) if not _LABEL.fullmatch(text)]
    yield from (f"{at}: {text!r} is not a DNS label" for text in wrong)
    yield from (
        f"{at}: {key} has no quantity" for key, value in counters.items() if _amount(value.get("value")) is None
    )


def _taint_faults(taints: list[ReadOnlyBody]) -> Iterator[str]:
    if len(taints) > 16:
        yield f"it has {len(taints)} taints, at most 16 are allowed"
    for taint in taints:
        if not _TAINT_KEY.fullmatch(taint["key"]) or not _TAINT_VALUE.fullmatch(taint.get("value", "")):
            yield f"taint {taint['key']}={taint.get('value', '')} is not a label"
        if taint["effect"] not in ("None", "NoSchedule", "NoExecute"):
            yield f"taint {taint['key']} has the unknown effect {taint['effect']}"


def _consumed(device: ReadOnlyBody) -> set[tuple[str, str]]:
    return {(use["counterSet"], counter) for use in _list(device, "consumesCounters") for counter in use["counters"]}


def _list(body: ReadOnlyBody, key: str) -> list[ReadOnlyBody]:
    return list(body.get(key) or ())


def _values(attribute: ReadOnlyBody) -> list[object]:
    return [v for value in attribute.values() for v in (value if isinstance(value, list | tuple) else [value])]


def _repeated(names: Iterable[str]) -> list[tuple[str, int]]:
    return [(name, count) for name, count in Counter(names).items() if count > 1]


def _amount(text: object) -> int | None:
    try:
        return quantity.parse(str(text))
    except ValueError:
        return None
