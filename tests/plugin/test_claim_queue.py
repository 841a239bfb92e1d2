"""Who waits where, without any GPU: events decide the order, never time."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from gpuslice.core.model import ClaimUid, GpuUuid
from gpuslice.errors import ClaimError, HungError
from gpuslice.nvml.session import Session
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.plugin.claim_queue import ClaimQueue, Job, Releases, Tickets, Workers

A, B = GpuUuid("GPU-a"), GpuUuid("GPU-b")
UID, OTHER = ClaimUid("u-1"), ClaimUid("u-2")


class Held:
    """A job that begins, says so, and ends when it is told to."""

    def __init__(self, result: str = "done", *, working: bool = True) -> None:
        self.begun, self.release = asyncio.Event(), asyncio.Event()
        self.result, self.working, self.runs = result, working, 0

    async def __call__(self, job: Job) -> str:
        self.runs += 1
        job.working += self.working
        self.begun.set()
        try:
            await self.release.wait()
        finally:
            job.working -= self.working
        return self.result


async def _nothing(job: Job) -> str:
    return "at once"


async def _settled() -> None:
    """Let every task that can run do so; the loop runs ready callbacks in order."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_jobs_of_one_claim_come_one_after_the_other() -> None:
    gate, first = ClaimQueue(), Held()
    one = asyncio.create_task(gate.run(UID, "prepare", first))
    await first.begun.wait()
    second = Held("second")
    two = asyncio.create_task(gate.run(UID, "unprepare", second))
    await _settled()
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
    await _settled()
    assert not unprepare.done()

    works.release.set()

    assert await prepare == "done"
    assert await unprepare == "at once"


async def test_a_waiting_job_that_nobody_listens_to_any_more_is_called_off() -> None:
    gate, waits = ClaimQueue(), Held(working=False)
    callers = [asyncio.create_task(gate.run(UID, "prepare", waits)) for _ in range(2)]
    await waits.begun.wait()

    callers[0].cancel()
    await _settled()
    assert not callers[1].done()
    callers[1].cancel()
    await _settled()

    assert await gate.run(UID, "prepare", _nothing) == "at once"


@pytest.mark.contract(29)
async def test_work_goes_on_when_its_caller_has_gone() -> None:
    gate, works = ClaimQueue(), Held()
    caller = asyncio.create_task(gate.run(UID, "prepare", works))
    await works.begun.wait()
    caller.cancel()
    await _settled()
    retry = asyncio.create_task(gate.run(UID, "prepare", _nothing))
    await _settled()

    works.release.set()

    assert await retry == "done"
    assert works.runs == 1


async def test_a_gpu_is_handed_out_in_the_order_of_arrival() -> None:
    tickets = Tickets()
    first = await tickets.take([A], tickets.arrive())
    early, late = tickets.arrive(), tickets.arrive()
    order: list[str] = []

    async def wait(name: str, arrival: int) -> None:
        ticket = await tickets.take([A], arrival)
        order.append(name)
        tickets.release(ticket)

    waiting = [asyncio.create_task(wait("late", late)), asyncio.create_task(wait("early", early))]
    await _settled()
    assert order == []
    tickets.release(first)
    await asyncio.gather(*waiting)

    assert order == ["early", "late"]


async def test_another_gpu_is_free_while_one_is_held() -> None:
    tickets = Tickets()
    await tickets.take([A], tickets.arrive())

    assert (await tickets.take([B], tickets.arrive())).gpus == (B,)


async def test_a_claim_over_two_gpus_gets_both_or_none_and_is_not_overtaken() -> None:
    tickets = Tickets()
    held = await tickets.take([A], tickets.arrive())
    both = asyncio.create_task(tickets.take([A, B], tickets.arrive()))
    await _settled()
    later = asyncio.create_task(tickets.take([B], tickets.arrive()))
    await _settled()
    assert not both.done()
    assert not later.done()

    tickets.release(held)
    tickets.release(await both)

    assert (await later).gpus == (B,)


async def test_a_caller_that_leaves_the_queue_blocks_nobody() -> None:
    tickets = Tickets()
    held = await tickets.take([A], tickets.arrive())
    leaves = asyncio.create_task(tickets.take([A], tickets.arrive()))
    stays = asyncio.create_task(tickets.take([A], tickets.arrive()))
    await _settled()
    leaves.cancel()
    await _settled()

    tickets.release(held)

    assert (await stays).gpus == (A,)


class Stuck:
    """Blocking work that begins, says so, and ends when it is told to."""

    def __init__(self) -> None:
        self.begun, self.release = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        assert self.release.wait(30)
        return "late"


async def _hung(workers: Workers, tickets: Tickets, work: Callable[[], str]) -> Awaitable[str]:
    ticket = await tickets.take([A], tickets.arrive())
    return asyncio.ensure_future(workers.run(ticket, Job(), work, "prepare u-1"))


async def test_a_gpu_whose_call_does_not_come_back_answers_everybody_until_it_does() -> None:
    tickets = Tickets()
    workers, stuck = Workers(tickets, limit_s=0.05), Stuck()
    answer = await _hung(workers, tickets, stuck)
    queued = asyncio.create_task(tickets.take([A], tickets.arrive()))

    with pytest.raises(HungError, match="has not come back"):
        await answer
    with pytest.raises(HungError):
        await queued
    with pytest.raises(HungError):
        await tickets.take([A], tickets.arrive())
    assert (await tickets.take([B], tickets.arrive())).gpus == (B,)
    assert set(tickets.hung()) == {A}
    assert not await workers.drained(0.01)

    stuck.release.set()
    assert await workers.drained(10)
    assert tickets.hung() == {}
    assert (await tickets.take([A], tickets.arrive())).gpus == (A,)


async def test_work_of_many_calls_that_all_come_back_is_no_hung_gpu_however_long_it_takes(tmp_path: Path) -> None:
    """The limit is for one call: fourteen partitions take sixteen seconds, and no card hangs."""
    tickets, limit_s = Tickets(), 0.5
    workers, release = Workers(tickets, limit_s), threading.Event()
    nvml = Session(lambda: SimNvml(tmp_path, "l4", latency="zero"))
    (gpu,) = nvml.gpus()

    def works() -> str:
        while not release.is_set():
            nvml.look(gpu.uuid)
        return "done"

    answer = asyncio.ensure_future(await _hung(workers, tickets, works))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(answer), 3 * limit_s)
    release.set()

    assert await answer == "done"
    nvml.close()


async def test_one_call_among_many_that_does_not_come_back_is_named(tmp_path: Path) -> None:
    tickets = Tickets()
    workers, sim = Workers(tickets, limit_s=0.2), SimNvml(tmp_path, "l4", latency="zero")
    nvml, (gpu,) = Session(lambda: sim), sim.gpus()
    sim.cue("hang", "processes", times=None)

    def works() -> str:
        for call in (nvml.look, nvml.processes, nvml.minor):
            call(gpu.uuid)
        return "done"

    answer = asyncio.ensure_future(await _hung(workers, tickets, works))

    with pytest.raises(HungError, match=rf"^processes on {gpu.uuid} \(prepare u-1\) has not come back for 0.2 s"):
        await answer
    sim.withdraw(None)
    assert await workers.drained(10)
    nvml.close()


async def test_the_end_of_the_thread_frees_the_gpu_not_the_end_of_the_caller() -> None:
    tickets = Tickets()
    workers, stuck = Workers(tickets), Stuck()
    caller = asyncio.ensure_future(await _hung(workers, tickets, stuck))
    assert await asyncio.to_thread(stuck.begun.wait, 10)
    caller.cancel()
    following = asyncio.create_task(tickets.take([A], tickets.arrive()))
    await _settled()
    assert not following.done()

    stuck.release.set()

    assert (await following).gpus == (A,)


async def test_work_keeps_the_context_of_its_request() -> None:
    op: contextvars.ContextVar[str] = contextvars.ContextVar("op")
    op.set("7f")
    tickets = Tickets()
    ticket = await tickets.take([A], tickets.arrive())

    assert await Workers(tickets).run(ticket, Job(), op.get, "look") == "7f"


async def test_an_error_of_the_work_reaches_the_caller() -> None:
    def fails() -> None:
        raise ClaimError("no")

    tickets = Tickets()
    ticket = await tickets.take([A], tickets.arrive())
    with pytest.raises(ClaimError, match="no"):
        await Workers(tickets).run(ticket, Job(), fails, "prepare")


async def test_work_after_work_runs_in_one_thread_that_goes_home_when_all_is_done() -> None:
    tickets = Tickets()
    workers = Workers(tickets)
    ran = [
        await workers.run(await tickets.take([A], tickets.arrive()), Job(), threading.current_thread, "look")
        for _ in range(3)
    ]

    assert len(set(ran)) == 1
    assert await workers.drained(10)
    ran[0].join(10)
    assert not ran[0].is_alive()


async def test_a_thread_whose_work_between_two_jobs_fails_serves_the_next_job() -> None:
    tickets, done = Tickets(), threading.Semaphore(0)

    def fails() -> None:
        done.release()
        raise OSError(24, "Too many open files")

    workers = Workers(tickets, limit_s=0.5, afterwards=fails)
    for _ in range(3):
        ticket = await tickets.take([A], tickets.arrive())
        assert await workers.run(ticket, Job(), lambda: "done", "prepare u-1") == "done"
        await asyncio.to_thread(done.acquire)
    assert await workers.drained(10)


async def test_a_thread_that_cannot_be_started_costs_the_gpu_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    tickets = Tickets()
    workers = Workers(tickets, limit_s=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(ClaimError, match="can't start new thread; raise the limit of processes"):
            await workers.run(await tickets.take([A], tickets.arrive()), Job(), lambda: None, "prepare u-1")

    assert await workers.drained(0.01)
    assert (await tickets.take([A], tickets.arrive())).gpus == (A,)


async def test_a_waiter_hears_of_a_departure_that_came_before_it_waited() -> None:
    releases = Releases()
    with releases.listening() as news:
        releases.notify([UID])

        assert await news.wait_any([UID, OTHER], 30)


async def test_a_waiter_gives_up_at_its_deadline() -> None:
    releases = Releases()
    with releases.listening() as news:
        releases.notify([OTHER])

        assert not await news.wait_any([UID], 0.01)


async def test_lost_news_wakes_everybody() -> None:
    releases = Releases()
    with releases.listening() as news:
        releases.notify([ClaimUid("")])

        assert await news.wait_any([UID], 30)


async def test_shutting_down_ends_every_wait() -> None:
    releases = Releases()
    with releases.listening() as news:
        waiting = asyncio.create_task(news.wait_any([UID], 30))
        await _settled()
        releases.stop(ClaimError("shutting down"))

        with pytest.raises(ClaimError, match="shutting down"):
            await waiting
