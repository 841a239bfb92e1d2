"""Which claims hold a pool, read from unchecked bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from gpuslice.core.model import ClaimRef, ClaimUid, PoolName
from gpuslice.core.pools import holders

A, B = PoolName("n/a"), PoolName("n/b")


def a_claim(name: str, *pools: str, driver: str = "d", **spec: object) -> dict[str, Any]:
    results = [{"driver": driver, "pool": pool} for pool in pools]
    return {
        "metadata": {"namespace": "ns", "name": name, "uid": f"uid-{name}"},
        "spec": spec,
        "status": {"allocation": {"devices": {"results": results}}},
    }


def a_ref(name: str, uid: str = "") -> ClaimRef:
    return ClaimRef("ns", name, ClaimUid(uid or f"uid-{name}"))


def asking(**request: object) -> dict[str, object]:
    return {"devices": {"requests": [{"name": "r", **request}]}}


def test_each_pool_has_the_claims_that_hold_a_device_of_it() -> None:
    bodies = [
        a_claim("both", A, B, A),
        a_claim("other-driver", A, driver="x"),
        a_claim("other-pool", "n/c"),
        {"metadata": {"namespace": "ns", "name": "idle", "uid": "u"}},
        a_claim("one", A),
    ]

    found = holders.find(iter(bodies), "d", {A, B, PoolName("n/free")})

    assert found.by_pool == {A: (a_ref("both"), a_ref("one")), B: (a_ref("both"),), "n/free": ()}
    assert not found.tolerant


@pytest.mark.parametrize(
    ("body", "held"),
    [
        (a_claim("one", A), True),
        (a_claim("one", B, A), True),
        (a_claim("one", B), False),
        (a_claim("one"), False),
        (a_claim("one", A, driver="x"), False),
        (a_claim("one", A) | {"metadata": {"namespace": "ns", "name": "one", "uid": "another"}}, False),
    ],
)
def test_a_claim_holds_a_pool_while_it_is_the_same_and_allocated_there(body: Mapping[str, Any], held: bool) -> None:
    assert holders.holds(body, a_ref("one"), A, "d") is held


@pytest.mark.parametrize(
    ("spec", "tolerant"),
    [
        (asking(exactly={"tolerations": [{"operator": "Exists"}]}), True),
        (asking(exactly={"tolerations": [{"key": "d/shape-change", "operator": "Exists"}]}), True),
        (asking(exactly={"tolerations": [{"key": "d/shape-change", "value": "pending"}]}), True),
        (asking(firstAvailable=[{"name": "a"}, {"tolerations": [{"operator": "Exists"}]}]), True),
        (asking(exactly={"tolerations": [{"key": "d/gpu", "operator": "Exists"}]}), False),
        (asking(exactly={"tolerations": []}), False),
        (asking(exactly="odd", firstAvailable="odd"), False),
        ({"devices": ["odd"]}, False),
    ],
)
def test_a_claim_that_tolerates_our_taint_is_noticed_wherever_it_is(spec: dict[str, object], tolerant: bool) -> None:
    body = a_claim("one") | {"spec": spec}

    assert holders.find([body], "d", set()).tolerant is tolerant


@pytest.mark.parametrize("spec", [None, [], "odd", {"devices": None}])
def test_a_spec_that_is_none_says_nothing(spec: object) -> None:
    assert not holders.find([a_claim("one") | {"spec": spec}], "d", set()).tolerant
