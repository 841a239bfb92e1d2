"""The path of a claim from the RPC to the hardware and back: fetches, waits and answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from gpuslice.core.model import ClaimRef, ClaimUid

from tests.kit.running import DRIVER, World
from tests.kit.waiting import settled


@pytest.fixture
async def world(short: Path) -> AsyncIterator[World]:
    async with World(short) as world:
        yield world


async def waiting(world: World, ref: ClaimRef, times: int = 1) -> None:
    """Return when the driver has asked the API server for this claim so many times."""
    await asyncio.to_thread(world.api.wait, lambda: world.fetches(ref) >= times)


# ---------------------------------------------------------------- what an answer holds


@pytest.mark.contract(18)
async def test_each_prepare_looks_at_the_claim_as_it_is_now(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    await world.must_prepare(claim)
    before = world.fetches(claim)
    await world.must_prepare(claim)
    assert world.fetches(claim) > before

    world.deallocate(claim)

    assert "is not allocated" in (await world.prepare(claim)).error


@pytest.mark.contract(19, 20, 21, 42)
async def test_every_claim_of_a_batch_has_its_own_entry_and_its_own_error(world: World) -> None:
    good = world.claim("good", world.device("gpu"))
    missing = ClaimRef("default", "missing", ClaimUid("uid-missing"))
    replaced = ClaimRef("default", world.claim("replaced", world.device("gpu", 1)).name, ClaimUid("uid-old"))
    unallocated = world.claim("unallocated", world.device("gpu", 1))
    world.deallocate(unallocated)

    batch = [good, missing, replaced, unallocated]
    answers = await world.kubelet.prepare(batch)

    assert set(answers) == {ref.uid for ref in batch}
    assert answers[good.uid].devices and not answers[good.uid].error
    assert "does not exist" in answers[missing.uid].error
    assert "has replaced it" in answers[replaced.uid].error
    assert "is not allocated" in answers[unallocated.uid].error
    assert all(not answers[ref.uid].devices for ref in batch[1:])
    assert await world.kubelet.unprepare(batch) == {ref.uid: "" for ref in batch}
    world.rig.assert_empty()


@pytest.mark.contract(22, 24, 25)
async def test_devices_are_ours_with_pool_base_request_and_cdi_name(world: World) -> None:
    foreign = {"request": "nic", "driver": "nic.example.com", "pool": "p", "device": "d"}
    claim = world.claim("one", world.device("mig-2g-14-0"), requests=["gpu/small"], more=[foreign])

    (device,) = (await world.must_prepare(claim)).devices

    assert device.requests == ("gpu",)
    assert (device.pool, device.device) == (world.device("mig-2g-14-0").pool, "mig-2g-14-0")
    assert device.cdi_ids == (f"{DRIVER}/claim={claim.uid}-0",)


def a_config(
    source: str, parameters: object, *, requests: list[str] | None = None, driver: str = DRIVER
) -> dict[str, object]:
    return {"source": source, "requests": requests or [], "opaque": {"driver": driver, "parameters": parameters}}


@pytest.mark.contract(23)
async def test_a_wrong_config_reaches_the_pod_as_one_sentence_and_a_foreign_one_is_ignored(world: World) -> None:
    head = {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "SliceConfig"}
    wrong = a_config("FromClaim", head | {"enforce": "required"})
    answer = await world.prepare(world.claim("wrong", world.device("gpu"), config=[wrong]))
    assert "config[0].opaque.parameters has the unknown key enforce; known keys" in answer.error

    foreign = a_config("FromClass", {"any": "thing"}, driver="other.example.com")
    await world.must_prepare(world.claim("fine", world.device("gpu"), config=[foreign]))


@pytest.mark.contract(36, 38)
async def test_the_claim_of_an_extended_resource_is_a_claim_like_any_other(world: World) -> None:
    claim = world.claim(
        "pod-extended-resources-x7",
        world.device("gpu"),
        requests=["container-0-request-0"],
        annotations={"resource.kubernetes.io/extended-resource-claim": "true"},
    )

    assert (await world.must_prepare(claim)).devices[0].requests == ("container-0-request-0",)


@pytest.mark.contract(39)
async def test_admin_access_is_served_while_the_gpu_is_busy_or_hung(world: World) -> None:
    await world.must_prepare(world.claim("holder", world.device("gpu")))

    await world.must_prepare(world.claim("dcgm", world.device("monitor"), admin=True))


@pytest.mark.contract(40)
async def test_unprepare_needs_no_api_server(world: World) -> None:
    claim = world.claim("one", world.device("mig-1g-19-0"))
    await world.must_prepare(claim)
    world.api.away()

    await world.unprepare(claim)

    world.rig.assert_empty()
    world.api.back()


async def test_an_api_server_that_is_away_or_refuses_is_told_in_one_sentence(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    world.api.fail(403, times=1, path="/resourceclaims/")
    assert "resourceclaims" in (await world.prepare(claim)).error
    world.api.away()
    assert "API server" in (await world.prepare(claim)).error
    world.api.back()

    await world.must_prepare(claim)


# ---------------------------------------------------------------- side by side


@pytest.mark.contract(28)
async def test_eight_calls_for_one_claim_make_one_partition(world: World) -> None:
    claim = world.claim("one", world.device("mig-1g-19-0"))

    answers = await asyncio.gather(*(world.must_prepare(claim) for _ in range(8)))

    assert len(set(answers)) == 1
    assert len(world.rig.partitions()) == 1


@pytest.mark.contract(28)
async def test_many_claims_on_two_gpus_at_once_are_all_served(world: World) -> None:
    claims = [world.claim(f"c{n}", world.device(f"mig-1g-19-{n % 7}", n // 7)) for n in range(14)]

    await asyncio.gather(*(world.must_prepare(claim) for claim in claims))
    world.rig.assert_agreed()
    await asyncio.gather(*(world.unprepare(claim) for claim in claims))

    world.rig.assert_empty()


@pytest.mark.contract(29)
async def test_a_call_that_outlasts_the_kubelet_finishes_and_its_retry_finds_it_done(world: World) -> None:
    nvml = world.rig.nvml
    cue = nvml.cue("hang", "create_compute_instance")
    claim = world.claim("one", world.device("mig-1g-19-0"))
    late = asyncio.create_task(world.kubelet.prepare([claim], timeout_s=3))
    assert await asyncio.to_thread(nvml.wait_hung, cue, 30)
    with pytest.raises(Exception, match="DEADLINE_EXCEEDED"):
        await late

    retry = asyncio.create_task(world.must_prepare(claim))
    await waiting(world, claim)
    nvml.withdraw(cue)

    assert (await retry).devices
    assert len(world.rig.partitions()) == 1
    world.rig.assert_agreed()


async def test_what_nobody_listens_to_any_more_is_given_back_if_the_claim_is_gone(world: World) -> None:
    nvml = world.rig.nvml
    cue = nvml.cue("hang", "create_compute_instance")
    claim = world.claim("one", world.device("mig-1g-19-0"))
    late = asyncio.create_task(world.kubelet.prepare([claim]))
    assert await asyncio.to_thread(nvml.wait_hung, cue, 30)
    late.cancel()
    world.delete(claim)
    await world.instances[0].deserted.wait()  # the server notices the end of the call by itself

    nvml.withdraw(cue)
    await asyncio.to_thread(world.api.wait, lambda: world.fetches(claim) >= 2)
    await world.unprepare(claim)  # in line behind the clean-up

    assert world.rig.partitions() == ()
    world.rig.assert_empty()


async def test_a_hung_gpu_answers_at_once_and_the_others_do_not_notice(short: Path) -> None:
    async with World(short, hang_limit_s=1.0) as world:
        nvml = world.rig.nvml
        cue = nvml.cue("hang", "create_gpu_instance")
        first = world.claim("one", world.device("mig-1g-19-0"))
        told = (await world.prepare(first)).error
        assert f"create_gpu_instance on {world.rig.gpus[0].uuid} (prepare {first.uid}) has not returned" in told
        assert "counts as hung" in told

        assert "counts as hung" in (await world.prepare(world.claim("two", world.device("mig-1g-19-1")))).error
        assert "counts as hung" in (await world.kubelet.unprepare([first]))[first.uid]
        await world.must_prepare(world.claim("three", world.device("gpu", 1)))

        nvml.withdraw(cue)
        assert await world.instances[0].service.workers.drained(10)
        await world.must_prepare(first)


async def test_what_is_read_on_the_node_does_not_wait_behind_fetches_that_hang(world: World) -> None:
    service, stands = world.instances[0].service, world.claim("stands", world.device("mig-1g-19-0"))
    await world.must_prepare(stands)
    claims = [world.claim(f"c{n}", world.device(f"mig-1g-19-{n % 7}", 1)) for n in range(8)]
    world.api.hang(8, path="resourceclaims/c")
    hanging = [asyncio.create_task(world.prepare(claim)) for claim in claims]
    await asyncio.to_thread(world.api.wait, lambda: all(world.fetches(claim) for claim in claims))

    await asyncio.wait_for(service.recover(), 15)
    await asyncio.wait_for(service.ensure_daemons(), 15)
    await asyncio.wait_for(world.unprepare(stands), 15)

    assert not any(task.done() for task in hanging)
    world.api.release()
    await asyncio.gather(*hanging)


# ---------------------------------------------------------------- a unit that was forgotten


def ask_for(world: World, ref: ClaimRef, *requests: Mapping[str, object]) -> None:
    """What the user wrote into the claim."""
    body = world.api.get("resourceclaims", ref.name, ref.namespace)
    world.api.update("resourceclaims", body | {"spec": {"devices": {"requests": list(requests)}}})


def asking(memory: str, **more: object) -> dict[str, object]:
    return {"capacity": {"requests": {"memory": memory}}, **more}


@pytest.mark.parametrize("device", ["timeslice", "mig-1g-19-0", "gpu"])
@pytest.mark.parametrize("key", ["memory", "gpuslice.dev/memory"])
async def test_a_request_without_a_unit_is_refused_with_the_unit_that_was_probably_meant(
    world: World, device: str, key: str
) -> None:
    claim = world.claim("one", world.device(device))
    ask_for(world, claim, {"name": "gpu-0", "exactly": {"capacity": {"requests": {key: "5120"}}}})

    answer = await world.prepare(claim)

    assert answer.error == (
        f"request gpu-0 of claim {claim} asks for memory: 5120, which is less than 1 MiB; write 5120Mi if that is what you "
        "mean, make the claim again, and delete the pod"
    )
    world.rig.assert_empty()


async def test_only_the_option_that_the_scheduler_chose_can_be_such_a_mistake(world: World) -> None:
    options = [asking("8", name="large"), asking("8Gi", name="small")]
    claim = world.claim("one", world.device("mig-1g-19-0"), requests=["gpu/small"])
    ask_for(world, claim, {"name": "gpu", "firstAvailable": options}, {"name": "other", "exactly": asking("1")})
    await world.must_prepare(claim)

    wrong = world.claim("two", world.device("mig-1g-19-1"), requests=["gpu/large"])
    ask_for(world, wrong, {"name": "gpu", "firstAvailable": options})

    assert "request gpu/large of claim default/two" in (await world.prepare(wrong)).error


async def test_a_claim_that_is_prepared_already_is_answered_whatever_its_request_says(world: World) -> None:
    """Its pod runs, and a kubelet asks again at its start."""
    claim = world.claim("one", world.device("gpu"))
    before = await world.must_prepare(claim)
    ask_for(world, claim, {"name": "gpu-0", "exactly": asking("5120")})

    assert await world.must_prepare(claim) == before


# ---------------------------------------------------------------- waiting for a holder that leaves


async def test_the_successor_of_a_force_deleted_pod_waits_and_is_served_when_the_holder_has_left(world: World) -> None:
    holder = world.claim("old", world.device("mig-3g-9-0"))
    await world.must_prepare(holder)
    world.delete(holder)
    successor = world.claim("new", world.device("mig-1g-19-2"))
    waits = asyncio.create_task(world.must_prepare(successor))
    await waiting(world, holder, 2)  # once for its own prepare, once to see whether it is alive
    assert not waits.done()

    await world.unprepare(holder)

    assert (await waits).devices
    world.rig.assert_agreed()


async def test_what_a_lost_card_kept_is_finished_by_the_successor_that_finds_it(world: World) -> None:
    """The kubelet has an answer that everything is released, so it does not call again."""
    rig = world.rig
    holder = world.claim("old", world.device("mig-3g-9-0"))
    await world.must_prepare(holder)
    rig.nvml.lose(rig.gpus[0].uuid)
    await world.unprepare(holder)
    world.delete(holder)
    assert len(rig.records()) == 1
    rig.nvml.reset(rig.gpus[0].uuid)

    assert (await world.must_prepare(world.claim("new", world.device("mig-1g-19-2")))).devices

    rig.assert_agreed()
    assert len(rig.records()) == 1


@pytest.mark.contract(30)
async def test_a_device_of_a_living_holder_is_refused_as_a_double_allocation(world: World) -> None:
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)

    answer = await world.prepare(world.claim("new", world.device("gpu")))

    assert "double allocation" in answer.error


async def test_a_card_that_is_held_under_the_old_name_of_the_node_is_not_the_scheduler_s_fault(world: World) -> None:
    rig = world.rig
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)
    record = rig.checkpoint.folder / f"{holder.uid}.json"
    old_name = f"old-name/{world.device('gpu').pool.partition('/')[2]}"
    record.write_text(record.read_text().replace(world.device("gpu").pool, old_name))
    body = world.api.get("resourceclaims", "old", "default")
    body["status"]["allocation"]["devices"]["results"][0]["pool"] = old_name
    world.api.update("resourceclaims", body)

    answer = await world.prepare(world.claim("new", world.device("gpu")))

    assert "double allocation" not in answer.error
    assert "default/old" in answer.error
    assert "from a pool of another name, because the node was renamed" in answer.error
    assert str(holder) in answer.error


async def test_a_successor_that_is_deleted_while_it_waits_leaves_nothing(world: World) -> None:
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)
    world.deallocate(holder)
    successor = world.claim("new", world.device("gpu"))
    waits = asyncio.create_task(world.prepare(successor))
    await waiting(world, holder, 2)

    await world.unprepare(successor)

    assert "was cancelled" in (await waits).error
    await world.unprepare(holder)
    world.rig.assert_empty()


async def test_a_claim_that_was_deallocated_while_it_waited_is_not_prepared(world: World) -> None:
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)
    world.deallocate(holder)
    successor = world.claim("new", world.device("gpu"))
    waits = asyncio.create_task(world.prepare(successor))
    await waiting(world, holder, 2)
    world.deallocate(successor)

    await world.unprepare(holder)

    assert "is not allocated" in (await waits).error
    world.rig.assert_empty()


# ---------------------------------------------------------------- two instances


@pytest.mark.contract(43, 68)
async def test_two_instances_serve_one_node_and_each_undoes_what_the_other_did(world: World) -> None:
    first, second = world.claim("one", world.device("mig-1g-19-0")), world.claim("two", world.device("mig-1g-19-1"))
    await world.must_prepare(first)
    successor = await world.join("pod-2")

    await world.must_prepare(second)  # the newest instance is asked
    assert (await world.must_prepare(first)).devices
    await world.unprepare(first)
    await world.leave(successor)
    await world.unprepare(second)

    world.rig.assert_empty()


@pytest.mark.contract(68)
async def test_two_instances_never_work_on_one_gpu_at_once(world: World) -> None:
    nvml = world.rig.nvml
    cue = nvml.cue("hang", "create_gpu_instance")
    first, second = world.claim("one", world.device("mig-1g-19-0")), world.claim("two", world.device("mig-1g-19-1"))
    hanging = asyncio.create_task(world.must_prepare(first))
    assert await asyncio.to_thread(nvml.wait_hung, cue, 30)
    successor = await world.join("pod-2")
    queued = asyncio.create_task(world.must_prepare(second))
    await waiting(world, second)
    other = await world.must_prepare(world.claim("three", world.device("gpu", 1)))
    assert other.devices
    assert not queued.done()

    nvml.withdraw(cue)

    assert (await hanging).devices and (await queued).devices
    world.rig.assert_agreed()
    await world.leave(successor)


async def test_a_successor_hears_of_an_unprepare_that_the_other_instance_served(world: World) -> None:
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)
    world.deallocate(holder)
    waits = asyncio.create_task(world.must_prepare(world.claim("new", world.device("gpu"))))
    await waiting(world, holder, 2)
    newer = await world.join("pod-2")

    await world.unprepare(holder)  # answered by the newer instance

    assert (await waits).devices
    await world.leave(newer)


async def test_recovery_leaves_a_claim_alone_that_another_instance_is_working_on(world: World) -> None:
    nvml = world.rig.nvml
    cue = nvml.cue("hang", "create_compute_instance")
    claim = world.claim("one", world.device("mig-1g-19-0"))
    working = asyncio.create_task(world.must_prepare(claim))
    assert await asyncio.to_thread(nvml.wait_hung, cue, 30)

    newer = await world.join("pod-2")
    recovery = asyncio.create_task(newer.service.recover())
    nvml.withdraw(cue)
    await recovery

    assert (await working).devices
    assert len(world.rig.partitions()) == 1
    world.rig.assert_agreed()
    await world.leave(newer)


# ---------------------------------------------------------------- records nobody asks for any more


@pytest.mark.contract(46)
async def test_what_a_vanished_claim_holds_is_given_back_after_ten_minutes_without_a_process(world: World) -> None:
    service, rig = world.instances[0].service, world.rig
    gone, stays = world.claim("gone", world.device("mig-1g-19-0")), world.claim("stays", world.device("gpu", 1))
    uuid = (await world.must_prepare(gone), rig.partitions()[0].uuid)[1]
    await world.must_prepare(stays)
    world.delete(gone)
    assert uuid is not None
    pid = rig.nvml.run_process(uuid, name="train")

    await service.collect(now=0)
    await service.collect(now=599)
    assert rig.records() == {gone.uid, stays.uid}
    await service.collect(now=601)
    assert rig.records() == {gone.uid, stays.uid}  # a force-deleted pod may still run

    rig.nvml.end_process(pid)
    await service.collect(now=602)
    assert rig.records() == {stays.uid}


async def test_a_claim_that_vanished_is_noticed_within_minutes_and_then_asked_for_each_minute(world: World) -> None:
    service = world.instances[0].service
    claim = world.claim("gone", world.device("mig-1g-19-0"))
    await world.must_prepare(claim)
    await service.collect(now=0)
    world.delete(claim)

    for minute in range(1, 6):
        await service.collect(now=60.0 * minute)
    world.api.requests.clear()
    await service.collect(now=360)
    assert len(world.api.requests) == 1
    assert world.rig.records() == {claim.uid}
    await service.collect(now=901)

    world.rig.assert_empty()


@pytest.mark.contract(46)
async def test_nothing_is_collected_while_the_api_server_cannot_be_asked(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    await world.must_prepare(claim)
    world.delete(claim)
    world.api.away()

    for now in (0.0, 700.0, 1400.0):
        await world.instances[0].service.collect(now)

    assert world.rig.records() == {claim.uid}
    world.api.back()


async def test_a_claim_that_stays_is_asked_for_ever_less_and_is_still_collected_when_it_goes(world: World) -> None:
    service = world.instances[0].service
    refs = [world.claim(f"c{n}", world.device("mig-1g-19-0" if n else "gpu", n)) for n in (0, 1)]
    for ref in refs:
        await world.must_prepare(ref)

    async def asked(first: int, last: int) -> int:
        before = len(world.api.requests)
        for minute in range(first, last):
            await service.collect(now=60.0 * minute)
        return len(world.api.requests) - before

    assert await asked(0, 1) == 2  # each at once after a start: the kubelet may have forgotten a claim meanwhile
    await asked(1, 60)
    assert 2 * 6 <= await asked(60, 120) <= 2 * 12, "each five to ten minutes"

    world.delete(refs[0])
    await asked(120, 129)
    assert world.rig.records() == {ref.uid for ref in refs}
    await asked(129, 141)
    assert world.rig.records() == {refs[1].uid}


async def test_shutting_down_answers_whoever_waits(world: World) -> None:
    holder = world.claim("old", world.device("gpu"))
    await world.must_prepare(holder)
    world.deallocate(holder)
    waits = asyncio.create_task(world.prepare(world.claim("new", world.device("gpu"))))
    await waiting(world, holder, 2)

    assert await world.instances[0].service.close(10)

    assert "shutting down" in (await waits).error


async def test_shutting_down_refuses_a_claim_whose_fetch_ends_only_then(world: World) -> None:
    claim = world.claim("new", world.device("gpu"))
    world.api.hang(path="resourceclaims/new")
    asked = asyncio.create_task(world.prepare(claim))
    await asyncio.to_thread(world.api.wait, lambda: world.fetches(claim))
    closing = asyncio.create_task(world.instances[0].service.close(10))
    await settled()

    world.api.release()

    assert "shutting down" in (await asked).error
    assert await closing
    world.rig.assert_empty()


async def test_an_unprepare_cancels_a_prepare_whose_fetch_is_under_way(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    world.api.hang(path="resourceclaims/one")
    asked = asyncio.create_task(world.prepare(claim))
    await asyncio.to_thread(world.api.wait, lambda: world.fetches(claim))

    await asyncio.wait_for(world.unprepare(claim), 15)
    assert "was cancelled before it began" in (await asked).error

    world.api.release()
    assert await world.instances[0].service.workers.drained(10)
    world.rig.assert_empty()
