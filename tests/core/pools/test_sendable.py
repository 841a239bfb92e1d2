"""What the API server drops is not sent again, and a pool that may not be sent keeps what it has."""

from __future__ import annotations

from typing import Any

import pytest
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.reconcile import Create, Owner
from gpuslice.core.pools.sendable import SendablePools

from tests.kit.publishing import DRIVER, NODE, TAINT, a_pool, plain


def creates(pools: SendablePools) -> list[Create]:
    changes = reconcile.changes(pools.pools(), [], Owner(DRIVER, NODE, "uid"))
    return [change for change in changes if isinstance(change, Create)]


def without(body: dict[str, Any], field: str) -> dict[str, Any]:
    """What a server that does not know this field of a device makes of the body."""
    devices = [{key: value for key, value in d.items() if key != field} for d in body["spec"]["devices"]]
    return body | {"spec": body["spec"] | {"devices": devices}}


@pytest.mark.contract(56)
def test_a_pool_whose_counters_are_dropped_is_not_sent_until_it_is_another_one() -> None:
    pools, pool = SendablePools(), a_pool("gpu")
    pools.want((pool,))
    counters, *_ = creates(pools)

    lost = pools.learn(counters, counters.body | {"spec": counters.body["spec"] | {"sharedCounters": []}})

    assert lost == {reconcile.PARTITIONABLE}
    assert pools.pools() == []
    assert not pools.writable(pool.name)
    pools.want((plain("gpu"),))
    assert pools.pools() == [plain("gpu")]


@pytest.mark.contract(56)
def test_a_field_that_was_dropped_is_left_out_the_next_time() -> None:
    pools = SendablePools()
    pools.want((plain("gpu", taints=[TAINT]),))
    (create,) = creates(pools)

    lost = pools.learn(create, without(create.body, "taints"))

    assert lost == {reconcile.TAINTS}
    assert [list(pool.specs[0]["devices"]) for pool in pools.pools()] == [[{"name": "gpu"}]]


@pytest.mark.contract(55)
def test_a_pool_with_a_fault_is_named_and_its_slices_stay_as_they_are() -> None:
    pools = SendablePools()
    pools.want((plain("gpu", "gpu"), plain("gpu", pool="n1/b")))

    assert pools.faults() == ("pool n1/a: device gpu occurs 2 times",)
    assert [pool.name for pool in pools.pools()] == ["n1/b"]
    assert [pools.writable(name) for name in ("n1/a", "n1/b", "n1/gone")] == [False, True, True]
