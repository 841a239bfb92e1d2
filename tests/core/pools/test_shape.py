"""A pool in use keeps its devices and their costs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gpuslice.core.model import PoolName
from gpuslice.core.pools import shape
from gpuslice.core.pools.pool import PoolSlices

NAME = PoolName("n/p")


def a_pool(*devices: dict[str, Any], counters: int = 7) -> PoolSlices:
    return PoolSlices(NAME, ({"sharedCounters": [{"name": "card", "counters": counters}]}, {"devices": list(devices)}))


def a_device(name: str, cost: int = 1, **more: Any) -> dict[str, Any]:
    return {"name": name, "attributes": {"type": "mig"}, "consumesCounters": [cost], **more}


@pytest.mark.contract(63)
@pytest.mark.parametrize(
    ("wanted", "allowed"),
    [
        (a_pool(a_device("a"), a_device("b")), True),
        (a_pool(a_device("a", attributes={"type": "x"}), a_device("b", taints=[1])), True),
        (a_pool(a_device("b"), a_device("a"), a_device("c")), True),
        (a_pool(a_device("a")), False),
        (a_pool(a_device("a", cost=2), a_device("b")), False),
        (a_pool(a_device("a", allowMultipleAllocations=True), a_device("b")), False),
        (a_pool(a_device("a"), a_device("b"), counters=8), False),
    ],
)
def test_only_what_leaves_devices_and_costs_alone_may_replace_a_pool_in_use(wanted: PoolSlices, allowed: bool) -> None:
    assert shape.allows(a_pool(a_device("a"), a_device("b")), wanted) is allowed


def test_a_closed_pool_taints_every_device_and_keeps_the_rest() -> None:
    kept = a_pool(a_device("a"), a_device("b"))

    closed = shape.cordoned(kept, "gpuslice.dev")

    assert shape.allows(kept, closed)
    devices: Any = closed.specs[1]["devices"]
    assert [device["taints"][0]["key"] for device in devices] == ["gpuslice.dev/shape-change"] * 2


def test_shapes_come_back_from_disk_as_they_were() -> None:
    pool = a_pool(a_device("a"))

    assert shape.decode(json.loads(json.dumps(shape.encode([pool])))) == {NAME: pool}
    with pytest.raises(ValueError, match="format 9 is not 1"):
        shape.decode({"format": 9})


def test_pools_in_use_are_found_in_claims_of_our_driver() -> None:
    ours = {"driver": "d", "pool": "n/p"}
    claims = [{}, {"status": {"allocation": {"devices": {"results": [ours, {"driver": "x", "pool": "n/q"}]}}}}]

    assert list(shape.pools_of(claims, "d")) == [NAME]
