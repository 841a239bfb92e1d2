"""Work in threads: its limit, its end and its context. Events decide the order, never time."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from gpuslice.core.model import GpuUuid
from gpuslice.errors import ClaimError, HungError
from gpuslice.nvml.session import Session
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.plugin.claim_queue import Job
from gpuslice.plugin.tickets import Tickets
from gpuslice.plugin.workers import Turn, Workers

from tests.kit.waiting import settled

A, B = GpuUuid("GPU-a"), GpuUuid("GPU-b")


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

    with pytest.raises(HungError, match="has not returned"):
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

    with pytest.raises(HungError, match=rf"^processes on {gpu.uuid} \(prepare u-1\) has not returned for 0.2 s"):
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
    await settled()
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


# ---------------------------------------------------------------- work that takes its ticket itself


async def test_work_takes_a_free_gpu_in_its_own_thread_and_frees_it_at_its_end() -> None:
    tickets = Tickets()
    workers, stuck, threads = Workers(tickets), Stuck(), list[threading.Thread]()

    def work(turn: Turn) -> bool:
        threads.append(threading.current_thread())
        taken = turn.take([A], 1)
        threads.append(threading.current_thread())
        stuck()
        return taken

    job = Job()
    answer = asyncio.ensure_future(workers.run_freely(job, work, "prepare u-1"))
    assert await asyncio.to_thread(stuck.begun.wait, 10)
    assert job.working
    assert not job.abandon()
    assert tickets.take_now([A], 2) is None

    stuck.release.set()
    assert await answer
    assert threads[0] is threads[1]
    assert job.abandon()
    assert tickets.take_now([A], 3) is not None


async def test_work_does_not_overtake_a_claim_that_waits_for_one_of_its_gpus() -> None:
    tickets = Tickets()
    await tickets.take([A], tickets.arrive())
    waiting = asyncio.create_task(tickets.take([A, B], tickets.arrive()))
    await settled()
    job = Job()

    assert not await Workers(tickets).run_freely(job, lambda turn: turn.take([B], tickets.arrive()), "prepare u-1")

    assert not job.working
    waiting.cancel()
    await settled()
    assert tickets.take_now([B], 9) is not None


async def test_work_of_a_cancelled_job_takes_nothing() -> None:
    tickets = Tickets()
    workers, stuck, taken = Workers(tickets), Stuck(), list[bool]()

    def work(turn: Turn) -> None:
        stuck()
        taken.append(turn.take([A], 1))

    job = Job()
    answer = asyncio.ensure_future(workers.run_freely(job, work, "prepare u-1"))
    assert await asyncio.to_thread(stuck.begun.wait, 10)
    assert job.abandon()
    answer.cancel()

    stuck.release.set()
    assert await workers.drained(10)
    assert taken == [False]
    assert tickets.take_now([A], 2) is not None


async def test_a_long_fetch_is_no_hung_gpu_but_a_long_call_after_it_is() -> None:
    tickets, fetch, call = Tickets(), Stuck(), Stuck()
    workers = Workers(tickets, limit_s=0.05)

    def work(turn: Turn) -> str:
        fetch()
        assert turn.take([A], 1)
        return call()

    answer = asyncio.ensure_future(workers.run_freely(Job(), work, "prepare u-1"))
    done, _ = await asyncio.wait([answer], timeout=0.5)  # ten times the limit
    assert not done

    fetch.release.set()
    with pytest.raises(HungError, match="prepare u-1 has not returned"):
        await answer
    assert set(tickets.hung()) == {A}
    call.release.set()
    assert await workers.drained(10)
    assert tickets.hung() == {}
