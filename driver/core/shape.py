"""The shape of a published pool: which devices it has and what each of them costs.

The scheduler reckons what is used from the devices as they are published *now*: one that vanishes, or whose counters
change while it is allocated, frees what it uses and is given out twice (kubernetes/kubernetes#140802). So a pool changes
its shape only when nobody holds anything of it; attributes, taints and further devices may change at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from driver.core.model import PoolName
from driver.core.pool import PoolSlices

Json = Mapping[str, Any]

TAINT = "shape-change"
_COST = ("consumesCounters", "allowMultipleAllocations")


def allows(kept: PoolSlices, wanted: PoolSlices) -> bool:
    """Whether `wanted` may replace `kept` while claims hold devices of it."""
    if kept is wanted:
        return True
    new = {device["name"]: _cost(device) for device in _devices(wanted)}
    same = all(new.get(device["name"]) == _cost(device) for device in _devices(kept))
    return same and _counters(kept) == _counters(wanted)


def closed(kept: PoolSlices, driver: str) -> PoolSlices:
    """The old shape with every device tainted, so that nothing new is allocated from it while it empties."""
    taint = {"key": f"{driver}/{TAINT}", "value": "pending", "effect": "NoSchedule"}
    return PoolSlices(
        kept.name,
        tuple(
            {**spec, "devices": [{**device, "taints": [taint]} for device in spec["devices"]]}
            if "devices" in spec
            else spec
            for spec in _specs(kept)
        ),
    )


def pools_of(claims: Iterable[Json], driver: str) -> Iterator[PoolName]:
    """Pools of this driver from which any of these ResourceClaims holds a device."""
    for claim in claims:
        allocation = (claim.get("status") or {}).get("allocation") or {}
        for result in (allocation.get("devices") or {}).get("results") or ():
            if result.get("driver") == driver:
                yield PoolName(result["pool"])


def encode(pools: Sequence[PoolSlices]) -> dict[str, object]:
    return {"format": 1, "pools": {pool.name: list(pool.specs) for pool in pools}}


def decode(body: Any) -> dict[PoolName, PoolSlices]:
    """What `encode` wrote; nothing where it is of another format, for then nothing is known."""
    if not isinstance(body, dict) or body.get("format") != 1:
        return {}
    return {PoolName(name): PoolSlices(PoolName(name), tuple(specs)) for name, specs in body["pools"].items()}


def _specs(pool: PoolSlices) -> Sequence[Json]:
    return pool.specs


def _devices(pool: PoolSlices) -> Iterator[Json]:
    for spec in _specs(pool):
        yield from spec.get("devices", ())


def _counters(pool: PoolSlices) -> list[Any]:
    return [counters for spec in _specs(pool) for counters in spec.get("sharedCounters", ())]


def _cost(device: Json) -> list[Any]:
    return [device.get(key) for key in _COST]
