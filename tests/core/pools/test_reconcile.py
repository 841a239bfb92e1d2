"""What the pure diff decides, case by case as Kubernetes' own controller does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from gpuslice.core.model import PoolName
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Change, Create, Delete, Owner, Update

Body = dict[str, Any]

OWNER = Owner("gpuslice.dev", "node-1", "uid-of-node-1")
COUNTERS: Body = {"sharedCounters": [{"name": "card", "counters": {"memory-0": {"value": "2"}}}]}


def devices(*names: str, **fields: object) -> Body:
    return {"devices": [{"name": name, **fields} for name in names]}


def a_pool(*specs: Mapping[str, object], name: str = "node-1/a") -> PoolSlices:
    return PoolSlices(PoolName(name), specs)


def written(changes: tuple[Change, ...], existing: tuple[Body, ...] = (), at: int = 1) -> tuple[Body, ...]:
    """What the API has after these changes, names completed as the server would."""
    bodies = {body["metadata"]["name"]: body for body in existing}
    for number, change in enumerate(changes, at):
        meta = change.body["metadata"]
        match change:
            case Delete():
                del bodies[meta["name"]]
            case Update():
                bodies[meta["name"]] = change.body
            case Create():
                name = f"{meta['generateName'][:58]}{number:05}"
                stamps = {"name": name, "uid": f"uid-{number}", "resourceVersion": str(number)}
                bodies[name] = change.body | {"metadata": meta | stamps | {"creationTimestamp": f"t{number:02}"}}
    return tuple(bodies.values())


def after(*pools: PoolSlices) -> tuple[Body, ...]:
    return written(reconcile.changes(pools, (), OWNER))


def shape(changes: tuple[Change, ...]) -> list[tuple[str, int]]:
    """Verb and generation of each change."""
    return [(type(change).__name__, change.body["spec"]["pool"]["generation"]) for change in changes]


@pytest.mark.contract(48, 49, 57)
def test_a_first_publish_creates_every_slice_with_generation_one_count_node_and_owner() -> None:
    changes = reconcile.changes([a_pool(COUNTERS, devices("gpu"))], (), OWNER)

    assert shape(changes) == [("Create", 1), ("Create", 1)]
    for change in changes:
        assert change.body["spec"]["pool"] == {"name": "node-1/a", "generation": 1, "resourceSliceCount": 2}
        assert change.body["spec"]["nodeName"] == "node-1"
        (owner,) = change.body["metadata"]["ownerReferences"]
        assert owner == {
            "apiVersion": "v1",
            "kind": "Node",
            "name": "node-1",
            "uid": "uid-of-node-1",
            "controller": True,
        }


@pytest.mark.contract(52)
def test_nothing_is_written_when_nothing_changed() -> None:
    pool = a_pool(COUNTERS, devices("gpu", "mps"))

    assert reconcile.changes([pool], after(pool), OWNER) == ()


@pytest.mark.contract(52)
def test_another_spelling_of_a_quantity_and_empty_fields_are_no_change() -> None:
    pool = a_pool(devices("gpu", capacity={"memory": {"value": "2048Mi"}}, taints=[], attributes={"a": {"string": ""}}))
    canonical = a_pool(devices("gpu", capacity={"memory": {"value": "2Gi"}}, attributes={"a": {"string": ""}}))

    assert reconcile.changes([pool], after(canonical), OWNER) == ()


@pytest.mark.contract(48)
def test_one_changed_slice_is_updated_in_its_generation() -> None:
    before = after(a_pool(COUNTERS, devices("gpu")))

    assert shape(reconcile.changes([a_pool(COUNTERS, devices("mps"))], before, OWNER)) == [("Update", 1)]


@pytest.mark.contract(48)
def test_two_changed_slices_move_all_to_the_next_generation() -> None:
    before = after(a_pool(COUNTERS, devices("a"), devices("b")))

    changes = reconcile.changes([a_pool(COUNTERS, devices("c"), devices("d"))], before, OWNER)

    assert shape(changes) == [("Update", 2), ("Update", 2), ("Update", 2)]


@pytest.mark.contract(48, 49)
def test_a_new_slice_moves_all_to_the_next_generation_and_is_created_last() -> None:
    before = after(a_pool(COUNTERS, devices("a")))

    changes = reconcile.changes([a_pool(COUNTERS, devices("a"), devices("b"))], before, OWNER)

    assert shape(changes) == [("Update", 2), ("Update", 2), ("Create", 2)]
    assert {change.body["spec"]["pool"]["resourceSliceCount"] for change in changes} == {3}


@pytest.mark.contract(48, 51)
def test_a_pool_that_shrinks_to_one_slice_keeps_its_generation() -> None:
    before = after(a_pool(devices("a"), devices("b")))

    changes = reconcile.changes([a_pool(devices("a"))], before, OWNER)

    assert shape(changes) == [("Delete", 1), ("Update", 1)]


@pytest.mark.contract(53)
def test_another_order_of_devices_is_a_change() -> None:
    before = after(a_pool(devices("a", "b")))

    assert shape(reconcile.changes([a_pool(devices("b", "a"))], before, OWNER)) == [("Update", 1)]


@pytest.mark.contract(50)
def test_names_begin_with_the_index_in_five_or_more_hex_digits_all_of_one_width() -> None:
    (create,) = reconcile.changes([a_pool(devices("gpu"))], (), OWNER)

    assert create.body["metadata"]["generateName"] == "00000-gpuslice.dev-node-1-"
    assert reconcile.name_base(0xFFFFF, 0x100000, OWNER) == "fffff-gpuslice.dev-node-1-"
    assert reconcile.name_base(0, 0x100001, OWNER) == "000000-gpuslice.dev-node-1-"
    assert reconcile.name_base(0x100000, 0x100001, OWNER) == "100000-gpuslice.dev-node-1-"


@pytest.mark.contract(50)
def test_the_index_survives_a_node_name_that_the_server_cuts() -> None:
    owner = Owner("gpuslice.dev", "a-node-with-a-name" * 10, "uid")
    pool = a_pool(COUNTERS, devices("gpu"))
    published = written(reconcile.changes([pool], (), owner))

    assert reconcile.changes([pool], published, owner) == ()


@pytest.mark.contract(51)
@pytest.mark.parametrize(
    "name", ["node-1-x", "0001-too-short", "000001-too-long", "00007-out-of-range", "0000G-no-hex"]
)
def test_a_misnamed_slice_is_deleted_first_and_made_again_in_a_new_generation(name: str) -> None:
    pool = a_pool(devices("gpu"))
    (body,) = after(pool)
    misnamed = body | {"metadata": body["metadata"] | {"name": name}}

    changes = reconcile.changes([pool], (misnamed,), OWNER)

    assert shape(changes) == [("Delete", 1), ("Create", 2)]
    assert changes[0].body is misnamed


@pytest.mark.contract(51, 69)
def test_of_two_slices_with_one_index_every_instance_keeps_the_older() -> None:
    pool = a_pool(devices("gpu"))
    (older,) = after(pool)
    (younger,) = written(reconcile.changes([pool], (), OWNER), at=9)

    for seen in ((older, younger), (younger, older)):
        assert reconcile.changes([pool], seen, OWNER) == (Delete(pool.name, younger),)


@pytest.mark.contract(51)
def test_a_slice_of_a_lower_generation_is_deleted_before_anything_else() -> None:
    pool = a_pool(COUNTERS, devices("gpu"))
    first, second = after(pool)
    old = first | {"spec": first["spec"] | {"pool": first["spec"]["pool"] | {"generation": 0}}}

    assert shape(reconcile.changes([pool], (old, second), OWNER)) == [("Delete", 0), ("Update", 2), ("Create", 2)]


@pytest.mark.contract(54)
def test_an_update_keeps_the_times_of_taints_that_stay() -> None:
    old = {"key": "gpuslice.dev/xid", "value": "79", "effect": "NoSchedule"}
    new = {"key": "gpuslice.dev/hung", "effect": "NoSchedule"}
    (body,) = after(a_pool(devices("gpu", taints=[old | {"timeAdded": "2026-01-01T00:00:00Z"}])))

    (change,) = reconcile.changes([a_pool(devices("gpu", taints=[old, new]))], (body,), OWNER)

    assert change.body["spec"]["devices"][0]["taints"] == [old | {"timeAdded": "2026-01-01T00:00:00Z"}, new]


@pytest.mark.contract(54)
def test_times_that_the_server_set_or_rounded_are_no_change() -> None:
    taint = {"key": "gpuslice.dev/xid", "value": "", "effect": "NoSchedule"}
    theirs = {"key": "gpuslice.dev/xid", "effect": "NoSchedule", "timeAdded": "2026-01-01T00:00:00Z"}
    wanted = taint | {"timeAdded": "2026-01-01T00:00:01Z"}

    for mine in (taint, wanted):
        assert (
            reconcile.changes(
                [a_pool(devices("a", taints=[mine]))], after(a_pool(devices("a", taints=[theirs]))), OWNER
            )
            == ()
        )


@pytest.mark.contract(47)
def test_a_pool_without_slices_is_published_as_one_empty_slice() -> None:
    (change,) = reconcile.changes([a_pool()], (), OWNER)

    assert change.body["spec"]["pool"]["resourceSliceCount"] == 1
    assert "devices" not in change.body["spec"]


@pytest.mark.contract(58)
def test_slices_of_pools_no_longer_wanted_are_deleted_and_nobody_elses() -> None:
    mine = after(a_pool(devices("gpu"), name="node-1/old"))[0]
    other_driver = mine | {"spec": mine["spec"] | {"driver": "other.dev"}}
    other_node = mine | {"spec": mine["spec"] | {"nodeName": "node-2"}}

    assert reconcile.changes([], (mine, other_driver, other_node), OWNER) == (Delete(PoolName("node-1/old"), mine),)


@pytest.mark.contract(57)
def test_slices_get_the_owner_of_a_node_that_was_registered_again() -> None:
    pool = a_pool(devices("gpu"))

    (change,) = reconcile.changes([pool], after(pool), Owner("gpuslice.dev", "node-1", "new-uid"))

    assert change.body["metadata"]["ownerReferences"][0]["uid"] == "new-uid"


def test_counters_are_created_before_the_devices_that_draw_on_them() -> None:
    changes = reconcile.changes([a_pool(devices("a"), devices("b"), COUNTERS)], (), OWNER)

    assert ["sharedCounters" in change.body["spec"] for change in changes] == [True, False, False]


@pytest.mark.contract(56)
@pytest.mark.parametrize(
    ("sent", "returned", "gate"),
    [
        (COUNTERS, {}, reconcile.PARTITIONABLE),
        (
            devices("a", consumesCounters=[{"counterSet": "card", "counters": {}}]),
            devices("a"),
            reconcile.PARTITIONABLE,
        ),
        (devices("a", allowMultipleAllocations=True), devices("a"), reconcile.CONSUMABLE),
        (
            devices("a", allowMultipleAllocations=True, capacity={"memory": {"requestPolicy": {"default": "1"}}}),
            devices("a", allowMultipleAllocations=True, capacity={"memory": {"value": "1"}}),
            reconcile.CONSUMABLE,
        ),
        (devices("a", taints=[{"key": "k", "effect": "NoSchedule"}]), devices("a"), reconcile.TAINTS),
        (devices("a", attributes={"list": {"ints": [1]}}), devices("a"), reconcile.UNKNOWN),
    ],
)
def test_a_dropped_field_names_its_gate(sent: Body, returned: Body, gate: str) -> None:
    assert reconcile.dropped(sent, returned) == {gate}
    assert reconcile.dropped(sent, sent) == frozenset()
