"""Each limit of the API, broken once."""

from __future__ import annotations

from typing import Any

import pytest
from gpuslice.core.model import PoolName
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.validation import problems


def a_device(name: str = "gpu", **changes: Any) -> dict[str, Any]:
    return {"name": name, "attributes": {"type": {"string": "gpu"}}, "capacity": {"memory": {"value": "1Gi"}}} | changes


def counter_set(name: str = "card", *counters: str) -> dict[str, Any]:
    return {"name": name, "counters": {counter: {"value": "1"} for counter in counters or ("ofas",)}}


def consumption(name: str = "card", *counters: str) -> dict[str, Any]:
    return {"counterSet": name, "counters": {counter: {"value": "1"} for counter in counters or ("ofas",)}}


def a_pool(*specs: dict[str, Any], name: str = "node-1/0000-3b-00-0") -> PoolSlices:
    return PoolSlices(PoolName(name), specs)


def of(*devices: dict[str, Any], sets: list[dict[str, Any]] | None = None) -> PoolSlices:
    """A pool of these devices, with the counter sets they may consume from."""
    return a_pool(*([{"sharedCounters": sets}] if sets else []), {"devices": list(devices)})


def many(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [a_device(f"gpu-{i}", **changes) for i in range(count)]


NUMBERED = {f"c{i}": {"value": "1"} for i in range(33)}
TAINT = {"key": "gpuslice.dev/lost", "value": "true", "effect": "NoSchedule"}


def test_a_plan_within_the_limits_has_no_violation() -> None:
    assert problems(of(a_device(consumesCounters=[consumption()], taints=[TAINT]), sets=[counter_set()])) == ()
    assert problems(of(*many(128))) == ()
    assert problems(a_pool({"devices": []})) == ()


@pytest.mark.contract(61)
@pytest.mark.parametrize(
    ("pool", "told"),
    [
        (of(*many(129)), "slice 0 has 129 devices, at most 128 are allowed"),
        (of(*many(65, taints=[TAINT])), "slice 0 has 65 devices, at most 64 are allowed"),
        (
            of(*many(65, consumesCounters=[consumption()]), sets=[counter_set()]),
            "slice 1 has 65 devices, at most 64 are allowed",
        ),
        (of(sets=[counter_set(f"s{i}") for i in range(9)]), "slice 0 has 9 counter sets, at most 8 are allowed"),
        (of(sets=[counter_set("card", *NUMBERED)]), "counter set card has 33 counters, 1 to 32 are allowed"),
        (of(sets=[counter_set("Card")]), "'Card' is not a DNS label"),
        (of(sets=[counter_set("card", "copy_engines")]), "'copy_engines' is not a DNS label"),
        (
            of(
                a_device(consumesCounters=[consumption(name) for name in "abc"]),
                sets=[counter_set(name) for name in "abc"],
            ),
            "it draws on 3 counter sets, at most 2 are allowed",
        ),
        (
            of(a_device(consumesCounters=[consumption(), consumption()]), sets=[counter_set()]),
            "it names counter set card 2 times",
        ),
        (
            of(a_device(consumesCounters=[consumption("card", *NUMBERED)]), sets=[counter_set("card", *NUMBERED)]),
            "device gpu: counter set card has 33 counters, 1 to 32 are allowed",
        ),
        (of(a_device(capacity=NUMBERED)), "34 attributes and capacities, at most 32 are allowed"),
        (
            of(a_device(attributes={"a": {"strings": ["x"] * 49}})),
            "49 attribute values, at most 48 are allowed",
        ),
        (of(a_device(attributes={"a" * 33: {"int": 1}})), "is not a C identifier of at most 32"),
        (of(a_device(attributes={"A.b/c": {"int": 1}})), "key A.b/c is not a C identifier"),
        (of(a_device(capacity={"copy-engines": {"value": "1"}})), "key copy-engines is not a C identifier"),
        (of(a_device(attributes={"a": {"string": "x" * 65}})), "attribute a is longer than 64 bytes"),
        (of(a_device(attributes={"a": {"strings": ["x" * 65]}})), "attribute a is longer than 64 bytes"),
        (of(a_device(attributes={"a": {"version": "580.65.06"}})), "is '580.65.06', which is not a semantic version"),
        (of(a_device(attributes={"a": {"int": 1, "bool": True}})), "attribute a needs exactly one value"),
        (of(a_device(taints=[TAINT] * 17)), "17 taints, at most 16 are allowed"),
        (of(a_device(taints=[TAINT | {"key": "gpuslice.dev/"}])), "taint gpuslice.dev/=true is not a label"),
        (of(a_device(taints=[TAINT | {"key": "a/b/c d"}])), "taint a/b/c d=true is not a label"),
        (of(a_device(taints=[TAINT | {"value": "a b"}])), "taint gpuslice.dev/lost=a b is not a label"),
        (of(a_device(taints=[TAINT | {"effect": "Drain"}])), "has the unknown effect Drain"),
        (of(a_device("GPU")), "device GPU: its name is not a DNS label"),
        (of(a_device("g" * 64)), "its name is not a DNS label of at most 63 characters"),
        (a_pool({"devices": []}, name="Node/x"), "its name must be DNS subdomains separated by slashes"),
        (a_pool({"devices": []}, name="n" * 254), "its name must be DNS subdomains"),
    ],
)
def test_each_limit_is_told(pool: PoolSlices, told: str) -> None:
    assert told in " · ".join(problems(pool))


@pytest.mark.contract(55)
@pytest.mark.parametrize(
    ("pool", "told"),
    [
        (of(a_device(), a_device()), "device gpu occurs 2 times"),
        (a_pool({"devices": [a_device()]}, {"devices": [a_device()]}), "device gpu occurs 2 times"),
        (of(sets=[counter_set(), counter_set()]), "counter set card occurs 2 times"),
        (of(a_device(consumesCounters=[consumption()])), "draws on card/ofas, which no slice of the pool has"),
        (
            of(a_device(consumesCounters=[consumption("card", "jpegs")]), sets=[counter_set()]),
            "draws on card/jpegs, which no slice of the pool has",
        ),
    ],
)
def test_what_would_make_a_pool_invalid_is_told(pool: PoolSlices, told: str) -> None:
    assert told in " · ".join(problems(pool))


@pytest.mark.contract(62)
def test_devices_and_counters_in_one_slice_are_told() -> None:
    (told,) = problems(a_pool({"devices": [a_device()], "sharedCounters": [counter_set()]}))

    assert "has both devices and counters" in told


def shared(**policy: Any) -> PoolSlices:
    return of(
        a_device(capacity={"memory": {"value": "8Gi", "requestPolicy": policy}}) | {"allowMultipleAllocations": True}
    )


@pytest.mark.contract(64)
def test_a_shared_device_without_a_capacity_or_a_policy_for_each_is_told() -> None:
    sharing = {"allowMultipleAllocations": True}
    policy = {"value": "1Gi", "requestPolicy": {"default": "1Gi"}}

    assert problems(shared(default="1Gi")) == ()
    assert "a shared device needs a capacity" in problems(of(a_device(capacity={}) | sharing))[0]
    assert "a request policy for each capacity" in problems(of(a_device() | sharing))[0]
    assert "needs allowMultipleAllocations" in problems(of(a_device(capacity={"memory": policy})))[0]


@pytest.mark.contract(61)
@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"default": "lots"},
        {"default": "9Gi", "validRange": {"min": "1Gi"}},
        {"default": "1Gi", "validRange": {"min": "2Gi"}},
        {"default": "1Gi", "validRange": {"min": "1Gi", "max": "9Gi"}},
        {"default": "1537Mi", "validRange": {"min": "1Gi", "step": "1Gi"}},
        {"default": "1Gi", "validRange": {"min": "1Gi", "step": "8Gi"}},
        {"default": "1Gi", "validValues": ["2Gi", "3Gi"]},
        {"default": "1Gi", "validValues": ["2Gi", "1Gi"]},
        {"default": "1", "validValues": [str(i) for i in range(1, 12)]},
        {"default": "1Gi", "validValues": ["1Gi", "9Gi"]},
        {"default": "1", "validValues": ["lots"]},
        {"default": "1Gi", "validRange": {"min": "1Gi"}, "validValues": ["1Gi"]},
    ],
)
def test_a_request_policy_that_the_server_refuses_is_told(policy: dict[str, Any]) -> None:
    assert "request policy" in " · ".join(problems(shared(**policy)))


@pytest.mark.parametrize(
    "policy",
    [
        {"default": "0", "validRange": {"min": "0", "step": "1"}},
        {"default": "2Gi", "validRange": {"min": "1Mi", "max": "8Gi", "step": "1Mi"}},
        {"default": "1", "validValues": ["1"]},
        {"default": "0", "validValues": ["0"]},
    ],
)
def test_a_request_policy_that_the_server_accepts_is_no_fault(policy: dict[str, Any]) -> None:
    assert problems(shared(**policy)) == ()
