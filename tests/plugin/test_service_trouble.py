"""The path of a claim when the API server, a card or the MPS supervisor fails in the middle."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gpuslice.core.model import ClaimRef
from gpuslice.errors import DeviceError
from gpuslice.mps import control
from gpuslice.mps.supervisor import Supervisor
from gpuslice.nvml.api import Code
from gpuslice.plugin import service as service_module

from tests.kit.running import World


@pytest.fixture
async def world(short: Path) -> AsyncIterator[World]:
    async with World(short) as world:
        yield world


# ---------------------------------------------------------------- claims that vanished


async def test_what_a_vanished_claim_holds_on_a_hung_card_is_kept_until_the_card_answers(short: Path) -> None:
    async with World(short, hang_limit_s=1.0) as world:
        service, nvml = world.instances[0].service, world.rig.nvml
        claim = world.claim("gone", world.device("mig-1g-19-0"))
        await world.must_prepare(claim)
        world.delete(claim)
        await service.collect(now=0)
        cue = nvml.cue("hang", "processes")

        await service.collect(now=601)

        assert world.rig.records() == {claim.uid}, "nobody knows whether a program runs there"
        nvml.withdraw(cue)
        assert await service.workers.drained(10)
        await service.collect(now=602)
        world.rig.assert_empty()


@pytest.mark.parametrize(
    "odd", [(404, b"404 page not found\n"), (404, b"{}"), (200, b"{}"), (200, b'{"kind": "Status"}')]
)
async def test_a_living_claim_is_not_collected_because_of_an_answer_that_does_not_name_it(
    world: World, odd: tuple[int, bytes]
) -> None:
    service = world.instances[0].service
    claim = world.claim("idle", world.device("mig-1g-19-0"))
    before = await world.must_prepare(claim)
    world.api.answer(*odd, times=1000, path="resourceclaims")

    for now in (0.0, 601.0, 1300.0):
        await service.collect(now)
    refusal = (await world.prepare(world.claim("other", world.device("mig-1g-19-0")))).error

    assert "delete" not in refusal and "check the API server and the proxies before it" in refusal
    world.api.release()
    assert await world.must_prepare(claim) == before
    assert len(world.rig.partitions()) == 1


async def test_a_vanished_claim_that_cannot_be_unprepared_is_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service, nvml = world.instances[0].service, world.rig.nvml
    claim = world.claim("gone", world.device("mig-1g-19-0"))
    await world.must_prepare(claim)
    world.delete(claim)
    await service.collect(now=0)
    nvml.cue("fail", "destroy_gpu_instance", world.rig.gpus[0].uuid, code=Code.IN_USE)

    await service.collect(now=601)

    assert "cannot unprepare a claim that was deleted; the driver tries again claim=default/gone" in caplog.text
    assert world.rig.records() == {claim.uid}
    await service.collect(now=602)
    world.rig.assert_empty()


async def test_a_claim_that_was_away_and_ended_by_itself_leaves_nothing_to_collect(world: World) -> None:
    service = world.instances[0].service
    claim, other = world.claim("gone", world.device("gpu")), world.claim("stays", world.device("gpu", 1))
    await world.must_prepare(claim)
    await world.must_prepare(other)
    world.delete(claim)
    await service.collect(now=0)
    await world.unprepare(claim)

    await service.collect(now=601)

    assert world.rig.records() == {other.uid}


async def test_what_was_left_incomplete_and_cannot_be_undone_is_named_and_tried_again(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    service, nvml, gpu = world.instances[0].service, world.rig.nvml, world.rig.gpus[0].uuid
    claim = world.claim("one", world.device("mig-1g-19-0"))
    nvml.cue("fail", "create_compute_instance", gpu, code=Code.UNKNOWN)
    nvml.cue("fail", "destroy_gpu_instance", gpu, code=Code.IN_USE, times=2)
    assert "create_compute_instance failed" in (await world.prepare(claim)).error

    await service.recover()

    assert f"cannot undo a prepare that did not end; the driver tries again later claim={claim.uid}" in caplog.text
    assert len(world.rig.partitions()) == 1
    await service.recover()
    world.rig.assert_empty()


# ---------------------------------------------------------------- nobody listens, or nobody answers


async def test_what_nobody_listens_to_is_kept_while_the_api_server_cannot_say_whether_the_claim_is_gone(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gpuslice.plugin.service")
    nvml = world.rig.nvml
    cue = nvml.cue("hang", "create_compute_instance")
    claim = world.claim("one", world.device("mig-1g-19-0"))
    late = asyncio.create_task(world.kubelet.prepare([claim]))
    assert await asyncio.to_thread(nvml.wait_hung, cue, 30)
    late.cancel()
    await world.instances[0].deserted.wait()  # the server notices the end of the call by itself
    world.api.away()

    nvml.withdraw(cue)
    assert await world.instances[0].service.workers.drained(10)
    world.api.back()

    assert (await world.must_prepare(claim)).devices
    assert len(world.rig.partitions()) == 1
    world.rig.assert_agreed()


async def test_a_holder_that_does_not_leave_in_time_is_named_and_the_kubelet_asks_again(world: World) -> None:
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)
    world.deallocate(holder)
    successor = world.claim("new", world.device("gpu"))

    answer = (await world.kubelet.prepare([successor], timeout_s=6))[successor.uid]

    kept = f"the devices of claim {successor} are still held by {holder}, which the kubelet has not unprepared yet; "
    assert answer.error == f"{kept}the kubelet tries again"
    await world.unprepare(holder)
    assert (await world.must_prepare(successor)).devices


async def test_a_claim_that_comes_while_the_driver_ends_is_left_to_its_successor(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    assert await world.instances[0].service.close(10)

    answer = await world.prepare(claim)

    assert "the driver is shutting down; the kubelet asks the next instance" in answer.error
    world.rig.assert_empty()


# ---------------------------------------------------------------- MPS


async def test_a_daemon_that_cannot_be_made_again_is_told_after_those_of_other_cards_were(short: Path) -> None:
    async with World(short) as world:
        rig, service = world.rig, world.instances[0].service
        command = control.stand_in(short / "rig/node")
        first = Supervisor(short / "rig/mps", command)
        first.open()
        charged = {"consumedCapacity": {"memory": "10Gi", "clients": "1"}, "shareID": "a-share"}
        claims = [world.claim(f"c{n}", world.device("mps", n), extra=charged) for n in range(2)]
        for claim in claims:
            await world.must_prepare(claim)
        first.close()
        with pytest.raises(DeviceError, match="no MPS supervisor answers"):
            await service.ensure_daemons()
        refused = rig.folder / f"node/mps/refuse-start.{min(gpu.uuid for gpu in rig.gpus)}"
        refused.parent.mkdir(exist_ok=True)
        refused.touch()
        second = Supervisor(short / "rig/mps", command)
        second.open()

        with pytest.raises(DeviceError, match="ended with status 1 at its start"):
            await service.ensure_daemons()

        assert sorted(daemon.pid > 0 for daemon in rig.mps.statuses()) == [False, True]
        refused.unlink()
        await service.ensure_daemons()
        assert [daemon.problem for daemon in rig.mps.statuses()] == ["", ""]
        for claim in claims:
            await world.unprepare(claim)
        second.close()
        rig.assert_empty()


# ---------------------------------------------------------------- a prepare that came after its unprepare


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "SECOND_LOOK_S", 0.3)
    monkeypatch.setattr(service_module, "MOST_WAIT_S", 1.0)  # how long a refusal takes


async def prepared_late(world: World, name: str = "late") -> ClaimRef:
    """The kubelet gave up the call and unprepared the claim. After that the call arrived."""
    claim = world.claim(name, world.device("mig-3g-9-0"))
    await world.must_prepare(claim)
    await world.unprepare(claim)
    await world.must_prepare(claim)
    return claim


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("ends", ["deallocate", "delete"])
async def test_what_a_late_prepare_left_does_not_block_the_next_claim(
    world: World, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "MOST_WAIT_S", 20.0)
    late = await prepared_late(world)
    getattr(world, ends)(late)
    successor = world.claim("new", world.device("mig-1g-19-2"))

    assert (await world.must_prepare(successor)).devices

    assert world.rig.records() == {successor.uid}
    world.rig.assert_agreed()


@pytest.mark.usefixtures("hurried")
async def test_a_claim_of_a_force_deleted_pod_is_not_taken_from_it_by_its_successor(world: World) -> None:
    holder = world.claim("old", world.device("mig-3g-9-0"))
    await world.must_prepare(holder)
    world.delete(holder)

    assert "still held by default/old" in (await world.prepare(world.claim("new", world.device("mig-1g-19-2")))).error

    assert holder.uid in world.rig.records()


@pytest.mark.usefixtures("hurried")
async def test_what_a_program_uses_is_not_collected_because_its_claim_was_deallocated(world: World) -> None:
    late = await prepared_late(world)
    uuid = world.rig.partitions()[0].uuid
    assert uuid is not None
    world.rig.nvml.run_process(uuid, name="train")
    world.deallocate(late)

    assert "still held by default/late" in (await world.prepare(world.claim("new", world.device("mig-1g-19-2")))).error

    assert late.uid in world.rig.records()


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("again", ["allocated", "reserved"])
@pytest.mark.parametrize("when", ["before the first look", "between the looks"])
async def test_a_claim_that_is_allocated_or_reserved_again_is_not_collected(
    world: World, again: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "between the looks":  # time enough for what happens between them
        monkeypatch.setattr(service_module, "SECOND_LOOK_S", 1.0)
        monkeypatch.setattr(service_module, "MOST_WAIT_S", 2.0)
    late = await prepared_late(world)
    elsewhere = {"driver": "gpuslice.dev", "request": "gpu-0", "pool": "other/card", "device": "gpu"}
    status = {
        "allocated": {"allocation": {"devices": {"results": [elsewhere]}}},
        "reserved": {"reservedFor": [{"resource": "pods", "name": "p", "uid": "u"}]},
    }[again]

    def hold_again() -> None:
        world.api.update("resourceclaims", world.api.get("resourceclaims", "late", "default") | {"status": status})

    world.deallocate(late)
    if when == "before the first look":
        hold_again()
    waits = asyncio.create_task(world.prepare(world.claim("new", world.device("mig-1g-19-2"))))
    if when == "between the looks":
        await asyncio.to_thread(world.api.wait, lambda: world.fetches(late) >= 3)
        hold_again()

    assert "still held by default/late" in (await waits).error

    assert late.uid in world.rig.records()
