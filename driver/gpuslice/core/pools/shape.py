"""The shape of a published pool: its devices and the counters that each device consumes.

The scheduler computes the use of a pool from the devices that are published *now*. If an allocated device vanishes or its
counters change, the scheduler frees them and allocates the device twice (kubernetes/kubernetes#140802). So a pool changes
its shape only when no claim holds a device of it. Attributes and taints may change, and devices may be added, at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from gpuslice.core import claims
from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.model import PoolName
from gpuslice.core.pools.pool import PoolSlices

TAINT = "shape-change"
_COST = ("consumesCounters", "allowMultipleAllocations")


def allows(kept: PoolSlices, wanted: PoolSlices) -> bool:
    """Whether `wanted` may replace `kept` while claims hold devices of it."""
    if kept is wanted:
        return True
    new = _costs(wanted)
    return all(new.get(name) == cost for name, cost in _costs(kept).items()) and _counters(kept) == _counters(wanted)


def same(one: PoolSlices, other: PoolSlices) -> bool:
    """Whether two states of a pool have the same shape."""
    return one is other or (_counters(one) == _counters(other) and _costs(one) == _costs(other))


def cordoned(kept: PoolSlices, driver: str) -> PoolSlices:
    """The old shape with a taint on every device, so that the scheduler allocates no device until all claims have left."""
    taint = {"key": f"{driver}/{TAINT}", "value": "pending", "effect": "NoSchedule"}
    return PoolSlices(
        kept.name,
        tuple(
            {**spec, "devices": [{**device, "taints": [taint]} for device in spec["devices"]]}
            if "devices" in spec
            else spec
            for spec in kept.specs
        ),
    )


def pools_of(bodies: Iterable[ReadOnlyBody], driver: str) -> Iterator[PoolName]:
    """Pools of this driver from which any of these ResourceClaims holds a device."""
    for body in bodies:
        for result in claims.results(body, driver):
            if isinstance(pool := result.get("pool"), str):
                yield PoolName(pool)


def published(bodies: Iterable[ReadOnlyBody]) -> dict[PoolName, PoolSlices]:
    """The pools of these ResourceSlices, the newest generation of each pool."""
    found: dict[PoolName, tuple[int, list[ReadOnlyBody]]] = {}
    for body in bodies:
        spec = body["spec"]
        name, generation = PoolName(spec["pool"]["name"]), spec["pool"].get("generation", 0)
        newest, specs = found.get(name, (generation, []))
        if generation >= newest:
            part = {key: spec[key] for key in ("sharedCounters", "devices") if spec.get(key)}
            found[name] = (generation, [*(specs if generation == newest else []), part])
    return {name: PoolSlices(name, tuple(specs)) for name, (_, specs) in found.items()}


def encode(pools: Sequence[PoolSlices]) -> dict[str, object]:
    return {"format": 1, "pools": {pool.name: list(pool.specs) for pool in pools}}


def decode(body: Any) -> dict[PoolName, PoolSlices]:
    """The pools that `encode` wrote. ValueError for other content or a newer format: a wrong shape would be published."""
    if not isinstance(body, dict) or type(body.get("format")) is not int:
        raise ValueError("it has no format")
    if body["format"] != 1:
        raise ValueError(f"format {body['format']} is not 1")
    if not isinstance(body.get("pools"), dict):
        raise ValueError("it has no pools")
    for name, specs in body["pools"].items():
        if not isinstance(specs, list) or not all(map(_is_part, specs)):
            raise ValueError(f"pool {name[:100]} is not a list of slices")
    return {PoolName(name): PoolSlices(PoolName(name), tuple(specs)) for name, specs in body["pools"].items()}


def _is_part(spec: object) -> bool:
    """Whether it has the form of a slice, as far as this module reads it: named devices, and lists of counters."""
    if not isinstance(spec, dict):
        return False
    lists = [spec.get("devices", []), spec.get("sharedCounters", [])]
    return all(isinstance(items, list) for items in lists) and all(
        isinstance(item, dict) and isinstance(item.get("name"), str) for items in lists for item in items
    )


def _devices(pool: PoolSlices) -> Iterator[ReadOnlyBody]:
    for spec in pool.specs:
        yield from spec.get("devices", ())


def _counters(pool: PoolSlices) -> list[Any]:
    return [counters for spec in pool.specs for counters in spec.get("sharedCounters", ())]


def _costs(pool: PoolSlices) -> dict[str, list[Any]]:
    return {device["name"]: _cost(device) for device in _devices(pool)}


def _cost(device: ReadOnlyBody) -> list[Any]:
    return [device.get(key) for key in _COST]
