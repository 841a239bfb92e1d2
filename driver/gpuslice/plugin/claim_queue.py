"""The waiting of jobs: one queue of jobs for each claim, tickets for each GPU, and worker threads with a time limit.

All waiting happens on the event loop; only the work itself runs in threads. Two other designs were tried and failed. With
locks inside worker threads, jobs that waited for one hung GPU filled the whole executor. With a lock that a cancelled
coroutine releases while its thread still works, two jobs worked on one GPU. So the loop hands out tickets, and the end of
the *thread* releases them.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from gpuslice.core.model import ClaimUid, GpuUuid
from gpuslice.errors import ClaimError, DriverError, HungError
from gpuslice.nvml.session import Pulse

T = TypeVar("T")

_MOST_WAITING = 8  # idle threads that are kept for the next work; a burst may use more


class Job:
    """The state of a job in its queue: whether it can still be cancelled, and whether a caller still waits for it."""

    def __init__(self) -> None:
        self.listeners = 0
        self.working = 0  # > 0 while a thread works: such a job is never cancelled


@dataclass(slots=True)
class _Queued:
    kind: str
    job: Job
    task: asyncio.Task[Any] = field(init=False)


class ClaimQueue:
    """Runs the jobs of one claim one after the other, in the order of the calls."""

    def __init__(self) -> None:
        self._lines: dict[ClaimUid, list[_Queued]] = {}

    async def run(self, uid: ClaimUid, kind: str, work: Callable[[Job], Awaitable[T]], *, calls_off: str = "") -> T:
        """Run `work` when all earlier jobs of this claim have ended.

        A call of the same kind as the last job in the queue joins that job. `calls_off` names a kind: waiting jobs of
        this kind are cancelled, and their callers get a ClaimError. A job without callers is cancelled too.
        """
        line = self._lines.setdefault(uid, [])
        for job in line:
            if job.kind == calls_off and not job.job.working:
                job.task.cancel()
        if line and line[-1].kind == kind and not line[-1].task.cancelling():
            job = line[-1]
        else:
            job = _Queued(kind, Job())
            job.task = asyncio.ensure_future(self._after(tuple(j.task for j in line), work, job.job))
            line.append(job)
            job.task.add_done_callback(lambda _: self._leave(uid, job))
        answer: T = await self._listen(job, uid)
        return answer

    def busy(self, uid: ClaimUid) -> bool:
        """Whether a job of this claim runs or waits."""
        return uid in self._lines

    async def _after(self, earlier: Sequence[asyncio.Task[Any]], work: Callable[[Job], Awaitable[T]], job: Job) -> T:
        if earlier:
            await asyncio.wait(earlier)
        return await work(job)

    async def _listen(self, job: _Queued, uid: ClaimUid) -> Any:
        job.job.listeners += 1
        try:
            return await asyncio.shield(job.task)
        except asyncio.CancelledError:
            if not job.task.cancelled():
                raise  # the caller was cancelled, not the job
            raise ClaimError(
                f"{job.kind} of claim {uid} was cancelled before it began; the kubelet asks again if a pod needs the claim"
            ) from None
        finally:
            job.job.listeners -= 1
            if not job.job.listeners and not job.job.working and not job.task.done():
                job.task.cancel()

    def _leave(self, uid: ClaimUid, job: _Queued) -> None:
        line = self._lines[uid]
        line.remove(job)
        if not line:
            del self._lines[uid]
        if not job.task.cancelled():
            job.task.exception()  # read the exception, also if no caller waits any more


class Ticket:
    """The right to work on some GPUs. It is released exactly once."""

    def __init__(self, gpus: Sequence[GpuUuid], arrival: int) -> None:
        self.gpus = tuple(gpus)
        self.arrival = arrival
        self.held: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Tickets:
    """First come, first served for each GPU. A claim with several GPUs gets all its places at once, or none yet."""

    def __init__(self) -> None:
        self._waiting: list[Ticket] = []
        self._holders: dict[GpuUuid, Ticket] = {}
        self._hung: dict[GpuUuid, str] = {}
        self._arrivals = 0

    def arrive(self) -> int:
        """A number that keeps the place of a claim in the queue over several tries."""
        self._arrivals += 1
        return self._arrivals

    async def take(self, gpus: Sequence[GpuUuid], arrival: int) -> Ticket:
        """Wait for this claim's turn on all these GPUs. HungError at once if one of them hangs."""
        ticket = Ticket(gpus, arrival)
        for gpu in gpus:
            if gpu in self._hung:
                raise HungError(self._hung[gpu])
        self._waiting.append(ticket)
        self._waiting.sort(key=lambda t: t.arrival)
        self._grant()
        try:
            await ticket.held
        except BaseException:
            self.release(ticket)
            raise
        return ticket

    def release(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        for gpu in ticket.gpus:
            if self._holders.get(gpu) is ticket:
                del self._holders[gpu]
                self._hung.pop(gpu, None)
        self._grant()

    def hang(self, ticket: Ticket, text: str) -> None:
        """Record that the work under this ticket hangs: refuse all present and later jobs for its GPUs."""
        for gpu in ticket.gpus:
            self._hung[gpu] = text
        for waiting in [t for t in self._waiting if set(t.gpus) & set(ticket.gpus)]:
            if not waiting.held.done():
                waiting.held.set_exception(HungError(text))

    def hung(self) -> dict[GpuUuid, str]:
        return dict(self._hung)

    def _grant(self) -> None:
        ahead: set[GpuUuid] = set(self._holders)
        for ticket in list(self._waiting):
            if ticket.held.done():
                continue
            if not ahead & set(ticket.gpus):
                self._waiting.remove(ticket)
                self._holders.update(dict.fromkeys(ticket.gpus, ticket))
                ticket.held.set_result(None)
            ahead |= set(ticket.gpus)


class _Watchdog:
    """The timer of one piece of work, and the calls that it looks at."""

    def __init__(self) -> None:
        self.pulse = Pulse()
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        if self.timer is not None:
            self.timer.cancel()


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
        """The result of `work`; HungError where one call takes longer than the limit, while the thread goes on and keeps
        the ticket. Many calls may take longer together: fourteen partitions are made in sixteen seconds.

        The end of the work releases the ticket. The work has the context variables of the caller (the `op=` id).
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        context, watchdog = contextvars.copy_context(), _Watchdog()
        watchdog.pulse.listen(context)

        def body() -> None:
            end: Callable[[], None]
            try:
                end = partial(answer.set_result, context.run(work))
            except BaseException as e:  # noqa: BLE001 - passed to the caller that awaits the answer
                end = partial(answer.set_exception, e)
            loop.call_soon_threadsafe(ended, end)

        def ended(end: Callable[[], None]) -> None:
            watchdog.cancel()
            job.working -= 1
            self._leave()
            self._tickets.release(ticket)
            if not answer.done():
                end()

        try:
            self._give(body)
        except RuntimeError as e:
            self._tickets.release(ticket)
            raise ClaimError(f"{name} cannot begin: {e}; raise the limit of processes of this container") from e
        self._watch(watchdog, ticket, answer, name)
        job.working += 1
        return await answer

    def _watch(self, watchdog: _Watchdog, ticket: Ticket, answer: asyncio.Future[Any], name: str) -> None:
        """Look again when the call of now would be overdue."""
        quiet_s = time.monotonic() - watchdog.pulse.beat
        if quiet_s < self._limit_s:
            again = partial(self._watch, watchdog, ticket, answer, name)
            watchdog.timer = asyncio.get_running_loop().call_later(self._limit_s - quiet_s, again)
        else:
            call = watchdog.pulse.call
            self._overdue(ticket, answer, f"{call} ({name})" if call else name)

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
        afterwards()


class Releases:
    """Notifications of removed records, by this instance or another one. Claims that wait for a holder wait for them."""

    def __init__(self) -> None:
        self._waiters: set[Waiter] = set()

    def notify(self, uids: Sequence[ClaimUid]) -> None:
        for waiter in self._waiters:
            waiter.gone.update(uids)
            waiter.changed.set()

    def stop(self, error: DriverError) -> None:
        """End every wait with this error (shutdown)."""
        for waiter in self._waiters:
            waiter.error = error
            waiter.changed.set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[Waiter]:
        """Listen from now on. Call it *before* the look at the records. Otherwise a holder may leave between the look and
        the call, and only a time-out wakes the waiter (measured: 67 s instead of 3 s for 150 pods)."""
        waiter = Waiter()
        self._waiters.add(waiter)
        try:
            yield waiter
        finally:
            self._waiters.discard(waiter)


class Waiter:
    def __init__(self) -> None:
        self.gone: set[ClaimUid] = set()
        self.changed = asyncio.Event()
        self.error: DriverError | None = None

    async def wait_any(self, uids: Collection[ClaimUid], timeout_s: float) -> bool:
        """Wait until one of these records is gone. False after the time limit. An overflow ("") counts as all records."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.gone & {*uids, ClaimUid("")}:
                    self.changed.clear()
                    if self.error is not None:
                        raise self.error
                    await self.changed.wait()
        except TimeoutError:
            return False
        return True
