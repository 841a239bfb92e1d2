"""Prepare and unprepare on a simulated node, without server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from gpuslice.core.model import Placement, Settings
from gpuslice.errors import ClaimError, DeviceError, StateError
from gpuslice.nvml.api import Code
from gpuslice.plugin.prepare import Scope

from tests.kit.rig import Rig, a_claim, a_ref


@pytest.fixture
def node(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def devices_of(spec: object) -> list[dict[str, dict[str, list[object]]]]:
    return cast(list[dict[str, dict[str, list[object]]]], cast(dict[str, object], spec)["devices"])


# ---------------------------------------------------------------- whole cards


def test_a_whole_card_is_given_with_its_uuid_and_memory(node: Rig) -> None:
    claim = a_claim("one", node.device("gpu"))

    prepared = node.prepare(claim)

    assert prepared.devices[0].uuid == node.gpus[0].uuid
    env = devices_of(node.cdi(claim))[0]["containerEdits"]["env"]
    assert f"GPUSLICE_GPU_0_UUID={node.gpus[0].uuid}" in env
    node.assert_agreed()


@pytest.mark.contract(34)
def test_cdi_names_carry_the_claim_and_are_there_when_prepare_answers(node: Rig) -> None:
    claim = a_claim("one", node.device("gpu", 0), node.device("gpu", 1))

    prepared = node.prepare(claim)

    names = [device["name"] for device in devices_of(node.cdi(claim))]
    assert [f"gpuslice.dev/claim={name}" for name in names] == [d.cdi_ids[0] for d in prepared.devices]
    assert all(str(name).startswith(claim.ref.uid) for name in names)
    assert len(set(map(str, names))) == 2


def test_a_card_is_free_again_after_unprepare(node: Rig) -> None:
    first = a_claim("one", node.device("gpu"))
    node.prepare(first)
    node.unprepare(first)
    node.assert_empty()

    node.prepare(a_claim("two", node.device("gpu")))


@pytest.mark.contract(30)
def test_a_second_claim_cannot_hold_the_same_card(node: Rig) -> None:
    node.prepare(a_claim("one", node.device("gpu")))

    assert node.busy(a_claim("two", node.device("gpu"))) == (a_ref("one"),)


# ---------------------------------------------------------------- partitions


def test_a_partition_is_made_on_demand_and_gone_after_unprepare(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-1g-19-6"))

    prepared = node.prepare(claim)

    (partition,) = node.partitions()
    assert (partition.profile, partition.placement) == (19, Placement(6, 1))
    assert prepared.devices[0].uuid == partition.uuid
    node.assert_agreed()
    node.unprepare(claim)
    assert node.partitions() == ()
    node.assert_empty()


def test_a_container_gets_the_nodes_and_the_budget_of_its_partition_only(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-1g-19-6"))
    node.prepare(claim)

    edits = devices_of(node.cdi(claim))[0]["containerEdits"]

    assert "GPUSLICE_GPU_0_PROFILE=1g.10gb" in edits["env"]
    assert "GPUSLICE_GPU_0_MEMORY_MIB=9984" in edits["env"]
    assert len(edits["deviceNodes"]) == 3  # the card, and the capabilities of the GPU and the compute instance


def test_seven_claims_share_one_card_by_partitions(node: Rig) -> None:
    for start in range(7):
        node.prepare(a_claim(f"c{start}", node.device(f"mig-1g-19-{start}")))

    assert len(node.partitions()) == 7
    node.assert_agreed()


@pytest.mark.contract(30)
def test_a_second_claim_cannot_hold_the_same_slot(node: Rig) -> None:
    node.prepare(a_claim("one", node.device("mig-1g-19-0")))

    assert node.busy(a_claim("two", node.device("mig-1g-19-0"))) == (a_ref("one"),)
    assert node.busy(a_claim("three", node.device("mig-3g-9-0"))) == (a_ref("one"),)


@pytest.mark.contract(31)
def test_a_card_in_one_mode_cannot_be_taken_in_another(node: Rig) -> None:
    node.prepare(a_claim("mig", node.device("mig-1g-19-0")))
    assert node.busy(a_claim("whole", node.device("gpu"))) == (a_ref("mig"),)

    node.prepare(a_claim("whole", node.device("gpu", 1)))
    assert node.busy(a_claim("late", node.device("mig-1g-19-0", 1))) == (a_ref("whole"),)


@pytest.mark.contract(44)
def test_the_mode_is_free_when_the_last_claim_has_left(node: Rig) -> None:
    first, second = a_claim("one", node.device("mig-1g-19-0")), a_claim("two", node.device("mig-1g-19-1"))
    node.prepare(first)
    node.prepare(second)
    whole = a_claim("whole", node.device("gpu"))
    node.unprepare(first)
    assert node.busy(whole) == (a_ref("two"),)
    node.unprepare(second)

    node.prepare(whole)


def test_mig_mode_is_switched_on_by_the_first_partition_and_off_by_the_next_whole_card(node: Rig) -> None:
    assert not node.mig()
    claim = a_claim("one", node.device("mig-1g-19-0"))
    node.prepare(claim)
    node.unprepare(claim)
    assert node.mig()  # lazily: a partition after a partition costs no switch

    node.prepare(a_claim("two", node.device("gpu")))

    assert not node.mig()


def test_a_switch_of_mig_mode_that_is_refused_names_the_process(node: Rig) -> None:
    node.nvml.run_process(node.gpus[0].uuid, pid=4242, name="dcgm")

    with pytest.raises(DeviceError, match=r"dcgm \(pid 4242\)"):
        node.prepare(a_claim("one", node.device("mig-1g-19-0")))
    node.assert_empty()

    node.nvml.end_process(4242)
    node.prepare(a_claim("one", node.device("mig-1g-19-0")))


def test_an_ampere_card_serves_only_what_its_mig_mode_allows(tmp_path: Path) -> None:
    node = Rig(tmp_path, "a100-40g")

    with pytest.raises(DeviceError, match=r"cannot switch it without a reset; .*-mig 1"):
        node.prepare(a_claim("one", node.device("mig-1g-19-0")))
    node.prepare(a_claim("two", node.device("gpu")))


def test_one_claim_takes_partitions_and_cards_of_several_gpus(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-3g-9-4"), node.device("gpu", 1), node.device("mig-1g-19-0"))

    prepared = node.prepare(claim)

    assert [device.uuid[:4] for device in prepared.devices] == ["MIG-", "GPU-", "MIG-"]
    node.assert_agreed()
    node.unprepare(claim)
    node.assert_empty()


def test_a_claim_with_devices_that_exclude_each_other_is_refused(node: Rig) -> None:
    with pytest.raises(ClaimError, match="cannot exist together"):
        node.prepare(a_claim("one", node.device("gpu"), node.device("mig-1g-19-0")))
    node.assert_empty()


# ---------------------------------------------------------------- foreign partitions


def test_a_foreign_partition_is_left_alone_and_named(node: Rig) -> None:
    gpu = node.gpus[0].uuid
    node.nvml.set_mig_mode(gpu, True)
    gi = node.nvml.create_gpu_instance(gpu, 19, Placement(0, 1))
    _, uuid = node.nvml.create_compute_instance(gpu, gi)

    with pytest.raises(DeviceError, match=rf"{uuid}.*did not make"):
        node.prepare(a_claim("one", node.device("mig-1g-19-0")))
    with pytest.raises(DeviceError, match=rf"{uuid}.*did not make"):
        node.prepare(a_claim("two", node.device("gpu")))
    beside = a_claim("three", node.device("mig-1g-19-1"))
    node.prepare(beside)
    node.unprepare(beside)

    assert [partition.uuid for partition in node.partitions()] == [uuid]


# ---------------------------------------------------------------- again and again


@pytest.mark.contract(27)
def test_a_repeated_prepare_answers_the_same_also_after_a_restart(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-2g-14-2"))
    first = node.prepare(claim)
    text = node.cdi(claim)

    assert node.prepare(claim) == first
    again = node.restart()
    assert again.prepare(claim) == first
    assert again.cdi(claim) == text


def test_a_cdi_file_that_somebody_removed_is_written_again(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-2g-14-2"))
    node.prepare(claim)
    text = node.cdi(claim)
    (node.folder / "cdi" / node.cdi_files()[0]).unlink()

    node.prepare(claim)

    assert node.cdi(claim) == text


def test_a_partition_that_was_destroyed_from_outside_is_made_anew(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-2g-14-2"))
    before = node.prepare(claim)
    (partition,) = node.partitions()
    assert partition.ci is not None
    node.nvml.destroy_compute_instance(node.gpus[0].uuid, partition.gi, partition.ci)
    node.nvml.destroy_gpu_instance(node.gpus[0].uuid, partition.gi)

    after = node.prepare(claim)

    assert after.devices[0].uuid != before.devices[0].uuid
    node.assert_agreed()


def test_a_claim_that_was_allocated_elsewhere_gives_the_old_device_back(node: Rig) -> None:
    node.prepare(a_claim("one", node.device("mig-1g-19-0")))

    node.prepare(a_claim("one", node.device("mig-3g-9-4", 1)))

    assert node.partitions(0) == ()
    assert len(node.partitions(1)) == 1
    node.assert_agreed()


@pytest.mark.contract(37)
def test_a_claim_without_devices_of_ours_is_prepared_without_a_file(node: Rig) -> None:
    claim = a_claim("none")

    assert node.prepare(claim).devices == ()
    assert node.cdi_files() == []
    node.unprepare(claim)
    node.assert_empty()


@pytest.mark.contract(32)
@pytest.mark.parametrize("name", ["mig-1g-19-7", "mig-9g-1-0", "gpu-7", "mps-0"])
def test_an_unknown_device_is_refused_with_a_sentence(node: Rig, name: str) -> None:
    with pytest.raises(ClaimError, match=rf"{name}, which this node does not offer.*delete the pod"):
        node.prepare(a_claim("one", node.device(name)))
    node.assert_empty()


# ---------------------------------------------------------------- admin access


@pytest.mark.contract(39)
def test_admin_access_takes_nothing_from_the_holder(node: Rig) -> None:
    holder, watcher = a_claim("one", node.device("gpu")), a_claim("dcgm", node.device("monitor"), admin=True)
    node.prepare(holder)

    assert node.prepare(watcher).devices[0].uuid == node.gpus[0].uuid
    assert node.prepare(a_claim("more", node.device("gpu"), admin=True)).devices[0].uuid == node.gpus[0].uuid
    node.unprepare(holder)
    node.prepare(a_claim("two", node.device("gpu")))


def test_the_monitor_device_is_refused_without_admin_access(node: Rig) -> None:
    with pytest.raises(ClaimError, match="adminAccess: true"):
        node.prepare(a_claim("one", node.device("monitor")))


def test_admin_access_to_a_partition_that_does_not_exist_is_refused(node: Rig) -> None:
    with pytest.raises(ClaimError, match="does not exist now"):
        node.prepare(a_claim("one", node.device("mig-1g-19-0"), admin=True))


def test_a_setting_without_effect_is_refused(node: Rig) -> None:
    with pytest.raises(ClaimError, match="no effect"):
        node.prepare(a_claim("one", node.device("monitor"), admin=True, enforcement="required"))
    node.prepare(a_claim("two", node.device("gpu"), enforcement="required"))


@pytest.mark.parametrize("name", ["gpu", "mps", "timeslice", "monitor", "mig-1g-19-0"])
@pytest.mark.parametrize("settings", [Settings("required"), Settings("preferred"), Settings(interval="long")])
def test_admin_access_has_no_limit_and_no_time_slice_whatever_its_device_has(
    node: Rig, name: str, settings: Settings
) -> None:
    claim = a_claim("one", node.device(name), admin=True)
    asking = replace(claim, allocations=(replace(claim.allocations[0], settings=settings),))

    with pytest.raises(
        ClaimError, match=r"because admin access only shows its GPU and limits nothing; remove the config"
    ):
        node.prepare(asking)
    node.assert_empty()


# ---------------------------------------------------------------- unprepare


@pytest.mark.contract(40, 41)
def test_unprepare_of_anything_unknown_is_success(node: Rig) -> None:
    node.unprepare(a_ref("never"))
    claim = a_claim("one", node.device("gpu"))
    node.prepare(claim)
    node.unprepare(claim)
    node.unprepare(claim)
    node.assert_empty()


@pytest.mark.contract(43)
def test_unprepare_serves_what_another_process_prepared(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-1g-19-3"))
    node.prepare(claim)

    again = node.restart()
    again.unprepare(claim)

    again.assert_empty()
    assert again.partitions() == ()


@pytest.mark.contract(45)
def test_a_failed_unprepare_keeps_the_record_and_succeeds_later(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-1g-19-3"))
    uuid = node.prepare(claim).devices[0].uuid
    node.nvml.run_process(uuid, pid=77, name="train")

    with pytest.raises(DeviceError) as refusal:
        node.unprepare(claim)
    assert refusal.value.code == Code.IN_USE
    assert node.records() == {claim.ref.uid}

    node.nvml.end_process(77)
    node.unprepare(claim)
    node.assert_empty()


def test_unprepare_works_after_a_reboot_took_everything(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-1g-19-3"))
    node.prepare(claim)
    node.nvml.reboot()

    again = node.restart()

    assert again.records() == set()
    again.unprepare(claim)
    again.prepare(claim)
    again.assert_agreed()


# ---------------------------------------------------------------- failures


def test_a_step_that_fails_is_taken_back_and_the_next_try_works(node: Rig) -> None:
    node.nvml.cue("fail", "create_compute_instance", code=Code.INSUFFICIENT_RESOURCES)
    claim = a_claim("one", node.device("mig-1g-19-3"))

    with pytest.raises(DeviceError):
        node.prepare(claim)
    assert node.partitions() == ()
    node.assert_empty()

    node.prepare(claim)
    node.assert_agreed()


def test_a_lost_card_does_not_touch_the_other(node: Rig) -> None:
    node.nvml.lose(node.gpus[0].uuid)

    with pytest.raises(DeviceError) as refusal:
        node.prepare(a_claim("one", node.device("gpu", 0)))
    assert refusal.value.code == Code.GPU_IS_LOST
    node.prepare(a_claim("two", node.device("mig-1g-19-0", 1)))


def test_a_pod_that_watches_all_cards_gets_those_that_are_there_and_none_of_a_lost_one(node: Rig) -> None:
    node.nvml.lose(node.gpus[0].uuid)
    claim = a_claim("one", node.device("monitor", 0), node.device("monitor", 1), admin=True)

    node.prepare(claim)

    devices = cast("list[dict[str, Any]]", node.cdi(claim)["devices"])
    nodes = [device["containerEdits"].get("deviceNodes", []) for device in devices]
    assert [len(found) for found in nodes] == [0, 1]
    assert node.prepare(claim) == node.prepare(claim)
    node.unprepare(claim)
    assert node.records() == set()


def test_a_claim_that_left_a_lost_card_is_served_on_another(node: Rig) -> None:
    """A ResourceClaim that outlives its pod keeps its UID and is given another card."""
    node.prepare(a_claim("one", node.device("mig-1g-19-0")))
    node.nvml.lose(node.gpus[0].uuid)
    node.unprepare(a_ref("one"))

    node.prepare(a_claim("one", node.device("mig-1g-19-0", 1)))

    node.nvml.reset(node.gpus[0].uuid)
    node.recover()
    node.assert_agreed()
    node.unprepare(a_ref("one"))
    node.assert_empty()


def test_what_stands_on_a_card_that_was_lost_before_anything_was_made_is_left_alone(node: Rig) -> None:
    card = node.gpus[0].uuid
    node.nvml.cue("fail", "create_gpu_instance", code=Code.GPU_IS_LOST)
    claim = a_claim("one", node.device("mig-1g-19-0"))
    node.nvml.cue("fail", "look", card, code=Code.GPU_IS_LOST, times=None, skip=1)
    with pytest.raises(DeviceError):
        node.ask(claim)
    node.unprepare(claim)
    node.nvml.withdraw()
    foreign = node.nvml.create_gpu_instance(card, 19, Placement(0, 1))
    node.nvml.create_compute_instance(card, foreign)

    node.recover()

    assert [partition.gi for partition in node.partitions()] == [foreign]


def test_a_corrupt_record_harms_its_own_claim_only_and_is_mended_by_moving_it_away(node: Rig) -> None:
    broken, fine = a_claim("one", node.device("gpu")), a_claim("two", node.device("gpu", 1))
    path = node.checkpoint.folder / f"{broken.ref.uid}.json"
    path.write_text('{"format": 1, "claim"')

    with pytest.raises(StateError, match=r"uid-one cannot be read.*move the file away"):
        node.ask(broken)
    with pytest.raises(StateError):
        node.unprepare(broken)
    node.prepare(fine)
    assert len(node.checkpoint.broken()) == 1

    path.unlink()
    node.prepare(broken)
    node.assert_agreed()


def test_a_full_or_forbidden_cdi_folder_fails_in_one_sentence_and_leaves_nothing(node: Rig) -> None:
    claim = a_claim("one", node.device("mig-1g-19-3"))
    target = node.folder / "cdi" / f"gpuslice.dev-claim_{claim.ref.uid}.json"
    (target / "in-the-way").mkdir(parents=True)

    with pytest.raises(StateError, match=r"cannot (write|remove)"):
        node.prepare(claim)

    (target / "in-the-way").rmdir()
    target.rmdir()
    node.prepare(claim)
    node.assert_agreed()


def test_a_verb_that_finds_another_record_than_expected_does_nothing_and_says_what_it_found(node: Rig) -> None:
    claim = a_claim("one", node.device("gpu", 1))
    before = node.preparer.scope(claim.ref.uid, claim)
    node.prepare(claim)
    now = Scope((node.gpus[1].uuid,), node.checkpoint.get(claim.ref.uid))

    assert node.preparer.prepare(claim, before) == now
    assert node.preparer.unprepare(claim.ref.uid, Scope((node.gpus[0].uuid,))) == now
    assert node.preparer.recover(claim.ref.uid, Scope((node.gpus[0].uuid,))) == now
    assert node.records() == {claim.ref.uid}


def test_a_watcher_does_not_keep_what_its_owner_gives_back(node: Rig) -> None:
    """An administrator's claim on a partition once kept it from being destroyed, and then nobody's record explained it."""
    owner = a_claim("owner", node.device("mig-1g-19-0"))
    watcher = a_claim("watcher", node.device("mig-1g-19-0"), admin=True)
    node.prepare(owner)
    node.prepare(watcher)

    node.unprepare(owner)

    assert node.partitions() == ()
    node.unprepare(watcher)
    node.assert_empty()


def test_a_watcher_is_refused_when_what_it_watches_is_gone(node: Rig) -> None:
    holder, watcher = (
        a_claim(name, node.device("mig-1g-19-0"), admin=name == "watcher") for name in ("one", "watcher")
    )
    node.prepare(holder)
    node.prepare(watcher)
    node.unprepare(holder)

    with pytest.raises(ClaimError, match="does not exist now"):
        node.prepare(watcher)


def test_a_watcher_is_shown_the_partition_that_is_there_now_not_its_predecessor_s(node: Rig) -> None:
    slot = node.device("mig-1g-19-0")
    holder, watcher = a_claim("one", slot), a_claim("watcher", slot, admin=True)
    node.prepare(holder)
    before = node.prepare(watcher).devices[0].uuid
    node.unprepare(holder)
    made = node.prepare(a_claim("another", node.device("mig-1g-19-1")))
    now = node.prepare(a_claim("next", slot)).devices[0].uuid

    again = node.prepare(watcher).devices[0].uuid

    assert again == now
    assert again not in (before, made.devices[0].uuid)
    assert f"GPUSLICE_GPU_0_UUID={now}" in devices_of(node.cdi(watcher))[0]["containerEdits"]["env"]
