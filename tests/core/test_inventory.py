"""What a node offers, by name and in order."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import (
    API_VERSION,
    DeviceRef,
    Exclusive,
    GpuUuid,
    MigSlice,
    Monitor,
    Mps,
    Offer,
    PoolName,
    TimeSlicing,
    WholeGpu,
)
from gpuslice.core.policy.reading import KIND
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ConfigError
from gpuslice.nvml.sim import geometry, models

from tests.kit.builders import a_gpu, a_policy, an_inventory

POOL = PoolName("node-1/0000-3b-00-0")


def names(inventory: Inventory, pool: int = 0) -> list[str]:
    return [device.ref.device for device in inventory.pools[pool].devices]


def said(inventory: Inventory, pattern: str) -> bool:
    return any(re.search(pattern, note.sentence) for note in inventory.notes)


def test_a_card_is_a_pool_named_after_its_place_on_the_bus() -> None:
    inventory = an_inventory(a_gpu(bus_id="0000:3B:00.0"))

    assert [pool.name for pool in inventory.pools] == [POOL]


def test_pools_come_in_bus_order_whatever_the_index() -> None:
    late, early = a_gpu(index=0, bus_id="0000:c1:00.0"), a_gpu(index=1, bus_id="0000:0a:00.0")

    assert [pool.gpu for pool in an_inventory(late, early).pools] == [early, late]


def test_partitions_come_smallest_first_and_at_the_place_that_excludes_fewest() -> None:
    assert names(an_inventory(a_gpu("h100"))) == [
        "mig-1g-19-6",
        "mig-1g-19-5",
        "mig-1g-19-4",
        "mig-1g-19-3",
        "mig-1g-19-2",
        "mig-1g-19-1",
        "mig-1g-19-0",
        "mig-1g-15-6",
        "mig-1g-15-4",
        "mig-1g-15-2",
        "mig-1g-15-0",
        "mig-2g-14-4",
        "mig-2g-14-2",
        "mig-2g-14-0",
        "mig-3g-9-4",
        "mig-3g-9-0",
        "mig-4g-5-0",
        "mig-7g-0-0",
        "mps",
        "timeslice",
        "gpu",
        "monitor",
    ]


def test_a_plain_partition_comes_before_one_of_its_size_with_media_engines() -> None:
    found = names(an_inventory(a_gpu("h100"), policy=a_policy(suffixes=["+me"])))

    assert found.index("mig-1g-19-0") < found.index("mig-1g-20-6") < found.index("mig-1g-15-6")


def test_first_fit_in_this_order_leaves_room_for_the_large_ones() -> None:
    inventory = an_inventory(a_gpu("h100"))
    placed: list[geometry.Instance] = []
    for wanted in ("1g.10gb", "2g.20gb", "3g.40gb"):
        for device in inventory.pools[0].devices:
            slice_ = device.offer.slice_
            if isinstance(slice_, MigSlice) and slice_.profile.name == wanted:
                instance = (slice_.profile, slice_.placement)
                if geometry.legal(models.product("h100").engines, [*placed, instance]):
                    placed.append(instance)
                    break

    assert [(profile.name, placement.start) for profile, placement in placed] == [
        ("1g.10gb", 6),
        ("2g.20gb", 4),
        ("3g.40gb", 0),
    ]


def test_a_card_that_cannot_be_partitioned_is_offered_whole_and_in_shares() -> None:
    assert names(an_inventory(a_gpu("l4"))) == ["mps", "timeslice", "gpu", "monitor"]


def test_a_card_older_than_volta_is_not_offered_by_mps() -> None:
    assert names(an_inventory(a_gpu("l4", compute_capability="6.1"))) == ["timeslice", "gpu", "monitor"]


def test_without_mode_gpu_no_card_is_offered_whole() -> None:
    assert "gpu" not in names(an_inventory(policy=a_policy(modes=["mig"])))


def test_without_mode_mig_no_card_is_partitioned() -> None:
    assert names(an_inventory(policy=a_policy(modes=["gpu"]))) == ["gpu", "monitor"]


@pytest.mark.parametrize("product", models.known())
def test_device_names_are_unique_labels_on_every_product(product: str) -> None:
    found = names(an_inventory(a_gpu(product), policy=a_policy(suffixes=["+me", "+gfx", "-me", "+me.all"])))

    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in found)


def test_an_offer_is_found_by_pool_and_device() -> None:
    gpu = a_gpu("h100")
    inventory = an_inventory(gpu)

    whole, partition = inventory.offer(DeviceRef(POOL, "gpu")), inventory.offer(DeviceRef(POOL, "mig-3g-9-4"))

    assert whole is not None
    assert partition is not None
    assert (whole.slice_, whole.sharing) == (WholeGpu(gpu), Exclusive())
    assert isinstance(partition.slice_, MigSlice)
    assert (partition.slice_.profile.name, partition.slice_.placement.start) == ("3g.40gb", 4)
    assert inventory.offer(DeviceRef(POOL, "mps-0")) is None
    assert inventory.offer(DeviceRef(PoolName("node-2/0000-3b-00-0"), "gpu")) is None


def test_every_card_can_be_watched() -> None:
    inventory = an_inventory(a_gpu("h100", 0), a_gpu("l4", 1))

    for pool in inventory.pools:
        offer = inventory.offer(DeviceRef(pool.name, "monitor"))
        assert offer is not None
        assert offer.sharing == Monitor()


def test_a_card_is_found_by_its_uuid() -> None:
    gpu = a_gpu("h100", 1)

    assert an_inventory(a_gpu("h100"), gpu).gpu(gpu.uuid) == gpu
    assert an_inventory(gpu).gpu(GpuUuid("GPU-other")) is None


def test_the_same_node_has_the_same_inventory() -> None:
    assert an_inventory(a_gpu("h100"), a_gpu("a30", 1)) == an_inventory(a_gpu("a30", 1), a_gpu("h100"))


# ---------------------------------------------------------------- sharing


def sold(inventory: Inventory, device: str) -> Offer:
    offer = inventory.offer(DeviceRef(POOL, device))
    assert offer is not None
    return offer


def test_a_card_is_shared_by_what_the_reserve_leaves_of_it() -> None:
    gpu = a_gpu("h100")
    inventory = an_inventory(gpu, policy=a_policy(reserve="1Gi", mps={"shares": 8}, timeslice={"interval": "long"}))
    left = gpu.memory_bytes // 2**20 - 1024

    assert sold(inventory, "mps") == Offer(WholeGpu(gpu), Mps(8, left, 48))
    assert sold(inventory, "timeslice") == Offer(WholeGpu(gpu), TimeSlicing(4, left, "long"))


def test_shared_twins_come_after_all_partitions_of_their_profile() -> None:
    inventory = an_inventory(policy=a_policy(profiles=[9, 5], sharedPartitions=["timeslice", "mps"]))

    assert names(inventory) == [
        "mig-3g-9-4",
        "mig-3g-9-0",
        "mig-3g-9-4-mps",
        "mig-3g-9-0-mps",
        "mig-3g-9-4-timeslice",
        "mig-3g-9-0-timeslice",
        "mig-4g-5-0",
        "mig-4g-5-0-mps",
        "mig-4g-5-0-timeslice",
        "mps",
        "timeslice",
        "gpu",
        "monitor",
    ]


@pytest.mark.parametrize(
    ("device", "sharing"),
    [
        ("mig-1g-19-0-mps", Mps(5, 9984, 5)),  # 48 x 16 / 132 clients, and no more shares than clients
        ("mig-3g-9-4-mps", Mps(8, 40448, 21)),
        ("mig-7g-0-0-mps", Mps(8, 81152, 48)),
        ("mig-1g-19-0-timeslice", TimeSlicing(4, 9984)),  # an interval is the card's
    ],
)
def test_a_shared_partition_has_its_own_memory_and_its_part_of_the_clients(
    device: str, sharing: Mps | TimeSlicing
) -> None:
    offered = a_policy(mps={"shares": 8}, timeslice={"interval": "short"}, sharedPartitions=["mps", "timeslice"])

    offer = sold(an_inventory(policy=offered), device)

    assert isinstance(offer.slice_, MigSlice)
    assert offer.sharing == sharing


def test_the_smallest_partition_serves_at_least_one_client() -> None:
    inventory = an_inventory(policy=a_policy(mps={"shares": 2, "clients": 2}, sharedPartitions=["mps"]))

    assert sold(inventory, "mig-1g-19-0-mps").sharing == Mps(1, 9984, 1)


def test_of_shares_too_small_to_be_asked_for_there_are_fewer_and_a_note_says_so() -> None:
    inventory = an_inventory(policy=a_policy(timeslice={"shares": 50000}))

    assert said(inventory, r"default.timeslice: 50000 shares of GPU 0 .* would have less than 2 MiB each of 81152 MiB")
    assert sold(inventory, "timeslice").sharing == TimeSlicing(40576, 81152)


# ---------------------------------------------------------------- clusters without partitionable devices


def test_statically_a_card_is_whole_by_default() -> None:
    assert names(an_inventory(static=True)) == ["gpu", "monitor"]


def test_statically_a_layout_of_the_policy_replaces_the_whole_card() -> None:
    inventory = an_inventory(policy=a_policy(static={"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1}), static=True)

    assert names(inventory) == ["mig-1g-19-0", "mig-1g-19-1", "mig-2g-14-2", "mig-3g-9-4", "monitor"]


def test_statically_all_offered_partitions_stand_together() -> None:
    inventory = an_inventory(policy=a_policy(static={"1g.10gb": 4, "3g.40gb": 1}), static=True)
    slices = [device.offer.slice_ for device in inventory.pools[0].devices]

    instances = [(slice_.profile, slice_.placement) for slice_ in slices if isinstance(slice_, MigSlice)]

    assert len(instances) == 5
    assert geometry.legal(models.product("h100").engines, instances)


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        ({"4g.40gb": 2}, "2 x 4g.40gb"),
        ({"3g.40gb": 2, "1g.10gb": 1}, "2 x 3g.40gb, 1 x 1g.10gb"),
        ({"1g.10gb": 10**12}, "1000000000000 x 1g.10gb"),
    ],
)
def test_of_a_static_layout_that_does_not_fit_the_card_is_left_whole(layout: dict[str, int], named: str) -> None:
    inventory = an_inventory(policy=a_policy(static=layout), static=True)

    assert said(inventory, rf"static layout of GPU 0 \(NVIDIA H100 .*\), {named}, does not fit")
    assert names(inventory) == ["gpu", "monitor"]


def test_where_partitions_are_dynamic_the_static_layout_is_not_used() -> None:
    assert an_inventory(policy=a_policy(static={"1g.10gb": 7})) == an_inventory()


@pytest.mark.parametrize(("mode", "sharing"), [("mps", Mps(3, 81152, 48)), ("timeslice", TimeSlicing(3, 81152))])
def test_statically_a_card_may_be_cut_into_equal_parts(mode: str, sharing: Mps | TimeSlicing) -> None:
    inventory = an_inventory(policy=a_policy(static={mode: 3}), static=True)

    assert names(inventory) == [f"{mode}-0", f"{mode}-1", f"{mode}-2", "monitor"]
    for part in range(3):
        assert sold(inventory, f"{mode}-{part}").sharing == replace(sharing, part=part)


def test_of_more_static_parts_than_mps_clients_the_card_is_left_whole() -> None:
    inventory = an_inventory(policy=a_policy(static={"mps": 49}), static=True)

    assert said(inventory, r"cuts GPU 0 .* into 49 parts, but the card has only 48 MPS clients")
    assert names(inventory) == ["gpu", "monitor"]


def test_an_inventory_that_knows_another_finds_its_devices_and_publishes_its_own() -> None:
    offered = a_policy(static={"mps": 2})
    dynamic, static = an_inventory(policy=offered), an_inventory(policy=offered, static=True)

    both = dynamic.knowing(static)

    assert both.pools == dynamic.pools
    assert both == dynamic
    assert sold(both, "mps-1") == sold(static, "mps-1")
    assert sold(both, "mps") == sold(dynamic, "mps")
    assert dynamic.offer(DeviceRef(POOL, "mps-1")) is None


# ---------------------------------------------------------------- what cannot be


def test_of_a_reserve_of_the_whole_card_only_what_the_driver_keeps_is_reserved() -> None:
    inventory = an_inventory(policy=a_policy(reserve="100Gi"))

    assert said(inventory, r"default.reserve is 102400 MiB, but GPU 0 \(NVIDIA H100 80GB HBM3\) has only 81559 MiB")
    assert inventory.pools == an_inventory().pools


UNSUITED = {
    "reserve": (a_policy(reserve="20Gi"), "t4"),
    "shares": (a_policy(timeslice={"shares": 16384}), "l4"),
    "static layout of another product": (a_policy(static={"1g.10gb": 7}), "a100-40g"),
    "static parts": (a_policy(static={"timeslice": 16384}), "l4"),
    "profile of a card named by its UUID": (
        Policy.parse(
            {"apiVersion": API_VERSION, "kind": KIND}
            | {"gpus": [{"match": {"uuid": a_gpu("a100-40g", 1).uuid}, "profiles": ["1g.10gb+me"]}]}
        ),
        "a100-40g",
    ),
    "a bus id that names no pool": (Policy.default(), ""),
}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("why", UNSUITED)
def test_a_policy_that_does_not_suit_one_card_leaves_the_others_as_they_are(why: str, static: bool) -> None:
    policy, product = UNSUITED[why]
    odd = a_gpu(product, 1) if product else a_gpu("l4", 1, bus_id="")
    inventory = an_inventory(a_gpu(), odd, policy=policy, static=static)

    assert inventory.pools[0] == an_inventory(policy=policy, static=static).pools[0]
    assert [pool.gpu for pool in inventory.pools[1:]] == ([odd] if product else [])
    assert all("gpu" in names(inventory, 1) for _ in inventory.pools[1:])
    assert said(inventory, r"GPU 1|gpus\[0\]") or (why.startswith("static") and not static)


@pytest.mark.parametrize("static", [False, True])
def test_a_card_without_memory_of_its_own_is_offered_whole_and_by_time(static: bool) -> None:
    gb10 = replace(a_gpu("l4", 1), product="NVIDIA GB10", memory_bytes=0, reserved_bytes=0)
    inventory = an_inventory(a_gpu(), gb10, static=static)

    assert names(inventory, 1) == (["gpu", "monitor"] if static else ["timeslice", "gpu", "monitor"])
    assert inventory.pools[1].memory_mib == 0
    assert said(inventory, r"GPU 1 \(NVIDIA GB10\) has no memory of its own that MPS could divide")


@pytest.mark.parametrize("node", ["Node-1", "a_b", "", "a" * 250])
def test_a_node_that_cannot_name_a_pool_is_refused(node: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot be the name of a pool|is too long"):
        an_inventory(node=node)
