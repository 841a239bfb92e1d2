"""Decisions of prepare and unprepare, as values."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpuslice.core import plan
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import (
    Allocation,
    Claim,
    ClaimRef,
    ClaimUid,
    DeviceRef,
    Gpu,
    GpuUuid,
    LiveGpu,
    MigSlot,
    MigUuid,
    Partition,
    Placement,
)
from gpuslice.core.policy.rules import Policy
from gpuslice.core.record import Busy, CreateMig, DestroyMig, MadeMig, Plan, Record, SetMigMode
from gpuslice.errors import ClaimError, DeviceError

from tests.kit.builders import a_gpu

H100 = a_gpu("h100", 0)
OFF, ON = LiveGpu(mig=False, mig_pending=False), LiveGpu(mig=True, mig_pending=True)
SLOT = MigSlot(H100.uuid, 19, Placement(0, 1))


def an_inventory(*gpus: Gpu) -> Inventory:
    return Inventory.of(gpus, Policy.default(), "n")


NODE = an_inventory(H100)


def a_claim(*devices: str, name: str = "one", admin: bool = False, inventory: Inventory = NODE) -> Claim:
    pool = inventory.pools[0].name
    allocations = (Allocation(request="gpu", device=DeviceRef(pool, device), admin=admin) for device in devices)
    return Claim(ClaimRef("default", name, ClaimUid(f"uid-{name}")), tuple(allocations))


def made(claim: Claim, *records: Record, live: LiveGpu = ON, inventory: Inventory = NODE) -> Plan:
    decision = plan.make(
        claim.ref, plan.grants(claim, inventory), inventory, records, {pool.gpu.uuid: live for pool in inventory.pools}
    )
    assert isinstance(decision, Plan), decision
    return decision


def busy(claim: Claim, *records: Record) -> tuple[str, ...]:
    decision = plan.make(claim.ref, plan.grants(claim, NODE), NODE, records, {H100.uuid: ON})
    assert isinstance(decision, Busy), decision
    return tuple(holder.name for holder in decision.holders)


def held(*devices: str, name: str = "holder", admin: bool = False) -> Record:
    return Record(
        Plan(a_claim(*devices, name=name).ref, plan.grants(a_claim(*devices, name=name, admin=admin), NODE), ())
    )


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize(
    ("device", "live", "steps"),
    [
        ("gpu", OFF, ()),
        ("gpu", ON, (SetMigMode(H100.uuid, False),)),
        ("mig-1g-19-0", ON, (CreateMig(SLOT),)),
        ("mig-1g-19-0", OFF, (SetMigMode(H100.uuid, True), CreateMig(SLOT))),
    ],
)
def test_steps_switch_mig_mode_only_where_it_differs(device: str, live: LiveGpu, steps: tuple[object, ...]) -> None:
    assert made(a_claim(device), live=live).steps == steps


def test_two_partitions_of_one_card_switch_its_mode_once() -> None:
    steps = made(a_claim("mig-1g-19-0", "mig-3g-9-4"), live=OFF).steps

    assert [type(step).__name__ for step in steps] == ["SetMigMode", "CreateMig", "CreateMig"]


def test_watching_takes_no_step_and_no_gpu() -> None:
    decided = made(a_claim("monitor", admin=True))

    assert decided.steps == ()
    assert decided.gpus == ()
    assert decided.named == (H100.uuid,)


def test_a_card_without_mig_is_given_as_it_is() -> None:
    inventory = an_inventory(a_gpu("l4", 0))

    assert made(a_claim("gpu", inventory=inventory), live=OFF, inventory=inventory).steps == ()


@pytest.mark.parametrize(("device", "live"), [("gpu", ON), ("mig-1g-19-0", OFF)])
def test_a_mode_that_needs_a_reset_is_refused_with_instructions(device: str, live: LiveGpu) -> None:
    inventory = an_inventory(a_gpu("a100-40g", 0))

    with pytest.raises(DeviceError, match=rf"nvidia-smi -i {inventory.pools[0].gpu.bus_id} -mig [01] and reset"):
        made(a_claim(device, inventory=inventory), live=live, inventory=inventory)


def test_a_mode_change_that_is_pending_is_told() -> None:
    with pytest.raises(DeviceError, match="waits for a reset"):
        made(a_claim("gpu"), live=LiveGpu(mig=False, mig_pending=True))


# ---------------------------------------------------------------- who is in the way


@pytest.mark.parametrize(
    ("wanted", "holder", "free"),
    [
        ("gpu", "gpu", False),
        ("gpu", "mig-1g-19-0", False),
        ("mig-1g-19-0", "gpu", False),
        ("mig-1g-19-0", "mig-1g-19-0", False),
        ("mig-1g-19-0", "mig-2g-14-0", False),
        ("mig-1g-19-2", "mig-2g-14-0", True),
        ("mig-3g-9-0", "mig-3g-9-4", True),
        ("mig-7g-0-0", "mig-1g-19-6", False),
    ],
)
def test_what_another_claim_holds_makes_busy_only_what_it_excludes(wanted: str, holder: str, free: bool) -> None:
    if free:
        assert made(a_claim(wanted), held(holder)).grants
    else:
        assert busy(a_claim(wanted), held(holder)) == ("holder",)


def test_every_holder_in_the_way_is_named_once() -> None:
    records = held("mig-1g-19-0", "mig-1g-19-1", name="b"), held("mig-1g-19-2", name="a"), held("mig-1g-19-6", name="c")

    assert busy(a_claim("mig-3g-9-0"), *records) == ("a", "b")


def test_a_watcher_is_in_nobodys_way() -> None:
    assert made(a_claim("gpu"), held("monitor", admin=True), held("gpu", name="b", admin=True)).grants


def test_a_holder_on_a_card_that_is_unknown_by_now_does_not_stop_the_others() -> None:
    gone = held("gpu")
    gone = replace(gone, plan=replace(gone.plan, grants=(replace(gone.plan.grants[0], gpu=GpuUuid("GPU-gone")),)))

    assert made(a_claim("gpu"), gone).grants


def test_a_claim_whose_devices_exclude_each_other_is_the_schedulers_fault() -> None:
    with pytest.raises(ClaimError, match="cannot exist together; delete the pod"):
        made(a_claim("mig-1g-19-0", "mig-2g-14-0"))


# ---------------------------------------------------------------- back


def a_record(*done: MadeMig) -> Record:
    return Record(made(a_claim("mig-1g-19-0"), live=OFF), done)


def test_undo_names_the_partition_by_its_uuid_where_one_was_written() -> None:
    first, last = MadeMig(slot=SLOT, gi=7), MadeMig(slot=SLOT, gi=7, ci=0, uuid=MigUuid("MIG-a"))

    assert plan.undo(a_record(first, last), ()) == (DestroyMig(SLOT, MigUuid("MIG-a")),)
    assert plan.undo(a_record(first), ()) == (DestroyMig(SLOT, None),)
    assert plan.undo(a_record(), ()) == (DestroyMig(SLOT, None),)


def test_what_another_record_stands_on_is_not_undone() -> None:
    other = Record(made(a_claim("mig-1g-19-0", name="other")))

    assert plan.undo(a_record(), [other]) == ()


def a_partition(uuid: str | None, *, start: int = 0, gi: int = 7) -> Partition:
    return Partition(
        profile=19,
        placement=Placement(start, 1),
        gi=gi,
        ci=None if uuid is None else 0,
        uuid=None if uuid is None else MigUuid(uuid),
    )


@pytest.mark.parametrize(
    ("uuid", "there", "destroyed"),
    [
        (None, "MIG-a", True),  # nothing was written but the intent: the slot was empty before
        (None, None, True),
        ("MIG-a", "MIG-a", True),
        ("MIG-a", None, True),  # its compute instance is gone already
        ("MIG-a", "MIG-b", False),  # somebody else's by now
    ],
)
def test_the_target_of_an_undo_is_never_somebody_elses(uuid: str | None, there: str | None, destroyed: bool) -> None:
    live = LiveGpu(mig=True, mig_pending=True, partitions=(a_partition(there),))

    found = plan.target(DestroyMig(SLOT, None if uuid is None else MigUuid(uuid)), live)

    assert found == (live.partitions[0] if destroyed else None)


def test_what_is_gone_has_no_target() -> None:
    assert plan.target(DestroyMig(SLOT, MigUuid("MIG-a")), ON) is None


def test_strays_are_partitions_that_no_record_explains() -> None:
    ours, foreign = a_partition("MIG-a"), a_partition("MIG-b", start=3, gi=8)
    live = LiveGpu(mig=True, mig_pending=True, partitions=(ours, foreign))

    assert plan.foreign_partitions(H100.uuid, live, [a_record()]) == (foreign,)


def test_a_record_stands_while_all_it_made_is_there() -> None:
    record = a_record(MadeMig(slot=SLOT, gi=7), MadeMig(slot=SLOT, gi=7, ci=0, uuid=MigUuid("MIG-a")))

    assert plan.stands(record, {H100.uuid: LiveGpu(mig=True, mig_pending=True, partitions=(a_partition("MIG-a"),))})
    assert not plan.stands(record, {H100.uuid: LiveGpu(mig=True, mig_pending=True, partitions=(a_partition("MIG-b"),))})
