"""Worker threads: they run blocking work under a ticket, with a limit on the time of each call to the hardware.

Two other designs were tried and failed. With locks inside worker threads, jobs that waited for one hung GPU filled the
whole executor. With a lock that a cancelled coroutine releases while its thread still works, two jobs worked on one GPU. So
the loop hands out tickets, and the end of the *thread* releases them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from gpuslice.core.model import GpuUuid
from gpuslice.errors import ClaimError, HungError
from gpuslice.nvml.pulse import Pulse
from gpuslice.plugin.claim_queue import Job
from gpuslice.plugin.tickets import Ticket, Tickets

log = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_WAITING = 8  # idle threads that are kept for the next work; a burst may use more


class Turn:
    """The ticket of a piece of work, from its start or since `take`. A call to the hardware needs a ticket."""

    def __init__(self, tickets: Tickets, job: Job, ticket: Ticket | None = None) -> None:
        self.pulse, self.ticket = Pulse(), ticket
        self.timer: asyncio.TimerHandle | None = None
        self._tickets, self._job = tickets, job

    def take(self, gpus: Sequence[GpuUuid], arrival: int) -> bool:
        """Take a ticket for these GPUs, in the thread of the work. False if it would have to wait, or the job was cancelled.

        Then the thread goes on without the event loop: each change of threads costs 0.1 ms (measured).
        """
        if not self._job.begin():
            return False
        ticket = self._tickets.take_now(gpus, arrival)
        if ticket is None:
            self._job.end()
            return False
        self.pulse.beat = time.monotonic()
        self.ticket = ticket
        return True

    def end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.ticket is not None:
            self._job.end()
            self._tickets.release(self.ticket)


class Workers:
    """Runs blocking work in threads, under tickets, and reports work that hangs.

    A thread that has ended its work waits for the next work. If no thread waits, a new one starts. So any number of hung
    threads does no harm. (The start of a thread costs more than the own work of a whole-card prepare, because the loop
    waits until the new thread has run once.)
    """

    def __init__(self, tickets: Tickets, limit_s: float = 15.0, afterwards: Callable[[], None] = lambda: None) -> None:
        """`afterwards` is called in the thread that has ended a job, after the thread has passed the answer on."""
        self._tickets = tickets
        self._limit_s = limit_s
        self._afterwards = afterwards
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting = 0  # threads that have no job
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(self, ticket: Ticket, job: Job, work: Callable[[], T], name: str) -> T:
        """The result of `work`, which has this ticket. Otherwise like `run_freely`."""
        job.begin()
        return await self._run(Turn(self._tickets, job, ticket), lambda _: work(), name)

    async def run_freely(self, job: Job, work: Callable[[Turn], T], name: str) -> T:
        """The result of `work`, which has no ticket yet and may take one. HungError if, from then on, one call takes longer
        than the limit; then the thread continues and keeps the ticket. Many calls may take longer together: fourteen
        partitions are made in sixteen seconds.

        The end of the work releases the ticket. The work has the context variables of the caller (the `op=` id).
        """
        return await self._run(Turn(self._tickets, job), work, name)

    async def _run(self, turn: Turn, work: Callable[[Turn], T], name: str) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()
        turn.pulse.listen(context)

        def body() -> None:
            end: Callable[[], None]
            try:
                end = partial(answer.set_result, context.run(work, turn))
            except BaseException as e:  # noqa: BLE001 - passed to the caller that awaits the answer
                end = partial(answer.set_exception, e)
            loop.call_soon_threadsafe(ended, end)

        def ended(end: Callable[[], None]) -> None:
            self._leave()
            turn.end()
            if not answer.done():
                end()

        try:
            self._give(body)
        except RuntimeError as e:
            turn.end()
            raise ClaimError(f"{name} cannot begin: {e}; raise the limit of processes of this container") from e
        self._watch(turn, answer, name)
        return await answer

    def _watch(self, turn: Turn, answer: asyncio.Future[Any], name: str) -> None:
        """Check again when the present call would be overdue. Without a ticket there are no calls to the hardware."""
        quiet_s = 0.0 if turn.ticket is None else time.monotonic() - turn.pulse.beat
        if turn.ticket is None or quiet_s < self._limit_s:
            again = partial(self._watch, turn, answer, name)
            turn.timer = asyncio.get_running_loop().call_later(self._limit_s - quiet_s, again)
        else:
            call = turn.pulse.call
            self._overdue(turn.ticket, answer, f"{call} ({name})" if call else name)

    def _overdue(self, ticket: Ticket, answer: asyncio.Future[Any], name: str) -> None:
        error = HungError.overdue(name, ticket.gpus, self._limit_s)
        self._tickets.hang(ticket, str(error))
        if not answer.done():
            answer.set_exception(error)

    def _give(self, job: Callable[[], None]) -> None:
        """Pass work to a thread. RuntimeError if no thread waits and none can start."""
        if self._waiting:
            self._waiting -= 1
        else:
            threading.Thread(
                target=_serve_jobs, args=(self._jobs, self._afterwards), name="worker", daemon=True
            ).start()
        self._working += 1
        self._idle.clear()
        self._jobs.put(job)

    def _leave(self) -> None:
        if self._waiting < _MOST_WAITING:
            self._waiting += 1
        else:
            self._jobs.put(None)  # this thread or another idle thread ends
        self._working -= 1
        if not self._working:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait until no thread works any more. False after the time limit (a call hangs: the process must `_exit`).

        Idle threads end.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        while self._waiting:
            self._waiting -= 1
            self._jobs.put(None)
        return self._idle.is_set()


def _serve_jobs(jobs: queue.SimpleQueue[Callable[[], None] | None], afterwards: Callable[[], None]) -> None:
    """The main loop of a thread, until the thread has to end."""
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds a reference to the claim's result, or to its error with all frames
        try:
            afterwards()
        except Exception:  # the thread counts as waiting already; without it the next job has no thread
            log.exception("the work between two jobs failed unexpectedly")
