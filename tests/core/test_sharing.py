"""Claims of all modes on the published devices of a node, placed by the stand-in scheduler: the promises of the design.

These tests use only what the driver publishes. So every promise here is kept by the scheduler alone.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import Any

import pytest
from gpuslice.core import quantity
from gpuslice.core.inventory import Inventory
from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.model import Exclusive, MigSlice, Monitor, Offer
from gpuslice.core.pools.pool import Features, resource_slices
from gpuslice.nvml.sim import geometry, models
from gpuslice.standin.scheduler import Request, allocate
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.builders import a_gpu, a_policy, an_inventory

NODE, DRIVER = "node-1", "gpuslice.dev"
ALL = Features(partitionable=True, consumable=True, taints=True)
PRODUCTS = models.known()
TWINS = {"sharedPartitions": ["mps", "timeslice"]}


class Node:
    """What a node publishes, and the claims on it."""

    def __init__(self, inventory: Inventory) -> None:
        self.inventory = inventory
        self.slices = list(published(inventory))
        self.claims: dict[int, ReadOnlyBody] = {}
        self._numbers = count()

    def ask(self, *types: str, device: str = "", **capacity: str) -> str | None:
        """Claim one device of any of these types, this device if it is named; the name that it got, with its card."""

        def fits(body: ReadOnlyBody) -> bool:
            return type_of(body) in types and device in ("", body["name"])

        request = Request(name="gpu", where=fits, capacity=capacity)
        number = next(self._numbers)
        allocation = allocate(
            self.slices, self.claims.values(), [request], node=NODE, new_share_id=lambda: f"share-{number}"
        )
        if allocation is None:
            return None
        self.claims[number] = {"status": {"allocation": allocation}}
        (result,) = allocation["devices"]["results"]
        return f"{self._card(result['pool'])}/{result['device']}"

    def leave(self, which: int) -> None:
        """The claim at this place among those that are there is deleted."""
        del self.claims[sorted(self.claims)[which % len(self.claims)]]

    def results(self) -> list[ReadOnlyBody]:
        return [claim["status"]["allocation"]["devices"]["results"][0] for claim in self.claims.values()]

    def _card(self, pool: str) -> int:
        return [known.name for known in self.inventory.pools].index(pool)  # type: ignore[arg-type]


def type_of(device: ReadOnlyBody) -> str:
    return str(device["attributes"]["type"]["string"])


@cache
def published(inventory: Inventory) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "metadata": {"name": f"{number}-{planned.name}"},
            "spec": {
                "driver": DRIVER,
                "nodeName": NODE,
                "pool": {"name": planned.name, "generation": 1, "resourceSliceCount": len(planned.specs)},
                **spec,
            },
        }
        for planned in resource_slices(inventory, {}, driver=DRIVER, features=ALL)
        for number, spec in enumerate(planned.specs)
    )


@cache
def a_node_of(product: str, cards: int, *, twins: bool) -> Inventory:
    return an_inventory(*(a_gpu(product, i) for i in range(cards)), policy=a_policy(**TWINS if twins else {}))


# ---------------------------------------------------------------- what a person sees


def test_shares_of_one_mode_fill_a_card_and_the_other_modes_go_elsewhere() -> None:
    node = Node(a_node_of("h100", 2, twins=False))

    assert [node.ask("timeslice") for _ in range(2)] == ["0/timeslice"] * 2
    assert node.ask("gpu") == "1/gpu"
    assert node.ask("mig") is None
    assert node.ask("mps") is None
    assert [node.ask("timeslice") for _ in range(3)] == ["0/timeslice", "0/timeslice", None]


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
@pytest.mark.parametrize("shares", [1, 4, 7])
def test_one_sharer_more_than_the_policy_has_shares_is_refused(mode: str, shares: int) -> None:
    node = Node(an_inventory(policy=a_policy(**{mode: {"shares": shares}})))

    assert [node.ask(mode) for _ in range(shares)] == [f"0/{mode}"] * shares
    assert node.ask(mode) is None


def test_mps_ceilings_that_add_up_to_more_than_a_card_go_to_the_next() -> None:
    node = Node(a_node_of("h100", 2, twins=False))

    assert node.ask("mps", memory="10Gi") == "0/mps"
    assert node.ask("mps", memory="60Gi", smPercent="50") == "0/mps"
    assert node.ask("mps", memory="1Gi", smPercent="60") == "1/mps"
    assert [result["consumedCapacity"]["smPercent"] for result in node.results()] == ["0", "50", "60"]


def test_clients_run_out_like_memory() -> None:
    node = Node(a_node_of("l4", 1, twins=False))

    assert node.ask("mps", memory="1Gi", clients="47") == "0/mps"
    assert node.ask("mps", memory="1Gi") is None
    assert node.ask("mps", memory="1Gi", clients="1") == "0/mps"


def test_a_claim_may_count_for_several_turns() -> None:
    node = Node(a_node_of("l4", 1, twins=False))

    assert node.ask("timeslice", memory="1Gi", shares="3") == "0/timeslice"
    assert node.ask("timeslice", memory="1Gi", shares="2") is None
    assert node.ask("timeslice", memory="1Gi") == "0/timeslice"


@pytest.mark.parametrize("twins", [False, True])
@pytest.mark.parametrize("types", [("mig", "mps"), ("gpu", "mig", "mps", "timeslice")])
@pytest.mark.parametrize(
    ("memory", "device"),
    [("9Gi", "mig-1g-19-6"), ("10Gi", "mig-1g-15-6"), ("30Gi", "mig-3g-9-4"), ("70Gi", "mig-7g-0-0")],
)
def test_who_asks_only_for_memory_gets_the_smallest_partition_that_fits(
    memory: str, device: str, types: Sequence[str], twins: bool
) -> None:
    node = Node(a_node_of("h100", 1, twins=twins))

    assert node.ask(*types, memory=memory) == f"0/{device}"


def test_who_asks_only_for_memory_joins_a_card_that_is_shared_already() -> None:
    node = Node(a_node_of("h100", 1, twins=False))

    node.ask("mps", memory="60Gi")

    assert node.ask("mig", "mps", memory="2Gi") == "0/mps"


def test_a_partition_is_had_alone_or_in_shares_but_not_both() -> None:
    node = Node(a_node_of("h100", 1, twins=True))

    assert node.ask("mps", device="mig-1g-19-0-mps") == "0/mig-1g-19-0-mps"
    assert node.ask("mig", device="mig-1g-19-0") is None
    assert node.ask("timeslice", device="mig-1g-19-0-timeslice") is None
    assert node.ask("mig", device="mig-1g-19-1") == "0/mig-1g-19-1"
    assert [node.ask("mps", device="mig-1g-19-0-mps") for _ in range(4)] == [*["0/mig-1g-19-0-mps"] * 3, None]
    assert node.ask("mps", device="mps") is None


@pytest.mark.parametrize("capacity", ["multiprocessors", "decoders", "shares"])
def test_what_no_share_can_have_is_refused_by_request(capacity: str) -> None:
    node = Node(a_node_of("h100", 1, twins=False))

    assert node.ask("mps", **{capacity: "1"}) is None
    assert node.ask("mps", **{capacity: "0"}) == "0/mps"


def test_a_ceiling_cannot_be_asked_of_turns_and_means_at_least_on_a_partition() -> None:
    node = Node(a_node_of("h100", 1, twins=False))

    assert node.ask("timeslice", smPercent="10") is None
    assert node.ask("mig", smPercent="40") == "0/mig-3g-9-4"


# ---------------------------------------------------------------- what holds whatever happens


@settings(max_examples=60, deadline=None)
@given(data=st.data(), product=st.sampled_from(PRODUCTS), cards=st.integers(1, 2), twins=st.booleans())
def test_whatever_claims_come_and_go_a_card_has_one_mode_and_nothing_is_sold_twice(
    data: st.DataObject, product: str, cards: int, twins: bool
) -> None:
    node = Node(a_node_of(product, cards, twins=twins))
    for _ in range(data.draw(st.integers(1, 14))):
        if node.claims and data.draw(st.integers(0, 3)) == 0:
            node.leave(data.draw(st.integers(0, 20)))
        else:
            node.ask(*data.draw(st.sampled_from(WANTED)), **data.draw(st.sampled_from(ASKED)))
        assert_sound(node, product)

    node.claims.clear()

    for name in [device.ref.device for device in node.inventory.pools[0].devices]:
        assert node.ask("gpu", "mig", "mps", "timeslice", "monitor", device=name) == f"0/{name}"
        node.claims.clear()


WANTED = [("gpu",), ("mig",), ("mps",), ("timeslice",), ("mig", "mps"), ("gpu", "mig", "mps", "timeslice")]
ASKED: list[dict[str, str]] = [
    {},
    {},
    {"memory": "2Gi"},
    {"memory": "9Gi"},
    {"memory": "30Gi"},
    {"memory": "1Gi", "smPercent": "40"},
    {"memory": "1Gi", "clients": "5"},
    {"memory": "1Gi", "shares": "2"},
]


def assert_sound(node: Node, product: str) -> None:
    """By card: one mode at most; partitions that the hardware accepts; of nothing more than there is."""
    held: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for result in node.results():
        held[result["pool"]][result["device"]] += 1
    for pool in node.inventory.pools:
        offers = {device.ref.device: device.offer for device in pool.devices}
        devices = held[pool.name]
        taken = [offers[name] for name in devices if offers[name].sharing != Monitor()]
        assert_one_mode(taken, product)
        assert all(number == 1 for name, number in devices.items() if offers[name].sharing == Exclusive())
        for name in devices:
            assert_not_oversold(node, pool.name, name)


def assert_one_mode(taken: Sequence[Offer], product: str) -> None:
    partitions = [offer.slice_ for offer in taken if isinstance(offer.slice_, MigSlice)]
    if len(partitions) < len(taken):
        assert len(taken) == 1  # one device has the whole card, and nobody else anything of it
    else:
        instances = [(slice_.profile, slice_.placement) for slice_ in partitions]
        assert not instances or geometry.legal(models.product(product).engines, instances)


def assert_not_oversold(node: Node, pool: str, name: str) -> None:
    (device,) = (
        device
        for body in node.slices
        if body["spec"]["pool"]["name"] == pool
        for device in body["spec"].get("devices", ())
        if device["name"] == name
    )
    shares = [result for result in node.results() if (result["pool"], result["device"]) == (pool, name)]
    for capacity, entry in device["capacity"].items():
        charged = sum(quantity.parse(share.get("consumedCapacity", {}).get(capacity, "0")) for share in shares)
        assert charged <= quantity.parse(entry["value"]), (name, capacity)


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
@pytest.mark.parametrize("memory", ["5120", "1", "0", "1Mi", "100m"])
def test_a_request_for_less_than_the_least_share_is_charged_the_least(mode: str, memory: str) -> None:
    node = Node(a_node_of("h100", 1, twins=False))

    assert node.ask(mode, memory=memory) == f"0/{mode}"

    assert node.results()[0]["consumedCapacity"]["memory"] == "256Mi"


def test_the_least_share_is_a_matter_of_policy_and_never_more_than_an_equal_part() -> None:
    policies: list[tuple[dict[str, Any], str]] = [
        ({"leastShare": "1Gi"}, "1Gi"),
        ({"leastShare": "16Mi"}, "16Mi"),
        ({"leastShare": "40Gi"}, "20288Mi"),
        ({"sharedPartitions": ["timeslice"], "timeslice": {"shares": 100}}, "99Mi"),  # a hundredth of a partition
    ]
    for policy, least in policies:
        node = Node(an_inventory(policy=a_policy(**policy)))
        device = "mig-1g-19-0-timeslice" if "sharedPartitions" in policy else "timeslice"
        assert node.ask("timeslice", device=device, memory="1") == f"0/{device}"
        assert node.results()[0]["consumedCapacity"]["memory"] == least


def test_a_least_share_that_a_card_cannot_have_is_told() -> None:
    notes = [note.sentence for note in an_inventory(policy=a_policy(leastShare="40Gi")).notes]

    assert notes == [
        f"policy: default.leastShare is 40960 MiB, but one of 4 shares of GPU 0 (NVIDIA H100 80GB HBM3) by {mode} is 20288 "
        "MiB; make fewer shares, or write a smaller leastShare; until then the least is 20288 MiB"
        for mode in ("mps", "timeslice")
    ]
    assert an_inventory().notes == ()


def test_a_monitor_takes_nothing_from_whoever_has_the_card() -> None:
    node = Node(a_node_of("h100", 1, twins=False))

    for _ in range(4):
        assert node.ask("mps") == "0/mps"

    assert node.ask("monitor") == "0/monitor"
