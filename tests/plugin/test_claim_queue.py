"""Which job waits for which, without any GPU. Events decide the order, never time."""

from __future__ import annotations

import asyncio

import pytest
from gpuslice.core.model import ClaimUid
from gpuslice.errors import ClaimError
from gpuslice.plugin.claim_queue import ClaimQueue, Job

from tests.kit.waiting import settled

UID, OTHER = ClaimUid("u-1"), ClaimUid("u-2")


class Held:
    """A job that begins, says so, and ends when it is told to."""

    def __init__(self, result: str = "done", *, working: bool = True) -> None:
        self.begun, self.release = asyncio.Event(), asyncio.Event()
        self.result, self.working, self.runs = result, working, 0

    async def __call__(self, job: Job) -> str:
        self.runs += 1
        assert not self.working or job.begin()
        self.begun.set()
        try:
            await self.release.wait()
        finally:
            if self.working:
                job.end()
        return self.result


async def _nothing(job: Job) -> str:
    return "at once"


async def test_jobs_of_one_claim_come_one_after_the_other() -> None:
    gate, first = ClaimQueue(), Held()
    one = asyncio.create_task(gate.run(UID, "prepare", first))
    await first.begun.wait()
    second = Held("second")
    two = asyncio.create_task(gate.run(UID, "unprepare", second))
    await settled()
    assert not second.begun.is_set()

    first.release.set()
    second.release.set()

    assert [await one, await two] == ["done", "second"]


async def test_jobs_of_two_claims_do_not_wait_for_each_other() -> None:
    gate, stuck = ClaimQueue(), Held()
    one = asyncio.create_task(gate.run(UID, "prepare", stuck))
    await stuck.begun.wait()

    assert await gate.run(OTHER, "prepare", _nothing) == "at once"

    stuck.release.set()
    await one


@pytest.mark.contract(28)
async def test_a_retry_joins_the_call_that_still_runs() -> None:
    gate, job = ClaimQueue(), Held()
    callers = [asyncio.create_task(gate.run(UID, "prepare", job)) for _ in range(3)]
    await job.begun.wait()
    job.release.set()

    assert await asyncio.gather(*callers) == ["done"] * 3
    assert job.runs == 1


async def test_an_unprepare_calls_off_a_prepare_that_waits() -> None:
    gate, waits = ClaimQueue(), Held(working=False)
    prepare = asyncio.create_task(gate.run(UID, "prepare", waits))
    await waits.begun.wait()

    assert await gate.run(UID, "unprepare", _nothing, calls_off="prepare") == "at once"
    with pytest.raises(ClaimError, match="was cancelled"):
        await prepare


async def test_an_unprepare_outlasts_a_prepare_that_works() -> None:
    gate, works = ClaimQueue(), Held()
    prepare = asyncio.create_task(gate.run(UID, "prepare", works))
    await works.begun.wait()
    unprepare = asyncio.create_task(gate.run(UID, "unprepare", _nothing, calls_off="prepare"))
    await settled()
    assert not unprepare.done()

    works.release.set()

    assert await prepare == "done"
    assert await unprepare == "at once"


async def test_a_waiting_job_that_nobody_listens_to_any_more_is_called_off() -> None:
    gate, waits = ClaimQueue(), Held(working=False)
    callers = [asyncio.create_task(gate.run(UID, "prepare", waits)) for _ in range(2)]
    await waits.begun.wait()

    callers[0].cancel()
    await settled()
    assert not callers[1].done()
    callers[1].cancel()
    await settled()

    assert await gate.run(UID, "prepare", _nothing) == "at once"


@pytest.mark.contract(29)
async def test_work_goes_on_when_its_caller_has_gone() -> None:
    gate, works = ClaimQueue(), Held()
    caller = asyncio.create_task(gate.run(UID, "prepare", works))
    await works.begun.wait()
    caller.cancel()
    await settled()
    retry = asyncio.create_task(gate.run(UID, "prepare", _nothing))
    await settled()

    works.release.set()

    assert await retry == "done"
    assert works.runs == 1
