"""Shares of a card by time: the transaction from the first claim that sets the mode to the last one that frees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpuslice.core.model import MIB, Claim, DeviceRef, Settings
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ClaimError, DeviceError
from gpuslice.nvml.api import Code, ComputeMode

from tests.kit.rig import Rig, a_claim, a_ref, a_share

GIB = 1024 * MIB
SHORT = Policy.parse(
    {
        "apiVersion": "gpuslice.dev/v1alpha1",
        "kind": "Policy",
        "default": {"timeslice": {"shares": 4, "interval": "short"}, "sharedPartitions": ["timeslice"]},
    }
)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, policy=SHORT)


def a_turn(rig: Rig, name: str, gib: int = 10, turns: int = 1) -> Claim:
    return a_share(name, rig.device("timeslice"), {"memory": gib * GIB, "shares": turns})


def env(rig: Rig, claim: Claim) -> dict[str, str]:
    body = rig.cdi(claim)
    entries: list[str] = body["devices"][0]["containerEdits"]["env"]  # type: ignore[index]
    return dict(entry.split("=", 1) for entry in entries)


@pytest.mark.contract(35)
def test_what_the_scheduler_charged_is_the_share_s_budget(rig: Rig) -> None:
    claim = a_turn(rig, "one", gib=20)

    rig.prepare(claim)

    told = env(rig, claim)
    assert told["GPUSLICE_GPU_0_MEMORY_MIB"] == "20480"
    assert told["GPUSLICE_GPU_0_MEMORY_ENFORCEMENT"] == "none"


@pytest.mark.contract(26)
def test_the_share_s_id_comes_back_to_the_kubelet(rig: Rig) -> None:
    (device,) = rig.prepare(a_turn(rig, "one")).devices

    assert device.share_id == "share-one"


@pytest.mark.contract(26)
def test_two_shares_of_one_device_in_a_claim_are_two_devices(rig: Rig) -> None:
    (first,) = a_turn(rig, "one").allocations
    (second,) = a_turn(rig, "two").allocations

    prepared = rig.prepare(Claim(a_ref("both"), (first, second)))

    assert [device.share_id for device in prepared.devices] == ["share-one", "share-two"]
    assert len({device.cdi_ids for device in prepared.devices}) == 2


@pytest.mark.contract(30, 44)
def test_the_first_share_sets_the_interval_and_only_the_last_one_resets_it(rig: Rig) -> None:
    claims = [a_turn(rig, name) for name in ("one", "two", "three")]
    for claim in claims:
        rig.prepare(claim)
    assert rig.figures() == (ComputeMode.DEFAULT, 1)

    for claim in claims[:2]:
        rig.unprepare(claim)
    assert rig.figures() == (ComputeMode.DEFAULT, 1)

    rig.unprepare(claims[2])
    rig.assert_empty()


@pytest.mark.contract(31)
@pytest.mark.parametrize("other", ["gpu", "mig-1g-19-0", "mig-7g-0-0", "mig-1g-19-0-timeslice"])
def test_modes_of_one_card_exclude_each_other_and_switch_when_it_is_empty(rig: Rig, other: str) -> None:
    mine, theirs = a_turn(rig, "one"), a_claim("two", rig.device(other))

    rig.assert_take_turns(mine, theirs)


def test_a_share_beyond_what_is_left_waits_for_those_who_hold_it(rig: Rig) -> None:
    """A scheduler of an early 1.36 patch does not charge committed shares again."""
    big = a_turn(rig, "big", gib=60)
    rig.prepare(big)

    assert rig.busy(a_turn(rig, "late", gib=30)) == (big.ref,)


def test_turns_are_counted_as_well_as_memory(rig: Rig) -> None:
    rig.prepare(a_turn(rig, "three", gib=1, turns=3))

    assert rig.busy(a_turn(rig, "two", gib=1, turns=2)) == (a_ref("three"),)
    rig.prepare(a_turn(rig, "one", gib=1, turns=1))


def test_one_claim_that_was_given_too_much_of_a_device_is_told_so(rig: Rig) -> None:
    (first,) = a_turn(rig, "one", gib=60).allocations
    (second,) = a_turn(rig, "two", gib=60).allocations

    with pytest.raises(ClaimError, match=r"122880 of 81152 MiB of memory.*delete the pod"):
        rig.ask(Claim(a_ref("both"), (first, second)))
    assert rig.records() == set()


def test_shares_of_a_partition_make_it_with_the_first_and_destroy_it_with_the_last(rig: Rig) -> None:
    shares = [a_share(n, rig.device("mig-1g-19-0-timeslice"), {"memory": 2 * GIB, "shares": 1}) for n in ("one", "two")]
    uuids = {rig.prepare(claim).devices[0].uuid for claim in shares}

    assert len(uuids) == 1 == len(rig.partitions())
    rig.unprepare(shares[0])
    assert len(rig.partitions()) == 1
    rig.unprepare(shares[1])
    assert rig.partitions() == ()
    rig.assert_empty()


def test_a_partition_keeps_its_time_slice_alone_even_where_the_policy_names_an_interval(rig: Rig) -> None:
    rig.prepare(a_share("one", rig.device("mig-1g-19-0-timeslice"), {"memory": GIB, "shares": 1}))

    assert rig.figures() == (ComputeMode.DEFAULT, 0)


def an_interval(rig: Rig, device: str, interval: str = "long") -> Claim:
    return a_share("own", rig.device(device), settings=Settings(interval=interval))


def test_an_exclusive_card_s_containers_take_turns_as_the_claim_says(rig: Rig) -> None:
    claim = an_interval(rig, "gpu")

    rig.prepare(claim)
    assert rig.figures() == (ComputeMode.DEFAULT, 3)
    rig.unprepare(claim)

    rig.assert_empty()


def test_an_interval_on_a_partition_is_refused_with_a_sentence(rig: Rig) -> None:
    with pytest.raises(ClaimError, match=r"interval has no effect on partition .*mig-1g-19-0; remove the setting"):
        rig.ask(an_interval(rig, "mig-1g-19-0"))
    rig.assert_empty()


def test_an_interval_on_a_card_that_others_use_too_is_refused_with_a_sentence(rig: Rig) -> None:
    with pytest.raises(ClaimError, match=r"cannot be set for .*timeslice, whose card other claims share"):
        rig.ask(an_interval(rig, "timeslice"))
    rig.assert_empty()


def test_an_interval_that_the_card_does_not_take_leaves_nothing_behind(rig: Rig) -> None:
    cue = rig.nvml.cue("fail", "set_time_slice", code=Code.NOT_SUPPORTED)
    with pytest.raises(DeviceError):
        rig.ask(a_turn(rig, "one"))
    rig.nvml.withdraw(cue)
    rig.assert_empty()

    rig.prepare(a_turn(rig, "one"))


def test_a_restarted_driver_frees_the_card_with_the_last_share(rig: Rig) -> None:
    claims = [a_turn(rig, name) for name in ("one", "two")]
    for claim in claims:
        rig.prepare(claim)
    again = rig.restart()

    assert again.prepare(claims[0]).devices[0].share_id == "share-one"
    for claim in claims:
        again.unprepare(claim)

    again.assert_empty()


@pytest.mark.parametrize("spec", ["h100", "a100-40g:mig", "a100-40g", "l4"])
def test_shares_of_a_static_plan_are_devices_of_their_own(tmp_path: Path, spec: str) -> None:
    policy = Policy.parse(
        {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": {"static": {"timeslice": 2}}}
    )
    rig = Rig(tmp_path, spec, policy, static=True)
    claims = [a_claim(name, rig.device(f"timeslice-{part}")) for part, name in enumerate(("one", "two"))]
    if spec == "a100-40g:mig":
        with pytest.raises(DeviceError, match=r"MIG mode on and cannot switch it without a reset"):
            rig.ask(claims[0])
        return

    for claim in claims:
        rig.prepare(claim)

    half = rig.inventory.pools[0].memory_mib // 2
    assert [env(rig, claim)["GPUSLICE_GPU_0_MEMORY_MIB"] for claim in claims] == [str(half)] * 2
    assert rig.busy(a_claim("late", rig.device("timeslice-0"))) == (a_ref("one"),)
    for claim in claims:
        rig.unprepare(claim)
    rig.assert_empty()


def test_a_share_of_another_device_than_the_claim_s_is_unknown(rig: Rig) -> None:
    with pytest.raises(ClaimError, match="timeslice-9"):
        rig.ask(a_claim("one", DeviceRef(rig.device("gpu").pool, "timeslice-9")))


# ---------------------------------------------------------------- on the way back


def test_a_switch_that_is_refused_because_the_card_is_in_use_says_so_if_nothing_lists_the_users(rig: Rig) -> None:
    rig.nvml.cue("fail", "set_mig_mode", code=Code.IN_USE)
    rig.nvml.cue("fail", "processes", code=Code.UNKNOWN)

    with pytest.raises(DeviceError, match=r"in use by programs that NVML does not list \(.*UNKNOWN") as refusal:
        rig.ask(a_claim("one", rig.device("mig-1g-19-0")))

    assert refusal.value.code == Code.IN_USE


def test_a_refused_switch_of_mig_mode_leaves_nothing_that_sticks(rig: Rig) -> None:
    """The card was partitioned before, so MIG mode is still on; a monitoring agent's session once keeps it so."""
    before = a_claim("before", rig.device("mig-1g-19-0"))
    rig.prepare(before)
    rig.unprepare(before)
    cue = rig.nvml.cue("fail", "set_mig_mode", code=Code.IN_USE)
    claim = a_turn(rig, "one")

    with pytest.raises(DeviceError, match=r"MIG mode of GPU .* cannot be switched while it is in use"):
        rig.ask(claim)

    rig.nvml.withdraw(cue)
    rig.assert_empty()
    rig.prepare(claim)


def test_a_lost_card_keeps_neither_a_pod_from_its_end_nor_another_card(rig: Rig) -> None:
    both = _on_both_cards(rig)
    rig.prepare(both)
    rig.nvml.lose(rig.gpus[1].uuid)

    rig.unprepare(both)

    assert rig.figures(0) == (ComputeMode.DEFAULT, 0)
    rig.prepare(a_claim("next", rig.device("gpu")))
    rig.unprepare(a_ref("next"))
    with pytest.raises(DeviceError, match="lost"):
        rig.recover()
    assert len(rig.records()) == 1
    rig.nvml.reset(rig.gpus[1].uuid)
    rig.recover()
    rig.assert_empty()


def _on_both_cards(rig: Rig) -> Claim:
    shares = [a_share(f"{gpu}", rig.device("timeslice", gpu=gpu), {"memory": GIB, "shares": 1}) for gpu in (0, 1)]
    return Claim(a_ref("both"), tuple(one for share in shares for one in share.allocations))


def test_a_card_that_only_refuses_keeps_the_claim_though_another_is_lost(rig: Rig) -> None:
    both = _on_both_cards(rig)
    rig.prepare(both)
    rig.nvml.lose(rig.gpus[0].uuid)
    rig.nvml.cue("fail", "set_time_slice", rig.gpus[1].uuid, code=Code.UNKNOWN)

    with pytest.raises(DeviceError) as refusal:
        rig.unprepare(both)

    assert refusal.value.code == Code.UNKNOWN
    assert rig.records() == {both.ref.uid}


def test_nobody_builds_on_a_share_that_is_being_given_back(rig: Rig) -> None:
    """The driver dies between the last share's reset and its record's end."""
    first = a_turn(rig, "first")
    rig.prepare(first)
    cue = rig.nvml.cue("fail", "set_time_slice", code=Code.UNKNOWN, done=True)
    with pytest.raises(DeviceError):
        rig.unprepare(first)
    rig.nvml.withdraw(cue)
    assert rig.figures() == (ComputeMode.DEFAULT, 0)

    rig.prepare(a_turn(rig, "second"))

    assert rig.figures() == (ComputeMode.DEFAULT, 1)
    again = rig.restart()
    again.recover()
    assert again.records() == {a_ref("second").uid}
    assert again.figures() == (ComputeMode.DEFAULT, 1)


def test_a_partition_that_vanished_under_its_sharers_is_made_again_for_all_of_them(rig: Rig) -> None:
    device = rig.device("mig-1g-19-0-timeslice")
    first, second = (a_share(name, device, {"memory": 2 * GIB, "shares": 1}) for name in ("one", "two"))
    rig.prepare(first)
    (gone,) = rig.partitions()
    assert gone.ci is not None
    rig.nvml.destroy_compute_instance(rig.gpus[0].uuid, gone.gi, gone.ci)
    rig.nvml.destroy_gpu_instance(rig.gpus[0].uuid, gone.gi)

    (prepared,) = rig.prepare(second).devices

    (there,) = rig.partitions()
    assert prepared.uuid == there.uuid != gone.uuid
    rig.unprepare(second)
    assert rig.prepare(first).devices[0].uuid == there.uuid
    rig.unprepare(first)
    rig.assert_empty()
