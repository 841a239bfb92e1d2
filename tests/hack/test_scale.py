"""hack/scale's pure parts: what it publishes is what the driver publishes, and what it reports. It measures elsewhere."""

from __future__ import annotations

from typing import Any, cast

from gpuslice.core.inventory import Inventory
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.pool import PoolSlices, resource_slices
from gpuslice.core.pools.reconcile import Owner
from gpuslice.core.pools.validation import problems

from hack.lib.scale import fleet
from hack.lib.scale.measure import KINDS, WHOLE, Figure
from hack.lib.scale.report import BASELINE, OURS, report, table
from tests.kit.builders import a_policy

NODE = fleet.FleetNode("node-007", "a-uid")
SIZE = {"nodes": 1, "cards": "h100x8", "pods": 1, "rounds": 2}


def _without_uuids(pools: tuple[PoolSlices, ...]) -> list[Any]:
    def bare(device: dict[str, Any]) -> dict[str, Any]:
        own = ("uuid", "parentUUID")
        return device | {"attributes": {k: v for k, v in device["attributes"].items() if k not in own}}

    specs = [cast("dict[str, Any]", spec) for pool in pools for spec in pool.specs]
    return [spec | {"devices": [bare(d) for d in spec["devices"]]} if "devices" in spec else spec for spec in specs]


def test_a_node_of_the_fleet_publishes_what_the_driver_plans_for_its_cards() -> None:
    gpus = fleet.cards()
    planned = fleet.plan(gpus, Policy.default())(NODE.name)

    real = resource_slices(
        Inventory.of(gpus, Policy.default(), NODE.name), {}, driver="gpuslice.dev", features=fleet.ALL
    )

    assert [pool.name for pool in planned] == [pool.name for pool in real]
    assert len(planned) == 8
    assert _without_uuids(tuple(planned)) == _without_uuids(real)
    assert [problems(pool) for pool in planned] == [()] * 8


def test_the_objects_are_those_that_a_publisher_finds_nothing_to_change_in() -> None:
    pools = fleet.plan(fleet.cards(), Policy.default())(NODE.name)

    stored = [
        {**body, "metadata": {**body["metadata"], "name": f"{body['metadata']['generateName']}{i}"}}
        for i, body in enumerate(fleet.slices(NODE, pools))
    ]

    assert len(stored) == 16
    assert reconcile.changes(pools, stored, Owner("gpuslice.dev", NODE.name, NODE.uid)) == ()


def test_no_two_cards_of_the_fleet_have_one_uuid() -> None:
    plan = fleet.plan(fleet.cards(), a_policy(modes=["gpu"]))
    devices = [
        device
        for node in ("node-001", "node-002")
        for pool in plan(node)
        for spec in pool.specs
        for device in cast("list[dict[str, Any]]", spec.get("devices", []))
        if device["name"] == "gpu"
    ]

    assert len({device["attributes"]["uuid"]["string"] for device in devices}) == len(devices) == 16


def test_the_baseline_has_nothing_but_whole_cards_and_no_counters() -> None:
    pools = fleet.plan(fleet.cards(), a_policy(modes=["gpu"]))(NODE.name)

    assert [[sorted(spec) for spec in pool.specs] for pool in pools] == [[["devices"]]] * 8


def test_every_kind_of_request_is_an_example_that_we_ship() -> None:
    for kind in KINDS:
        template, pod = kind.template(), kind.pod("a-pod")
        assert pod["metadata"]["name"] == "a-pod"
        assert pod["spec"]["resourceClaims"][0]["resourceClaimTemplateName"] == template["metadata"]["name"]


def test_ratios_are_taken_round_by_round() -> None:
    slow_then_fast = [Figure(10.0, 20.0), Figure(100.0, 20.0)]
    found = {(BASELINE, WHOLE): slow_then_fast, (OURS, WHOLE): [Figure(6.0, 30.0), Figure(50.0, 30.0)]}

    told = report(found, SIZE)

    base, ours = told["figures"]
    assert (base["ratio"], base["reached"]) == (1.0, None)
    assert ours["ratios"] == [0.6, 0.5]
    assert (ours["ratio"], ours["reached"], ours["scheduler_cpu_ms"]) == (0.55, True, 30.0)


def test_the_table_says_which_target_was_missed() -> None:
    found = {
        (BASELINE, WHOLE): [Figure(80.0, 12.0)],
        (OURS, WHOLE): [Figure(11.0, 100.0)],
        (OURS, KINDS[1]): [Figure(40.0, 30.0)],
    }

    lines = table(report(found, SIZE)).splitlines()

    assert lines[2].split() == ["whole", "GPUs", "only", "a", "whole", "GPU", "80.0", "12.0", "ms", "1.00"]
    assert lines[3].split()[-5:] == ["ms", "0.14", ">=", "0.5", "NO"]
    assert lines[4].split()[-5:] == ["ms", "0.50", ">=", "0.5", "yes"]
