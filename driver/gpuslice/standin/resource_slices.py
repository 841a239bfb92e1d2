"""What an API server does to a ResourceSlice before it stores it: it drops fields of disabled gates, and checks rules.

Written from the API's rules (resource.k8s.io/v1 types and validation, Kubernetes 1.37), and on purpose without the
driver's own checks. So tests can compare the two.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from gpuslice.core.json import Body
from gpuslice.standin.store import now_text

PARTITIONABLE = "DRAPartitionableDevices"
CONSUMABLE = "DRAConsumableCapacity"
TAINTS = "DRADeviceTaints"

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,31}")
_TAINT_NAME = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
_TAINT_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_QUANTITY = re.compile(r"([+-]?[0-9]+(?:\.[0-9]*)?|[+-]?\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}

_MOST, _LEAST = Decimal(2**63 - 1), Decimal("1e-9")
_POWERS = 1000  # a larger exponent makes no difference, because nobody writes so many digits
_LONGEST_EXPONENT = 20  # characters; a longer one does not fit int64

_SPEC = {
    "driver",
    "pool",
    "nodeName",
    "nodeSelector",
    "allNodes",
    "devices",
    "perDeviceNodeSelection",
    "sharedCounters",
}
_DEVICE = {
    *("name", "attributes", "capacity", "consumesCounters", "nodeName", "nodeSelector", "allNodes", "taints"),
    *("bindsToNode", "bindingConditions", "bindingFailureConditions", "allowMultipleAllocations"),
}


def gates(version: str) -> frozenset[str]:
    """The gates that are on by default in an API server of this minor version (KEPs 4815, 5055, 5075)."""
    minor = int(version.split(".")[1])
    return frozenset({PARTITIONABLE, CONSUMABLE, TAINTS} if minor >= 36 else ())


def accepted(body: Body, old: Body | None, on: frozenset[str]) -> Body:
    """The stored form of the body. A disabled gate keeps fields that the old object already uses."""
    spec = {k: v for k, v in body.get("spec", {}).items() if k in _SPEC and v not in (None, [], {})}
    before = (old or {}).get("spec", {})
    devices = [
        {k: v for k, v in d.items() if k in _DEVICE and v not in (None, [], {})} for d in spec.get("devices", [])
    ]
    if PARTITIONABLE not in on and not _partitions(before):
        spec.pop("sharedCounters", None)
        spec.pop("perDeviceNodeSelection", None)
        devices = [_without(d, "consumesCounters", "nodeName", "nodeSelector", "allNodes") for d in devices]
    if CONSUMABLE not in on and not any("allowMultipleAllocations" in d for d in before.get("devices", ())):
        devices = [_unshared(d) for d in devices]
    if TAINTS not in on and not any("taints" in d for d in before.get("devices", ())):
        devices = [_without(d, "taints") for d in devices]
    if devices:
        spec["devices"] = [_dated(_quantities(d)) for d in devices]
    if "sharedCounters" in spec:
        spec["sharedCounters"] = [_quantities(counter_set) for counter_set in spec["sharedCounters"]]
    return body | {"spec": spec}


def _partitions(spec: Body) -> bool:
    return "sharedCounters" in spec or any("consumesCounters" in d for d in spec.get("devices", ()))


def _without(body: Body, *keys: str) -> Body:
    return {k: v for k, v in body.items() if k not in keys}


def _unshared(device: Body) -> Body:
    device = _without(device, "allowMultipleAllocations")
    if "capacity" in device:
        device["capacity"] = {k: _without(v, "requestPolicy") for k, v in device["capacity"].items()}
    return device


def _dated(device: Body) -> Body:
    if "taints" in device:
        device["taints"] = [
            {"timeAdded": now_text()} | {k: v for k, v in taint.items() if v not in (None, "")}
            for taint in device["taints"]
        ]
    return device


def _quantities(node: Any, inside: str = "") -> Any:
    """The same object with every quantity in its canonical form: the server answers 2Gi if a client sent 2048Mi."""
    if isinstance(node, dict):
        if inside in ("attributes", "taints"):
            return node
        return {k: _quantities(v, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_quantities(v, inside) for v in node]
    return canonical(node) if inside in ("value", "default", "min", "max", "step", "validValues") else node


def canonical(text: str) -> str:
    """A quantity in the form of apimachinery. Other text stays as it is, and the rules refuse it."""
    value = amount(text)
    if value is None:
        return text
    if text.endswith("i") and abs(value) >= 1024 and value == int(value):
        power = next(p for p in range(6, -1, -1) if int(value) % 1024**p == 0)
        return f"{int(value) // 1024**power}{_BINARY[power]}"
    for unit, power in reversed(_DECIMAL.items()):
        scaled = value.scaleb(-power)
        if scaled == int(scaled) and (value or not unit):
            return f"{int(scaled)}{unit}"
    return text


def amount(text: object) -> Decimal | None:
    """The value of a quantity. None if the text is not a quantity."""
    parsed = _QUANTITY.fullmatch(str(text))
    if parsed is None or len(parsed[2] or "") > _LONGEST_EXPONENT:
        return None
    number, suffix = Decimal(parsed[1]), parsed[2] or ""
    if suffix in _BINARY[1:]:
        value = number * Decimal(1024) ** _BINARY.index(suffix)
    else:
        power = _DECIMAL[suffix] if suffix in _DECIMAL else int(suffix[1:])
        value = number.scaleb(max(-_POWERS, min(power, _POWERS)))
    if 0 < abs(value) < _LEAST:
        return _LEAST.copy_sign(value)
    return min(abs(value), _MOST).copy_sign(value)


def faults(body: Body, old: Body | None) -> list[str]:
    """Everything that is wrong with the body, as one `field: what` per fault, like the causes of a 422."""
    return list(_faults(body["spec"], (old or {}).get("spec")))


def _faults(spec: Body, old: Body | None) -> Iterator[str]:
    pool, devices, sets = spec.get("pool") or {}, spec.get("devices", []), spec.get("sharedCounters", [])
    if not _is(_SUBDOMAIN, spec.get("driver"), 63):
        yield f"spec.driver: Invalid value: {spec.get('driver')!r}: must be a DNS subdomain of at most 63 characters"
    name = pool.get("name", "")
    if not 0 < len(name) <= 253 or not all(_is(_SUBDOMAIN, part, 253) for part in name.split("/")):
        yield f"spec.pool.name: Invalid value: {name!r}: must be DNS subdomains separated by slashes, at most 253"
    if pool.get("generation", 0) < 0:
        yield "spec.pool.generation: Invalid value: must be greater than or equal to 0"
    if pool.get("resourceSliceCount", 0) < 1:
        yield "spec.pool.resourceSliceCount: Invalid value: must be greater than 0"
    if sum(1 for k in ("nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection") if spec.get(k)) != 1:
        yield "spec: Invalid value: exactly one of nodeName, nodeSelector, allNodes, perDeviceNodeSelection is required"
    if devices and sets:
        yield "spec: Invalid value: only one of devices and sharedCounters may be set"
    for field, new, was in (
        ("driver", spec.get("driver"), (old or spec).get("driver")),
        ("pool.name", name, (old or spec)["pool"]["name"] if "pool" in (old or spec) else name),
        ("nodeName", spec.get("nodeName"), (old or spec).get("nodeName")),
    ):
        if new != was:
            yield f"spec.{field}: Invalid value: {new!r}: field is immutable"
    yield from _device_faults(devices)
    yield from _set_faults(sets)


def _device_faults(devices: list[Body]) -> Iterator[str]:
    limit = 64 if any("taints" in d or "consumesCounters" in d for d in devices) else 128
    if len(devices) > limit:
        yield f"spec.devices: Too many: {len(devices)}: must have at most {limit} items"
    names = [d.get("name") for d in devices]
    for index, device in enumerate(devices):
        at = f"spec.devices[{index}]"
        if not _is(_LABEL, device.get("name"), 63):
            yield f"{at}.name: Invalid value: {device.get('name')!r}: must be a DNS label"
        if device.get("name") in names[:index]:
            yield f"{at}.name: Duplicate value: {device.get('name')!r}"
        attributes, capacity = device.get("attributes", {}), device.get("capacity", {})
        if len(attributes) + len(capacity) > 32:
            yield f"{at}: Invalid value: the total number of attributes and capacities must not exceed 32"
        for key, value in attributes.items():
            yield from _attribute_faults(f"{at}.attributes[{key}]", key, value)
        for key, value in capacity.items():
            yield from _capacity_faults(
                f"{at}.capacity[{key}]", key, value, bool(device.get("allowMultipleAllocations"))
            )
        yield from _consumption_faults(f"{at}.consumesCounters", device.get("consumesCounters", []))
        yield from _taint_faults(f"{at}.taints", device.get("taints", []))


def _attribute_faults(at: str, key: str, value: Body) -> Iterator[str]:
    yield from _key_faults(at, key)
    if len(value) != 1 or next(iter(value)) not in ("int", "bool", "string", "version"):
        yield f"{at}: Invalid value: exactly one of int, bool, string, version must be set"
    elif isinstance(text := next(iter(value.values())), str) and len(text.encode()) > 64:
        yield f"{at}: Too long: may not be more than 64 bytes"


def _key_faults(at: str, key: str) -> Iterator[str]:
    domain, _, name = key.rpartition("/")
    if not _IDENTIFIER.fullmatch(name) or (domain and not _is(_SUBDOMAIN, domain, 63)):
        yield f"{at}: Invalid value: {key!r}: must be a C identifier of at most 32, optionally with a domain of 63"


def _capacity_faults(at: str, key: str, capacity: Body, shared: bool) -> Iterator[str]:
    yield from _key_faults(at, key)
    value = amount(capacity.get("value"))
    if value is None:
        yield f"{at}.value: Invalid value: {capacity.get('value')!r}: must be a quantity"
        return
    policy = capacity.get("requestPolicy")
    if policy is None:
        return
    if not shared:
        yield f"{at}.requestPolicy: Forbidden: allowMultipleAllocations must be true to use it"
    default, bounds = amount(policy.get("default")), policy.get("validRange")
    if default is None:
        yield f"{at}.requestPolicy.default: Required value: needed with a request policy"
    elif bounds is not None:
        yield from _range_faults(f"{at}.requestPolicy.validRange", bounds, default, value)
    elif values := [amount(v) for v in policy.get("validValues", [])]:
        ascending = values == sorted(v for v in values if v is not None)
        if len(values) > 10 or default not in values or not ascending:
            yield f"{at}.requestPolicy.validValues: Invalid value: at most 10, ascending, with the default among them"


def _range_faults(at: str, bounds: Body, default: Decimal, value: Decimal) -> Iterator[str]:
    low, high, step = amount(bounds.get("min")), amount(bounds.get("max")), amount(bounds.get("step"))
    if low is None:
        yield f"{at}.min: Required value"
        return
    high = value if high is None else high
    if not low <= default <= high or high > value:
        yield f"{at}: Invalid value: min <= default <= max <= value does not hold"
    if step is not None and (step <= 0 or low + step > value):
        yield f"{at}.step: Invalid value: must be positive, and min + step at most the value"
    elif step is not None and ((default - low) % step or ("max" in bounds and (high - low) % step)):
        yield f"{at}.step: Invalid value: default and max must be a whole number of steps above min"


def _consumption_faults(at: str, consumptions: list[Body]) -> Iterator[str]:
    if len(consumptions) > 2:
        yield f"{at}: Too many: {len(consumptions)}: must have at most 2 items"
    names = [c.get("counterSet") for c in consumptions]
    if len(set(names)) < len(names):
        yield f"{at}: Duplicate value: each counter set may be named once"
    for index, consumption in enumerate(consumptions):
        yield from _counter_faults(f"{at}[{index}]", consumption.get("counterSet"), consumption.get("counters", {}))


def _set_faults(sets: list[Body]) -> Iterator[str]:
    if len(sets) > 8:
        yield f"spec.sharedCounters: Too many: {len(sets)}: must have at most 8 items"
    names = [s.get("name") for s in sets]
    for index, counter_set in enumerate(sets):
        if counter_set.get("name") in names[:index]:
            yield f"spec.sharedCounters[{index}].name: Duplicate value: {counter_set.get('name')!r}"
        yield from _counter_faults(
            f"spec.sharedCounters[{index}]", counter_set.get("name"), counter_set.get("counters", {})
        )


def _counter_faults(at: str, name: object, counters: Body) -> Iterator[str]:
    if not _is(_LABEL, name, 63):
        yield f"{at}: Invalid value: {name!r}: must be a DNS label"
    if not 0 < len(counters) <= 32:
        yield f"{at}.counters: Invalid value: must have 1 to 32 entries"
    for key, counter in counters.items():
        if not _is(_LABEL, key, 63) or amount(counter.get("value")) is None:
            yield f"{at}.counters[{key}]: Invalid value: must be a DNS label with a quantity"


def _taint_faults(at: str, taints: list[Body]) -> Iterator[str]:
    if len(taints) > 16:
        yield f"{at}: Too many: {len(taints)}: must have at most 16 items"
    for index, taint in enumerate(taints):
        if not _TAINT_NAME.fullmatch(taint.get("key", "")) or not _TAINT_VALUE.fullmatch(taint.get("value", "")):
            yield f"{at}[{index}]: Invalid value: key must be a label name, value a label value"
        if taint.get("effect") not in ("None", "NoSchedule", "NoExecute"):
            yield f"{at}[{index}].effect: Unsupported value: {taint.get('effect')!r}"


def _is(pattern: re.Pattern[str], text: object, longest: int) -> bool:
    return isinstance(text, str) and len(text) <= longest and pattern.fullmatch(text) is not None
