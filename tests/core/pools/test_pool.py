"""What is published of a node: slices, devices, counters, taints. Judged from the bodies, as a scheduler sees them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import DeviceRef, MigSlice, Monitor, Mps, Taint, TimeSlicing, WholeGpu
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import shape
from gpuslice.core.pools.pool import Features, PoolSlices, resource_slices
from gpuslice.core.pools.validation import problems
from gpuslice.errors import StateError
from gpuslice.nvml.sim import geometry, models
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.builders import a_gpu, a_policy, an_inventory

GOLDEN = Path(__file__).parents[2] / "golden"
ALL = Features(partitionable=True, consumable=True, taints=True)
OLD = Features(partitionable=False, consumable=False, taints=False)
MEDIA = ["+me", "-me", "+gfx", "+me.all"]

Device = Mapping[str, Any]


def slices(
    inventory: Inventory,
    taints: Mapping[DeviceRef, tuple[Taint, ...]] | None = None,
    features: Features = ALL,
    held: frozenset[DeviceRef] = frozenset(),
) -> tuple[PoolSlices, ...]:
    return resource_slices(inventory, taints or {}, driver="gpuslice.dev", features=features, held=held)


def lines(pools: Sequence[PoolSlices]) -> str:
    """One line for each pool, slice, counter set and device, so that a difference shows which."""
    found: list[object] = []
    for pool in pools:
        found.append({"pool": pool.name})
        for i, spec in enumerate(pool.specs):
            found.append({"slice": i})
            found += [*cast("Sequence[Device]", spec.get("sharedCounters") or spec.get("devices"))]
    return "".join(json.dumps(each) + "\n" for each in found)


def devices(pool: PoolSlices) -> dict[str, Device]:
    every = [device for spec in pool.specs for device in cast("Sequence[Device]", spec.get("devices", ()))]
    return {device["name"]: device for device in every}


def capacities(pool: PoolSlices) -> dict[str, int]:
    sets = [each for spec in pool.specs for each in cast("Sequence[Device]", spec.get("sharedCounters", ()))]
    return {name: int(value["value"]) for each in sets for name, value in each["counters"].items()}


def consumed(device: Device) -> dict[str, int]:
    return {
        name: int(value["value"])
        for each in device.get("consumesCounters", ())
        for name, value in each["counters"].items()
    }


def allows(pool: PoolSlices, names: Sequence[str]) -> bool:
    """What a scheduler decides: no counter beyond its value."""
    found = devices(pool)
    return all(
        sum(consumed(found[name]).get(counter, 0) for name in names) <= capacity
        for counter, capacity in capacities(pool).items()
    )


# ---------------------------------------------------------------- shape


@pytest.mark.parametrize(
    ("name", "cards", "offered"),
    [
        ("h100", ["h100"], Policy.default()),
        ("mixed", ["h100", "a30", "rtx-pro-6000", "l4"], a_policy(suffixes=MEDIA, reserve="1Gi")),
        ("shared", ["h100"], a_policy(profiles=[9, 0], mps={"shares": 8}, sharedPartitions=["mps", "timeslice"])),
    ],
)
def test_a_node_publishes_what_it_published_before(name: str, cards: list[str], offered: Policy) -> None:
    """After a wanted change: write `lines` to the file, and look at the difference."""
    inventory = an_inventory(*(a_gpu(product, i) for i, product in enumerate(cards)), policy=offered)

    assert lines(slices(inventory)) == (GOLDEN / f"slices-{name}.jsonl").read_text(encoding="utf-8")


@pytest.mark.contract(61, 62)
@pytest.mark.parametrize("product", models.known())
def test_every_product_with_all_its_profiles_is_within_the_limits(product: str) -> None:
    inventory = an_inventory(a_gpu(product), policy=a_policy(suffixes=MEDIA, sharedPartitions=["mps", "timeslice"]))
    taint = (Taint("mig-mode", "off"),)
    taints = {device.ref: taint for device in inventory.pools[0].devices}

    for pool in (*slices(inventory), *slices(inventory, taints)):
        assert problems(pool) == ()


@pytest.mark.contract(65)
def test_each_card_is_a_pool_of_its_own_that_no_other_node_has() -> None:
    cards = [a_gpu("h100", 0), a_gpu("h100", 1)]
    here, there = slices(an_inventory(*cards)), slices(an_inventory(*cards, node="node-2"))

    assert len({pool.name for pool in (*here, *there)}) == 4


def test_the_counters_of_a_card_come_first_in_a_slice_of_their_own() -> None:
    (pool,) = slices(an_inventory())

    assert [sorted(spec) for spec in pool.specs] == [["sharedCounters"], ["devices"]]


def test_a_card_that_is_only_whole_has_no_counters() -> None:
    (pool,) = slices(an_inventory(a_gpu("l4"), policy=a_policy(modes=["gpu"])))

    assert [sorted(spec) for spec in pool.specs] == [["devices"]]
    assert all("consumesCounters" not in device for device in devices(pool).values())


def test_many_devices_are_spread_over_several_slices_in_order() -> None:
    inventory = an_inventory(a_gpu("h100"))
    pool = inventory.pools[0]
    many = [replace(pool.devices[0], ref=DeviceRef(pool.name, f"mig-{i}")) for i in range(130)]
    crowded = Inventory((replace(pool, devices=tuple(many)),))

    (found,) = slices(crowded)

    assert [len(cast("Sequence[Device]", spec.get("devices", ()))) for spec in found.specs] == [0, 64, 64, 2]
    assert list(devices(found)) == [device.ref.device for device in many]
    assert problems(found) == ()


def test_the_same_inventory_gives_the_same_bytes() -> None:
    gpus = [a_gpu("h100", 0), a_gpu("a30", 1)]

    assert json.dumps([p.specs for p in slices(an_inventory(*gpus))]) == json.dumps(
        [p.specs for p in slices(an_inventory(*reversed(gpus)))]
    )


# ---------------------------------------------------------------- what a device shows


def test_every_device_of_a_mixed_node_has_the_same_keys_of_ours_so_that_no_selector_fails() -> None:
    pools = slices(an_inventory(a_gpu("h100"), a_gpu("l4", 1, numa_node=None, pcie_root=None)))
    every = [device for pool in pools for device in devices(pool).values()]

    assert len({frozenset(key for key in device["attributes"] if "/" not in key) for device in every}) == 1
    assert len({frozenset(device["capacity"]) for device in every}) == 1


def test_a_partition_shows_its_profile_and_what_it_has() -> None:
    (pool,) = slices(an_inventory(a_gpu("h100")))

    device = devices(pool)["mig-2g-14-4"]

    assert device["attributes"]["type"] == {"string": "mig"}
    assert device["attributes"]["profile"] == {"string": "2g.20gb"}
    assert device["attributes"]["uuid"] == {"string": ""}
    assert device["attributes"]["parentUUID"] == {"string": a_gpu("h100").uuid}
    assert device["attributes"]["resource.kubernetes.io/pciBusID"] == {"string": "0000:3b:00.0"}
    assert {name: value["value"] for name, value in device["capacity"].items()} == {
        "memory": "20096Mi",
        "smPercent": "24",
        "clients": "0",
        "shares": "0",
        "multiprocessors": "32",
        "copyEngines": "2",
        "decoders": "2",
        "encoders": "0",
        "jpegEngines": "2",
        "ofaEngines": "0",
    }


def test_a_whole_card_sells_its_memory_less_the_reserve() -> None:
    gpu = a_gpu("h100")
    (pool,) = slices(an_inventory(gpu, policy=a_policy(reserve="1Gi")))

    device = devices(pool)["gpu"]

    assert device["capacity"]["memory"] == {"value": f"{gpu.memory_bytes // 2**20 - 1024}Mi"}
    assert device["capacity"]["multiprocessors"] == {"value": "132"}
    assert device["capacity"]["smPercent"] == {"value": "100"}
    assert device["attributes"]["uuid"] == {"string": gpu.uuid}


def test_a_monitor_takes_nothing_and_is_of_no_other_type() -> None:
    (pool,) = slices(an_inventory())

    device = devices(pool)["monitor"]

    assert device["attributes"]["type"] == {"string": "monitor"}
    assert {value["value"] for value in device["capacity"].values()} == {"0"}
    assert "consumesCounters" not in device


@pytest.mark.parametrize(
    ("text", "version"), [("580.65.06", "580.65.6"), ("13.0", "13.0.0"), ("9", "9.0.0"), ("", "0.0.0")]
)
def test_versions_are_strict_semver(text: str, version: str) -> None:
    (pool,) = slices(an_inventory(a_gpu(driver_version=text)))

    assert devices(pool)["gpu"]["attributes"]["driverVersion"] == {"version": version}


def test_a_node_without_numa_or_pcie_root_leaves_the_attribute_out() -> None:
    (pool,) = slices(an_inventory(a_gpu(numa_node=-1, pcie_root=None)))

    found = devices(pool)["gpu"]["attributes"]

    assert "resource.kubernetes.io/numaNode" not in found
    assert "resource.kubernetes.io/pcieRoot" not in found


@pytest.mark.contract(64)
def test_exclusive_devices_carry_no_request_policy() -> None:
    for pool in slices(an_inventory(a_gpu("h100"), a_gpu("l4", 1), policy=a_policy(modes=["gpu", "mig"]))):
        for device in devices(pool).values():
            assert "allowMultipleAllocations" not in device
            assert all(set(value) == {"value"} for value in device["capacity"].values())


# ---------------------------------------------------------------- what a share shows


def range_of(default: str, least: str, step: str = "") -> dict[str, object]:
    return {"default": default, "validRange": {"min": least} | ({"step": step} if step else {})}


def taken(device: Device) -> dict[str, tuple[str, object]]:
    """The capacities of which a share takes something, or may."""
    found = {name: (entry["value"], entry["requestPolicy"]) for name, entry in device["capacity"].items()}
    return {name: entry for name, entry in found.items() if entry[1] != {"default": "0", "validValues": ["0"]}}


@pytest.mark.contract(64)
def test_a_share_takes_memory_a_ceiling_and_clients_or_memory_and_turns() -> None:
    (pool,) = slices(an_inventory(a_gpu("h100")))
    mps, timeslice = devices(pool)["mps"], devices(pool)["timeslice"]

    assert mps["allowMultipleAllocations"] is timeslice["allowMultipleAllocations"] is True
    assert taken(mps) == {
        "memory": ("81152Mi", range_of("20288Mi", "256Mi")),
        "smPercent": ("100", range_of("0", "0", "1")),
        "clients": ("48", range_of("12", "1", "1")),
    }
    assert taken(timeslice) == {
        "memory": ("81152Mi", range_of("20288Mi", "256Mi")),
        "shares": ("4", range_of("1", "1", "1")),
    }


def test_a_shared_partition_is_of_the_type_of_its_sharing_and_has_a_profile() -> None:
    (pool,) = slices(an_inventory(policy=a_policy(sharedPartitions=["mps", "timeslice"])))
    mps, timeslice, card = (devices(pool)[name] for name in ("mig-1g-19-6-mps", "mig-1g-19-6-timeslice", "mps"))

    shown = [(d["attributes"]["type"]["string"], d["attributes"]["profile"]["string"]) for d in (mps, timeslice, card)]
    assert shown == [("mps", "1g.10gb"), ("timeslice", "1g.10gb"), ("mps", "")]
    assert taken(mps) == {
        "memory": ("9984Mi", range_of("2496Mi", "256Mi")),
        "smPercent": ("100", range_of("0", "0", "1")),
        "clients": ("5", range_of("1", "1", "1")),
    }
    assert consumed(mps) == consumed(timeslice) == consumed(devices(pool)["mig-1g-19-6"])


def test_what_there_is_only_one_of_is_had_by_name_for_a_range_needs_room_for_a_step() -> None:
    offered = a_policy(timeslice={"shares": 1}, mps={"shares": 1, "clients": 1})
    (pool,) = slices(an_inventory(policy=offered))

    assert taken(devices(pool)["mps"])["clients"] == ("1", {"default": "1", "validValues": ["1"]})
    assert taken(devices(pool)["timeslice"])["shares"] == ("1", {"default": "1", "validValues": ["1"]})
    assert problems(pool) == ()


def test_a_selector_sees_how_memory_is_kept_and_how_long_a_turn_is() -> None:
    (pool,) = slices(an_inventory(policy=a_policy(timeslice={"interval": "short"}, sharedPartitions=["timeslice"])))

    def shown(name: str) -> tuple[str, str]:
        attributes = devices(pool)[name]["attributes"]
        return attributes["memoryEnforcement"]["string"], attributes["timeSliceInterval"]["string"]

    assert shown("mps") == ("mps", "")
    assert shown("timeslice") == ("none", "short")
    assert shown("mig-1g-19-6-timeslice") == ("none", "")
    assert shown("gpu") == shown("mig-1g-19-6") == ("hardware", "")


def test_modes_cost_the_scheduler_as_few_counters_as_can_be() -> None:
    def entries(pool: PoolSlices) -> int:
        return sum(len(consumed(device)) for device in devices(pool).values())

    (h100,), (l4,) = slices(an_inventory()), slices(an_inventory(a_gpu("l4")))
    (shared,) = slices(an_inventory(policy=a_policy(sharedPartitions=["mps", "timeslice"])))

    assert (entries(h100), entries(l4), entries(shared)) == (36, 3, 135)


# ---------------------------------------------------------------- counters, as the scheduler counts


@pytest.mark.parametrize("product", ["h100", "a30", "rtx-pro-6000"])
def test_whoever_has_the_whole_card_keeps_out_every_partition(product: str) -> None:
    (pool,) = slices(an_inventory(a_gpu(product), policy=a_policy(suffixes=MEDIA, sharedPartitions=["mps"])))

    for name in devices(pool):
        assert allows(pool, [name])
        for whole in ("gpu", "mps", "timeslice"):
            assert name == "monitor" or not allows(pool, [whole, name])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), product=st.sampled_from(["a100-40g", "h100", "a30", "rtx-pro-6000"]), media=st.booleans())
def test_any_sequence_of_claims_that_the_counters_allow_is_one_that_the_hardware_accepts(
    data: st.DataObject, product: str, media: bool
) -> None:
    inventory = an_inventory(a_gpu(product), policy=a_policy(suffixes=MEDIA) if media else None)
    (pool,) = slices(inventory)
    offers = {d.ref.device: d.offer for d in inventory.pools[0].devices if d.offer.sharing != Monitor()}
    held: list[str] = []
    for name in data.draw(st.lists(st.sampled_from(sorted(offers)), max_size=30)):
        if name in held:
            held.remove(name)
            continue
        wanted = [*held, name]
        parts = [offers[each].slice_ for each in wanted]
        instances = [(part.profile, part.placement) for part in parts if isinstance(part, MigSlice)]
        whole = any(isinstance(part, WholeGpu) for part in parts)
        accepted = len(parts) == 1 if whole else geometry.legal(models.product(product).engines, instances)
        assert allows(pool, wanted) == accepted, wanted
        if accepted:
            held = wanted


# ---------------------------------------------------------------- taints and old clusters


def test_what_is_not_to_be_had_now_is_tainted_under_the_drivers_domain() -> None:
    inventory = an_inventory()
    ref = inventory.pools[0].devices[0].ref
    taints = {ref: (Taint("mig-mode", "off", reason="why"), Taint("lost", "true", "NoExecute"))}

    (pool,) = slices(inventory, taints)

    assert devices(pool)[ref.device]["taints"] == [
        {"key": "gpuslice.dev/lost", "value": "true", "effect": "NoExecute"},
        {"key": "gpuslice.dev/mig-mode", "value": "off", "effect": "NoSchedule"},
    ]
    assert [name for name, device in devices(pool).items() if "taints" in device] == [ref.device]


@pytest.mark.contract(63)
def test_taints_change_neither_devices_nor_counters() -> None:
    inventory = an_inventory()
    taints = {device.ref: (Taint("lost", "true"),) for device in inventory.pools[0].devices}

    (clean,), (tainted,) = slices(inventory), slices(inventory, taints)

    assert [{**device, "taints": None} for device in devices(clean).values()] == [
        {**device, "taints": None} for device in devices(tainted).values()
    ]
    assert capacities(clean) == capacities(tainted)


@pytest.mark.contract(63)
def test_where_taints_are_dropped_a_tainted_device_is_left_out_unless_a_claim_has_it() -> None:
    inventory = an_inventory()
    one, two, three = (device.ref for device in inventory.pools[0].devices[:3])
    taints = {one: (Taint("lost", "true"),), two: (Taint("lost", "true"),)}
    without = replace(ALL, taints=False)

    (pool,) = slices(inventory, taints, without, held=frozenset({two}))
    (before,) = slices(inventory, None, without)

    assert one.device not in devices(pool)
    assert devices(pool)[two.device] == devices(before)[two.device]
    assert devices(pool)[three.device] == devices(before)[three.device]
    assert capacities(pool) == capacities(before)


@pytest.mark.contract(47)
def test_a_pool_without_a_usable_device_is_published_empty() -> None:
    inventory = an_inventory(a_gpu("l4"), static=True)
    taints = {device.ref: (Taint("lost", "true"),) for device in inventory.pools[0].devices}

    (pool,) = slices(inventory, taints, OLD)

    assert pool.specs == ({"devices": []},)


def test_nothing_that_needs_counters_is_published_where_they_are_dropped() -> None:
    with pytest.raises(StateError, match="cannot be published without counters, which this API server drops"):
        slices(an_inventory(), features=OLD)


@pytest.mark.parametrize("layout", [{"1g.10gb": 7}, {"3g.40gb": 2}, {"2g.20gb": 3, "1g.10gb": 1}])
def test_a_static_layout_needs_no_counters(layout: dict[str, int]) -> None:
    (pool,) = slices(an_inventory(policy=a_policy(static=layout), static=True), features=OLD)

    assert capacities(pool) == {}
    assert len(devices(pool)) == sum(layout.values()) + 1
    assert problems(pool) == ()


@pytest.mark.parametrize(
    ("mode", "amounts"),
    [
        ("mps", {"memory": "20288Mi", "smPercent": "25", "clients": "12", "shares": "0"}),
        ("timeslice", {"memory": "20288Mi", "smPercent": "0", "clients": "0", "shares": "1"}),
    ],
)
def test_static_parts_are_plain_devices_with_a_part_of_everything(mode: str, amounts: dict[str, str]) -> None:
    (pool,) = slices(an_inventory(policy=a_policy(static={mode: 4}), static=True), features=OLD)

    assert capacities(pool) == {}
    assert problems(pool) == ()
    assert list(devices(pool)) == [*(f"{mode}-{part}" for part in range(4)), "monitor"]
    for part in range(4):
        device = devices(pool)[f"{mode}-{part}"]
        assert {"consumesCounters", "allowMultipleAllocations"}.isdisjoint(device)
        assert device["attributes"]["type"] == {"string": mode}
        assert {name: device["capacity"][name] for name in amounts} == {n: {"value": v} for n, v in amounts.items()}


def test_where_shares_are_dropped_no_shared_device_is_published_not_even_one_in_use() -> None:
    inventory = an_inventory(policy=a_policy(sharedPartitions=["mps"]))
    shared = [d.ref for d in inventory.pools[0].devices if isinstance(d.offer.sharing, Mps | TimeSlicing)]
    without = replace(ALL, consumable=False)

    (everything,), (pool,) = slices(inventory), slices(inventory, features=without, held=frozenset(shared))

    assert set(devices(everything)) - set(devices(pool)) == {ref.device for ref in shared}
    assert not any("allowMultipleAllocations" in device for device in devices(pool).values())


def test_shares_may_join_a_pool_in_use_once_the_api_server_knows_them_but_not_leave_it() -> None:
    inventory = an_inventory()
    (without,), (everything,) = slices(inventory, features=replace(ALL, consumable=False)), slices(inventory)

    assert shape.allows(without, everything)
    assert not shape.allows(everything, without)


def test_a_text_is_cut_by_bytes_and_never_inside_a_character() -> None:
    (pool,) = slices(an_inventory(replace(a_gpu("l4"), product="é" * 40)))

    assert {device["attributes"]["productName"]["string"] for device in devices(pool).values()} == {"é" * 32}
    assert problems(pool) == ()


def test_a_card_without_memory_is_shared_by_time_with_no_memory_to_ask_for() -> None:
    (pool,) = slices(an_inventory(replace(a_gpu("l4"), memory_bytes=0, reserved_bytes=0)))

    memory = {name: device["capacity"]["memory"] for name, device in devices(pool).items()}
    nothing = {"default": "0", "validValues": ["0"]}
    assert memory == {
        "timeslice": {"value": "0", "requestPolicy": nothing},
        "gpu": {"value": "0"},
        "monitor": {"value": "0"},
    }
    assert problems(pool) == ()
