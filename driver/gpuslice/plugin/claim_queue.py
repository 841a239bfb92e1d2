"""One queue of jobs for each claim. All waiting happens on the event loop; only the work itself runs in threads."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gpuslice.core.model import ClaimUid
from gpuslice.errors import ClaimError

T = TypeVar("T")


class Job:
    """The state of a job in its queue: whether it can still be cancelled, and whether a caller still waits for it.

    `begin` and `end` are for any thread, because a thread that has fetched a claim continues with the work by itself.
    """

    def __init__(self) -> None:
        self.listeners = 0
        self._lock = threading.Lock()
        self._working = 0
        self._abandoned = False

    @property
    def working(self) -> bool:
        """Whether a thread works for it. Such a job is never cancelled."""
        return self._working > 0

    def begin(self) -> bool:
        """Begin work that nothing cancels until `end`. False if the job was abandoned before."""
        with self._lock:
            self._working += not self._abandoned
            return not self._abandoned

    def end(self) -> None:
        with self._lock:
            self._working -= 1

    def abandon(self) -> bool:
        """Keep all work of the job from beginning. False if a thread works for it now."""
        with self._lock:
            self._abandoned = self._abandoned or not self._working
            return self._abandoned


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
            if job.kind == calls_off and job.job.abandon():
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
            if not job.job.listeners and not job.task.done() and job.job.abandon():
                job.task.cancel()

    def _leave(self, uid: ClaimUid, job: _Queued) -> None:
        line = self._lines[uid]
        line.remove(job)
        if not line:
            del self._lines[uid]
        if not job.task.cancelled():
            job.task.exception()  # read the exception, also if no caller waits any more
