"""The stand-in allocator against the behaviour that the DRA contract, 5.2 to 5.4, records of the real one."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from itertools import count
from typing import Any

import pytest
from gpuslice.core.json import ReadOnlyBody
from gpuslice.standin.capacity import CapacityError
from gpuslice.standin.resource_slices import amount
from gpuslice.standin.scheduler import Request, SelectorError, allocate

NODE, DRIVER = "node-a", "gpuslice.dev"
ANY = Request(name="gpu")


def a_device(name: str, *, counters: dict[str, int] | None = None, **more: Any) -> dict[str, Any]:
    device = {"name": name, **more}
    if counters:
        values = {counter: {"value": str(value)} for counter, value in counters.items()}
        device["consumesCounters"] = [{"counterSet": "card", "counters": values}]
    return device


def a_share(name: str, capacity: dict[str, Any], **more: Any) -> dict[str, Any]:
    return a_device(name, allowMultipleAllocations=True, capacity=capacity, **more)


def a_slice(name: str, pool: str, devices: list[dict[str, Any]], **spec: Any) -> dict[str, Any]:
    pool_body = {"name": pool, "generation": spec.pop("generation", 1), "resourceSliceCount": spec.pop("of", 1)}
    body = {"driver": DRIVER, "nodeName": NODE, "pool": pool_body, "devices": devices} | spec
    return {"metadata": {"name": name}, "spec": body}


def a_card(pool: str = "p0") -> list[dict[str, Any]]:
    """One card in every mode: two halves (MIG), shares of its memory, the whole."""
    memory = {"value": "80Gi", "requestPolicy": {"default": "10Gi", "validRange": {"min": "1Mi", "step": "1Mi"}}}
    devices = [
        a_device("mig-0", counters={"a": 1}),
        a_device("mig-1", counters={"b": 1}),
        a_share("mps", {"memory": memory}, counters={"a": 1, "b": 1}),
        a_device("gpu", counters={"a": 1, "b": 1}),
    ]
    counter_set = {"name": "card", "counters": {"a": {"value": "1"}, "b": {"value": "1"}}}
    return [
        a_slice(f"{pool}-0", pool, [], sharedCounters=[counter_set], of=2),
        a_slice(f"{pool}-1", pool, devices, of=2),
    ]


def named(device: str, **more: Any) -> Request:
    return Request(name="gpu", where=lambda body: bool(body["name"] == device), **more)


def names(allocation: ReadOnlyBody | None) -> list[str] | None:
    return None if allocation is None else [result["device"] for result in allocation["devices"]["results"]]


class Cluster:
    """Slices, and claims that were allocated from them."""

    def __init__(self, slices: list[dict[str, Any]]) -> None:
        self.slices = slices
        self.claims: list[dict[str, Any]] = []
        self._ids: Iterator[int] = count()

    def ask(self, *requests: Request, **more: Any) -> list[str] | None:
        allocation = allocate(
            self.slices, self.claims, requests, node=NODE, new_share_id=lambda: f"share-{next(self._ids)}", **more
        )
        if allocation is not None:
            self.claims.append({"status": {"allocation": allocation}})
        return names(allocation)

    def last(self) -> dict[str, Any]:
        result: dict[str, Any] = self.claims[-1]["status"]["allocation"]["devices"]["results"][0]
        return result


# ---------------------------------------------------------------- the result


def test_the_result_is_the_allocation_of_a_resource_claim() -> None:
    config = {"source": "FromClaim", "requests": [], "opaque": {"driver": DRIVER, "parameters": {}}}

    allocation = allocate(a_card(), [], [named("gpu")], node=NODE, configs=[config])

    field = {"key": "metadata.name", "operator": "In", "values": [NODE]}
    assert allocation == {
        "devices": {
            "results": [{"request": "gpu", "driver": DRIVER, "pool": "p0", "device": "gpu"}],
            "config": [config],
        },
        "nodeSelector": {"nodeSelectorTerms": [{"matchFields": [field]}]},
    }


def test_a_share_has_an_id_of_its_own_and_the_capacity_that_it_is_charged() -> None:
    cluster = Cluster(a_card())

    cluster.ask(named("mps", capacity={"memory": "9Gi"}))
    first = cluster.last()
    cluster.ask(named("mps"))

    assert first["shareID"] == "share-0"
    assert first["consumedCapacity"] == {"memory": "9Gi"}
    assert cluster.last()["shareID"] == "share-1"
    assert cluster.last()["consumedCapacity"] == {"memory": "10Gi"}


# ---------------------------------------------------------------- pools and order


def test_the_first_device_of_the_first_slice_of_the_first_pool_wins() -> None:
    slices = [
        a_slice("z", "p1", [a_device("late")]),
        a_slice("b", "p0", [a_device("third")], of=2),
        a_slice("a", "p0", [a_device("first"), a_device("second")], of=2),
    ]
    cluster = Cluster(slices)

    assert [cluster.ask(ANY) for _ in range(5)] == [["first"], ["second"], ["third"], ["late"], None]


def test_an_incomplete_pool_gives_nothing_until_its_last_slice_is_there() -> None:
    missing = a_slice("b", "p0", [a_device("two")], of=2)
    present = a_slice("a", "p0", [a_device("one")], of=2)

    assert allocate([present], [], [ANY], node=NODE) is None
    assert names(allocate([present, missing], [], [ANY], node=NODE)) == ["one"]


def test_only_the_newest_generation_counts_even_while_it_is_incomplete() -> None:
    old, new = a_slice("a", "p0", [a_device("old")]), a_slice("b", "p0", [a_device("new")], generation=2)
    growing = a_slice("c", "p0", [a_device("new")], generation=3, of=2)

    assert names(allocate([old, new], [], [ANY], node=NODE)) == ["new"]
    assert allocate([old, new, growing], [], [ANY], node=NODE) is None


def test_slices_of_another_node_are_not_offered() -> None:
    assert allocate([a_slice("a", "p0", [a_device("x")], nodeName="node-b")], [], [ANY], node=NODE) is None


@pytest.mark.parametrize("devices", [[a_device("x"), a_device("x")], [a_device("x", counters={"nobody": 1})]])
def test_an_invalid_pool_gives_nothing(devices: list[dict[str, Any]]) -> None:
    assert allocate([a_slice("a", "p0", devices)], [], [ANY], node=NODE) is None


# ---------------------------------------------------------------- counters and modes


@pytest.mark.parametrize(
    ("holder", "possible"), [("mig-0", {"mig-1"}), ("gpu", set()), ("mps", {"mps"}), ("mig-1", {"mig-0"})]
)
def test_the_first_claim_sets_the_mode_of_the_card(holder: str, possible: set[str]) -> None:
    cluster = Cluster(a_card())
    cluster.ask(named(holder))

    found = {
        device
        for device in ("mig-0", "mig-1", "mps", "gpu")
        if allocate(cluster.slices, cluster.claims, [named(device)], node=NODE)
    }

    assert found == possible


def test_counters_are_charged_once_per_device_and_capacity_once_per_share() -> None:
    cluster = Cluster(a_card())

    answers = [cluster.ask(named("mps")) for _ in range(9)]

    assert answers == [["mps"]] * 8 + [None]


def test_counters_of_one_card_do_not_touch_another() -> None:
    cluster = Cluster(a_card("p0") + a_card("p1"))

    pools = []
    while cluster.ask(named("gpu")):
        pools.append(cluster.last()["pool"])

    assert pools == ["p0", "p1"]


def test_counters_hold_within_one_claim_too() -> None:
    slices = a_card()

    assert allocate(slices, [], [named("mig-0"), named("gpu")], node=NODE) is None
    assert names(allocate(slices, [], [named("mig-0"), named("mig-1")], node=NODE)) == ["mig-0", "mig-1"]


def test_admin_access_ignores_who_holds_a_device_and_holds_nothing() -> None:
    cluster = Cluster([a_slice("a", "p0", [a_device("monitor")])])
    cluster.ask(ANY)

    assert cluster.ask(Request(name="watch", admin=True)) == ["monitor"]
    assert cluster.last()["adminAccess"] is True
    del cluster.claims[0]
    assert cluster.ask(ANY) == ["monitor"]


def test_admin_access_to_a_device_with_counters_waits_for_the_card() -> None:
    cluster = Cluster(a_card())
    cluster.ask(named("mig-0"))

    assert cluster.ask(named("gpu", admin=True)) is None


# ---------------------------------------------------------------- requests


def test_a_count_never_takes_two_shares_of_one_device_but_two_requests_may() -> None:
    slices = a_card()

    assert allocate(slices, [], [named("mps", count=2)], node=NODE) is None
    assert names(allocate(slices, [], [named("mps"), named("mps")], node=NODE)) == ["mps", "mps"]


def test_two_shares_in_one_claim_are_charged_together() -> None:
    half = named("mps", capacity={"memory": "41Gi"})

    assert allocate(a_card(), [], [half, half], node=NODE) is None


def test_an_earlier_request_moves_on_when_a_later_one_cannot_be_served_otherwise() -> None:
    cluster = Cluster([a_slice("a", "p0", [a_device("wanted"), a_device("spare")])])

    assert cluster.ask(Request(name="any"), named("wanted")) == ["spare", "wanted"]


def test_a_request_for_several_moves_on_by_combinations() -> None:
    cluster = Cluster([a_slice("a", "p0", [a_device(name) for name in "abcd"])])

    assert cluster.ask(Request(name="two", count=2), named("a"), named("c")) == ["b", "d", "a", "c"]


def test_all_takes_every_match_or_nothing() -> None:
    everything = Request(name="all", count=None)
    cluster = Cluster([a_slice("a", "p0", [a_device("x"), a_device("y")])])

    assert cluster.ask(everything) == ["x", "y"]
    assert cluster.ask(everything) is None
    assert allocate([], [], [everything], node=NODE) is None
    assert allocate(a_card(), [], [everything], node=NODE) is None  # the parts of a card exclude each other


def test_alternatives_are_tried_in_order_and_named_in_the_result() -> None:
    either = Request(name="gpu", alternatives=(named("gpu", count=1), Request(name="small")))
    cluster = Cluster(a_card())
    cluster.ask(named("mig-1"))

    assert cluster.ask(either) == ["mig-0"]
    assert cluster.last()["request"] == "gpu/small"


# ---------------------------------------------------------------- selectors, capacity, taints


def test_a_selector_compares_attributes_and_capacity() -> None:
    devices = [
        a_device("small", attributes={"type": {"string": "mig"}}, capacity={"memory": {"value": "9856Mi"}}),
        a_device("big", attributes={"type": {"string": "mig"}}, capacity={"memory": {"value": "19968Mi"}}),
    ]
    slices = [a_slice("a", "p0", devices)]

    def found(**where: str) -> list[str] | None:
        return names(allocate(slices, [], [Request(name="gpu", driver=DRIVER, where=where)], node=NODE))

    assert found(type="mig") == ["small"]
    assert found(type="mig", memory=">=10Gi") == ["big"]
    assert found(type="gpu") is None


def test_a_selector_that_names_a_missing_key_fails_the_pod() -> None:
    asks = Request(name="gpu", driver=DRIVER, where={"profile": "1g.10gb"})

    with pytest.raises(SelectorError, match="p0/mig-0 has no attribute or capacity profile"):
        allocate(a_card(), [], [asks], node=NODE)


def test_devices_of_another_driver_are_not_asked() -> None:
    asks = Request(name="gpu", driver="other.dev", where={"profile": "1g.10gb"})

    assert allocate(a_card(), [], [asks], node=NODE) is None


def test_capacity_of_an_exclusive_device_is_only_a_filter() -> None:
    device = a_device("gpu", capacity={"memory": {"value": "80Gi"}})
    cluster = Cluster([a_slice("a", "p0", [device])])

    assert cluster.ask(Request(name="gpu", capacity={"memory": "81Gi"})) is None
    assert cluster.ask(Request(name="gpu", capacity={"clients": "1"})) is None
    assert cluster.ask(Request(name="gpu", capacity={"memory": "9Gi"})) == ["gpu"]
    assert "consumedCapacity" not in cluster.last()


@pytest.mark.parametrize(
    ("policy", "asked", "charged"),
    [
        ({}, None, "80Gi"),
        ({}, "1Gi", "1Gi"),
        ({"default": "8Gi"}, None, "8Gi"),
        ({"default": "8Gi", "validRange": {"min": "4Gi", "step": "4Gi"}}, "1Gi", "4Gi"),
        ({"default": "8Gi", "validRange": {"min": "4Gi", "step": "4Gi"}}, "9Gi", "12Gi"),
        ({"default": "8Gi", "validRange": {"min": "4Gi", "max": "16Gi"}}, "17Gi", None),
        ({"default": "8Gi", "validValues": ["8Gi", "16Gi"]}, "9Gi", "16Gi"),
        ({"default": "8Gi", "validValues": ["8Gi", "16Gi"]}, "17Gi", None),
        ({"default": "0", "validRange": {"min": "0", "step": "1"}}, None, "0"),
    ],
)
def test_a_share_is_charged_by_the_policy_of_its_capacity(
    policy: dict[str, Any], asked: str | None, charged: str | None
) -> None:
    memory = {"value": "80Gi"} | ({"requestPolicy": policy} if policy else {})
    cluster = Cluster([a_slice("a", "p0", [a_share("mps", {"memory": memory})])])

    found = cluster.ask(Request(name="gpu", capacity={} if asked is None else {"memory": asked}))

    assert (found and cluster.last()["consumedCapacity"]["memory"]) == charged


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1E1000000", 2**63 - 1),
        ("1e31", 2**63 - 1),
        ("10E", 2**63 - 1),
        ("-1E1000000", 1 - 2**63),
        ("0E1000000", 0),
        ("1e-1000000", Decimal("1e-9")),
        ("1E99999999999999999999", None),
        ("1Gi", 2**30),
    ],
)
def test_an_amount_beyond_all_measure_is_the_largest_or_the_smallest_there_is(text: str, value: object) -> None:
    """apimachinery, `ParseQuantity`: it cuts values to int64 and rounds them up to 1n. An exponent must fit int64."""
    assert amount(text) == value


STEPS = {"default": "8Gi", "validRange": {"min": "256Mi", "step": "1Mi"}}
NO_STEPS = {"default": "8Gi", "validRange": {"min": "256Mi"}}


@pytest.mark.parametrize(
    ("asked", "policy", "without", "with_gate"),
    [
        ("7.7777Gi", STEPS, "7965Mi", None),
        ("1.1234Gi", STEPS, "1151Mi", None),
        ("1.123Gi", STEPS, "1150Mi", "1150Mi"),
        ("9.5Gi", STEPS, "9728Mi", "9728Mi"),
        ("10.0625Gi", STEPS, "10304Mi", "10304Mi"),  # whole bytes, whatever the decimals
        ("0.1234Mi", STEPS, "256Mi", "256Mi"),  # below the least, the scheduler raises it before any division
        ("7.7777Gi", NO_STEPS, "8351241785", "8351241784524800u"),
        ("1.123456789Gi", NO_STEPS, "1206302542", "1206302541806043136n"),
    ],
)
def test_with_the_gate_for_fractions_more_than_three_decimals_end_everything_if_the_policy_has_steps(
    asked: str, policy: dict[str, Any], without: str, with_gate: str | None
) -> None:
    """k8s.io/dynamic-resource-allocation v0.37.1, `roundUpRange` and `useMilli`: thousandths for every range with steps."""
    device = a_share("mps", {"memory": {"value": "80Gi", "requestPolicy": policy}})
    slices = [a_slice("a", "p0", [device, a_device("gpu", capacity={"memory": {"value": "80Gi"}})])]
    request = Request(name="gpu", capacity={"memory": asked})

    old = allocate(slices, [], [request], node=NODE, fractional=False)
    assert old is not None and old["devices"]["results"][0]["consumedCapacity"]["memory"] == without
    if with_gate is None:
        with pytest.raises(CapacityError, match=f"request {asked} is not a representable milli value"):
            allocate(slices, [], [request], node=NODE, fractional=True)
        return
    new = allocate(slices, [], [request], node=NODE, fractional=True)
    assert new is not None and new["devices"]["results"][0]["consumedCapacity"]["memory"] == with_gate


@pytest.mark.parametrize(
    ("effect", "toleration", "chosen"),
    [
        ("NoSchedule", None, "healthy"),
        ("NoExecute", None, "healthy"),
        ("None", None, "tainted"),
        ("NoSchedule", {"operator": "Exists"}, "tainted"),
        ("NoSchedule", {"key": "gpuslice.dev/xid", "value": "79"}, "tainted"),
        ("NoSchedule", {"key": "gpuslice.dev/xid", "value": "48"}, "healthy"),
        ("NoSchedule", {"operator": "Exists", "effect": "NoExecute"}, "healthy"),
    ],
)
def test_a_tainted_device_is_chosen_only_where_the_taint_is_tolerated(
    effect: str, toleration: dict[str, str] | None, chosen: str
) -> None:
    taint = {"key": "gpuslice.dev/xid", "value": "79", "effect": effect}
    cluster = Cluster([a_slice("a", "p0", [a_device("tainted", taints=[taint]), a_device("healthy")])])

    assert cluster.ask(Request(name="gpu", tolerations=[toleration] if toleration else [])) == [chosen]
