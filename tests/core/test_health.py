"""Taints: devices that are unavailable now, each with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpuslice.core import health
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import DeviceRef, Gpu, LiveGpu, MigUuid, Partition, Placement, Taint
from gpuslice.core.policy.rules import Policy

from tests.kit.builders import a_gpu
from tests.kit.rig import Rig, a_claim

OFF, ON = LiveGpu(mig=False, mig_pending=False), LiveGpu(mig=True, mig_pending=True)


def tainted(gpu: Gpu, live: LiveGpu | None, unwell: Taint | None = None) -> dict[str, set[str]]:
    inventory = Inventory.of([gpu], Policy.default(), "n")
    found = health.taints(
        inventory, {} if live is None else {gpu.uuid: live}, {} if unwell is None else {gpu.uuid: unwell}, (), {}
    )
    return {ref.device: {f"{t.key}={t.value}" for t in here} for ref, here in found.items()}


def test_a_card_that_is_well_has_no_taints() -> None:
    assert tainted(a_gpu("h100", 0), ON) == tainted(a_gpu("h100", 0), OFF) == tainted(a_gpu("l4", 0), OFF) == {}


def test_a_foreign_partition_without_a_compute_instance_is_named_by_its_place() -> None:
    foreign = Partition(profile=19, placement=Placement(2, 1), gi=3)
    live = LiveGpu(mig=True, mig_pending=True, partitions=(foreign,))

    inventory = Inventory.of([a_gpu("h100", 0)], Policy.default(), "n")
    found = health.taints(inventory, {a_gpu("h100", 0).uuid: live}, {}, (), {})

    assert {taint.reason for taints in found.values() for taint in taints} == {
        "GPU 0 has partition of profile 19 at 2 (no compute instance), which gpuslice did not make; destroy it to free "
        "its place"
    }


def test_an_ampere_card_offers_only_what_its_mig_mode_allows() -> None:
    off, on = tainted(a_gpu("a100-40g", 0), OFF), tainted(a_gpu("a100-40g", 0), ON)

    assert "gpu" not in off
    assert off["mig-1g-19-0"] == {"mig-mode=off"}
    assert on == {device: {"mig-mode=on"} for device in ("gpu", "mps", "timeslice")}


def test_a_pending_change_of_mig_mode_closes_all_but_the_watcher() -> None:
    found = tainted(a_gpu("a100-40g", 0), LiveGpu(mig=False, mig_pending=True))

    assert found["gpu"] == found["mig-1g-19-0"] == {"mig-mode=pending"}
    assert "monitor" not in found


@pytest.mark.parametrize(("value", "watched"), [("lost", False), ("hung", True)])
def test_a_lost_card_is_tainted_but_for_its_monitor_and_a_hung_one_as_a_whole(value: str, watched: bool) -> None:
    found = tainted(a_gpu("h100", 0), None, Taint("gpu", value, reason="does not answer"))

    assert set(map(frozenset, found.values())) == {frozenset({f"gpu={value}"})}
    assert {"gpu", "mps", "timeslice", "mig-1g-19-0"} < set(found)
    assert ("monitor" in found) == watched


def test_a_foreign_partition_taints_what_overlaps_it_and_the_whole_card() -> None:
    foreign = Partition(profile=14, placement=Placement(0, 2), gi=3, ci=0, uuid=MigUuid("MIG-x"))
    found = tainted(a_gpu("h100", 0), LiveGpu(mig=True, mig_pending=True, partitions=(foreign,)))

    assert found["gpu"] == found["mig-1g-19-1"] == found["mig-7g-0-0"] == {"foreign-partition=profile-14-at-0"}
    assert "mig-1g-19-2" not in found
    assert "monitor" not in found


def test_each_reason_names_the_thing_and_the_remedy() -> None:
    gpu = a_gpu("a100-40g", 0)
    inventory = Inventory.of([gpu], Policy.default(), "n")
    found = health.taints(inventory, {gpu.uuid: ON}, {}, (), {})

    (taint,) = found[DeviceRef(inventory.pools[0].name, "gpu")]
    assert "nvidia-smi" in taint.reason


@pytest.mark.parametrize("device", ["gpu", "mig-1g-19-0", "timeslice"])
def test_a_card_that_is_held_under_the_old_name_of_the_node_is_tainted_until_it_is_empty(
    tmp_path: Path, device: str
) -> None:
    rig = Rig(tmp_path)
    claim = a_claim("old", rig.device(device))
    rig.prepare(claim)
    renamed = Inventory.of(rig.gpus, Policy.default(), "new-name")

    def found() -> dict[DeviceRef, tuple[Taint, ...]]:
        live = {gpu.uuid: rig.nvml.look(gpu.uuid) for gpu in rig.gpus}
        return dict(health.taints(renamed, live, {}, rig.checkpoint.records().values(), {}))

    tainted = {ref for ref, here in found().items() if "other-pool" in {taint.key for taint in here}}
    assert tainted == {d.ref for d in renamed.pools[0].devices if d.ref.device != "monitor"}
    (reason,) = {taint.reason for here in found().values() for taint in here}
    assert "default/old" in reason
    assert "delete their pods" in reason
    rig.unprepare(claim)
    assert found() == {}


def test_who_watches_a_card_under_its_old_name_holds_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.prepare(a_claim("old", rig.device("monitor"), admin=True))
    renamed = Inventory.of(rig.gpus, Policy.default(), "new-name")

    assert health.taints(renamed, {}, {}, rig.checkpoint.records().values(), {}) == {}
