"""The path of a claim through the driver. A claim may wait in this order: claim queue, API server, tickets, thread.

The transaction itself is in `prepare.py`. This module only decides which call waits for which. Its tools are in
`claim_queue.py`, `tickets.py`, `workers.py`, `releases.py`, `api_claims.py` and `collector.py`.

* Each claim has one queue of jobs. An unprepare cancels a waiting prepare, and waits for the end of a running one.
* The claim is fetched inside its queue, and again after every wait. During a wait it can be deallocated and allocated
  elsewhere under the same UID. If its GPUs are free, the thread that fetched it also prepares it.
* `Busy` releases everything. If the API still gives the devices to a holder, this is a double allocation and is refused.
  If all holders are gone or deallocated, their unprepare comes soon. The claim waits for it without thread or lock and
  keeps its place in the queue. After a forced delete, the new pod then needs no retry by the kubelet.
* A prepare that the kubelet has given up may arrive after the unprepare. Then no second unprepare comes. So the driver
  unprepares a released holder after a second look, if nothing runs on its devices.
* Claims that take no GPU (admin access) pass the claim queue only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Executor
from functools import partial
from typing import TypeVar

from gpuslice.core.model import Claim, ClaimRef, ClaimUid, GpuUuid
from gpuslice.core.record import Busy, PreparedClaim, Record
from gpuslice.errors import ApiError, ClaimError, DriverError, HungError
from gpuslice.plugin.api_claims import ApiClaims, ClaimReader, Hold
from gpuslice.plugin.claim_queue import ClaimQueue, Job
from gpuslice.plugin.collector import Collector
from gpuslice.plugin.prepare import Preparer, Scope
from gpuslice.plugin.releases import Releases, Waiter
from gpuslice.plugin.tickets import Ticket, Tickets
from gpuslice.plugin.workers import Turn, Workers

log = logging.getLogger(__name__)

T = TypeVar("T")

# The kubelet ends a call after 45 s (k/k, defaultClientCallTimeout). The driver must answer a waiting claim earlier.
MOST_WAIT_S = 40.0
_SPARE_S = 5.0
# Claims that are fetched in worker threads. The threads for all other requests are as many (`app.py`).
_AT_ONCE = 8
# The time before the second look at a released holder. Its prepare may have arrived after its unprepare.
SECOND_LOOK_S = 10.0
# What the driver does for a claim by itself. The words are part of the sentence about a failure.
_AIMS = {"recover": "undo a prepare that did not end", "mend": "put the CDI file right"}


class ClaimService:
    def __init__(
        self,
        *,
        api: ClaimReader,
        driver: str,
        preparer: Preparer,
        releases: Releases,
        executor: Executor,
        hang_limit_s: float = 15.0,
    ) -> None:
        self._claims = ApiClaims(api, driver, executor)
        self._preparer = preparer
        self._releases = releases
        self._queue = ClaimQueue()
        self.tickets = Tickets()
        self.workers = Workers(self.tickets, hang_limit_s, preparer.make_spares)
        self._collector = Collector(
            records=lambda: asyncio.to_thread(preparer.records),
            hold=self._claims.hold,
            in_use=self._in_use,
            unprepare=self.unprepare,
        )
        self._fetching = 0  # threads that fetch a claim and may go on with its prepare
        self._closed: DriverError | None = None

    async def prepare(self, ref: ClaimRef, timeout_s: float) -> PreparedClaim:
        """Prepare one claim. DriverError with a sentence for the pod's events. `timeout_s`: the caller's time limit."""
        deadline = asyncio.get_running_loop().time() + max(1.0, min(MOST_WAIT_S, timeout_s - _SPARE_S))
        return await self._queue.run(ref.uid, "prepare", lambda job: self._prepare(ref, deadline, job))

    async def unprepare(self, uid: ClaimUid) -> None:
        """Undo everything that the claim holds. Succeeds if nothing is left. Needs no API server."""
        await self._queue.run(uid, "unprepare", lambda job: self._unprepare(uid, job), calls_off="prepare")
        self._claims.note_unprepared(uid, asyncio.get_running_loop().time())

    async def recover(self, only: Set[ClaimUid] | None = None) -> None:
        """Undo what a killed process or a lost card left incomplete. Called before the server opens, so that it gets
        the first tickets."""
        try:
            unfinished = await asyncio.to_thread(self._preparer.unfinished)
        except DriverError as e:
            log.error("cannot find the unfinished prepares; the driver tries again later: %s", e)
            return
        wanted = (uid for uid in unfinished if only is None or uid in only)
        await asyncio.gather(
            *(self._alone(uid, "recover", self._preparer.recover) for uid in wanted if not self._queue.busy(uid))
        )

    async def mend(self) -> None:
        """Make the CDI files equal to the records. So a file that a person removed, changed or left is repaired before
        the next call of the kubelet."""
        try:
            uids = await asyncio.to_thread(self._preparer.to_mend)
        except DriverError as e:
            log.error("cannot compare the CDI files with the records; the driver tries again later: %s", e)
            return
        await asyncio.gather(
            *(self._alone(uid, "mend", self._preparer.mend) for uid in uids if not self._queue.busy(uid))
        )

    async def ensure_daemons(self) -> None:
        """Make exactly the MPS daemons of all records run, with one job for each card. It tries all, and then raises
        the first error."""
        gpus = await asyncio.to_thread(self._preparer.with_daemons)
        errors = [error for gpu in gpus if (error := await self._ensure_daemons(gpu))]
        if errors:
            raise errors[0]

    async def _ensure_daemons(self, gpu: GpuUuid) -> DriverError | None:
        try:
            await self._work(
                Scope((gpu,)),
                self.tickets.arrive(),
                Job(),
                f"the check of MPS daemons on {gpu}",
                lambda _: self._preparer.ensure_daemons(gpu),
            )
        except DriverError as e:
            return e
        return None

    async def collect(self, now: float) -> None:
        """Unprepare claims that the API server has not had for ten minutes, if nothing runs on their devices. Also undo the
        hardware that is left on lost cards. Call it once a minute, with the time of a clock."""
        await self.recover()
        await self._collector.collect(now)

    async def _in_use(self, record: Record) -> bool:
        name = f"a look at the devices of claim {record.plan.ref}"
        scope = Scope(record.plan.gpus, record)
        try:
            return await self._work(scope, self.tickets.arrive(), Job(), name, lambda _: self._preparer.in_use(record))
        except HungError:
            return True

    async def call_apart(self, call: Callable[[], T], name: str) -> T:
        """Run a call that belongs to no claim, in a thread that may be left behind. HungError if the call hangs."""
        ticket = await self.tickets.take((), self.tickets.arrive())
        return await self.workers.run(ticket, Job(), call, name)

    async def close(self, timeout_s: float) -> bool:
        """Refuse all waiting jobs, and let running work end. False if some work hangs."""
        self._closed = ClaimError("the driver is shutting down; the kubelet asks the next instance")
        self._releases.stop(self._closed)
        return await self.workers.drained(timeout_s)

    # ------------------------------------------------------------ the path of each verb

    async def _prepare(self, ref: ClaimRef, deadline: float, job: Job) -> PreparedClaim:
        arrival = self.tickets.arrive()
        while True:
            if self._closed is not None:
                raise self._closed
            with self._releases.listening() as news:
                claim, answer = await self._fetch_and_prepare(ref, arrival, job)
                if isinstance(answer, PreparedClaim):
                    await self._unprepare_unheard(ref, job)
                    return answer
                leaving, released = await self._leaving(claim, answer)
                names = ", ".join(str(holder) for holder in answer.holders if holder.uid in leaving)
                log.info("waiting for holders of the devices to be unprepared claim=%s holders=%s", ref, names)
                # Nothing else undoes the rest on a lost card, because the kubelet has its answer and does not call again.
                await self.recover(leaving)
                if not await self._left(news, leaving, released, deadline):
                    raise ClaimError(
                        f"the devices of claim {ref} are still held by {names}, which the kubelet has not unprepared yet; "
                        "the kubelet tries again"
                    )

    async def _left(self, news: Waiter, leaving: Set[ClaimUid], released: Set[ClaimUid], deadline: float) -> bool:
        """Wait until one of these claims has left. Unprepare the released claims after a second look."""
        clock = asyncio.get_running_loop().time
        if not released or deadline - clock() <= SECOND_LOOK_S:
            return await news.wait_any(leaving, deadline - clock())
        if await news.wait_any(leaving, SECOND_LOOK_S) or await self._unprepare_released(released):
            return True
        return await news.wait_any(leaving, deadline - clock())

    async def _unprepare_released(self, uids: Set[ClaimUid]) -> bool:
        """Unprepare the claims that are still released, if nothing runs on their devices. True if there were any."""
        records, done = await asyncio.to_thread(self._preparer.records), False
        for record in (records[uid] for uid in uids if uid in records):
            if await self._claims.hold(record) is Hold.RELEASED and not await self._in_use(record):
                log.warning("unpreparing a claim whose prepare came after its unprepare claim=%s", record.plan.ref)
                await self.unprepare(record.plan.ref.uid)
                done = True
        return done

    async def _unprepare(self, uid: ClaimUid, job: Job) -> None:
        # On the event loop, because it is one stat(2), and fetches that wait for a silent API server may fill the pool.
        scope = self._preparer.scope(uid)
        unprepare = partial(self._preparer.unprepare, uid)
        await self._work(scope, self.tickets.arrive(), job, f"unprepare {uid}", unprepare)

    async def _alone(self, uid: ClaimUid, name: str, verb: Callable[[ClaimUid, Scope], Scope | None]) -> None:
        """Run a verb for a claim without a call of the kubelet. An error is only logged, because the driver tries again."""

        async def work(job: Job) -> None:
            scope = self._preparer.scope(uid)
            await self._work(scope, self.tickets.arrive(), job, f"{name} {uid}", partial(verb, uid))

        try:
            await self._queue.run(uid, name, work)
        except DriverError as e:
            log.error("cannot %s; the driver tries again later claim=%s: %s", _AIMS[name], uid, e)

    # ------------------------------------------------------------ parts

    async def _work(self, scope: Scope, arrival: int, job: Job, name: str, verb: Callable[[Scope], T | Scope]) -> T:
        """Run a verb in a thread, under a ticket for its GPUs. If the verb finds other GPUs, run it again with these."""
        while True:
            ticket: Ticket = await self.tickets.take(scope.gpus, arrival)
            answer = await self.workers.run(ticket, job, partial(verb, scope), name)
            if not isinstance(answer, Scope):
                return answer
            scope = answer

    async def _fetch_and_prepare(self, ref: ClaimRef, arrival: int, job: Job) -> tuple[Claim, PreparedClaim | Busy]:
        """Fetch the claim and prepare it: in one thread if its GPUs are free, which saves 0.2 ms (measured)."""
        name = f"prepare {ref.uid}"
        answer: PreparedClaim | Busy | Scope
        if self._fetching < _AT_ONCE:
            self._fetching += 1
            try:
                claim, answer = await self.workers.run_freely(job, partial(self._at_once, ref, arrival), name)
            finally:
                self._fetching -= 1
        else:
            claim, answer = await self._claims.run(lambda: self._read(ref))
        if not isinstance(answer, Scope):
            return claim, answer
        return claim, await self._work(answer, arrival, job, name, partial(self._preparer.prepare, claim))

    def _at_once(self, ref: ClaimRef, arrival: int, turn: Turn) -> tuple[Claim, PreparedClaim | Busy | Scope]:
        """The claim and the answer of its prepare, or its scope if the claim has to wait. It blocks."""
        claim, scope = self._read(ref)
        if self._closed is not None:
            raise self._closed
        return claim, self._preparer.prepare(claim, scope) if turn.take(scope.gpus, arrival) else scope

    def _read(self, ref: ClaimRef) -> tuple[Claim, Scope]:
        """The present claim in the API server, and the scope of its prepare. It blocks."""
        claim = self._claims.fetch(ref)
        return claim, self._preparer.scope(ref.uid, claim)

    async def _unprepare_unheard(self, ref: ClaimRef, job: Job) -> None:
        """Undo a prepare whose caller is gone and whose claim is deleted, because the kubelet may not unprepare it."""
        if job.listeners:
            return
        record = (await asyncio.to_thread(self._preparer.records)).get(ref.uid)
        try:
            if record is not None and await self._claims.hold(record) is not Hold.HELD:
                await self._unprepare(ref.uid, job)
        except ApiError as e:
            log.info("cannot ask whether a claim still exists, so its devices stay prepared claim=%s: %s", ref, e)

    async def _leaving(self, claim: Claim, busy: Busy) -> tuple[frozenset[ClaimUid], frozenset[ClaimUid]]:
        """The holders that no longer have devices in the API, and those of them that are released.

        ClaimError if the claim would still have to wait for other holders.
        """
        records: Mapping[ClaimUid, Record] = await asyncio.to_thread(self._preparer.records)
        holds = {
            holder.uid: await self._claims.hold(records[holder.uid]) if holder.uid in records else Hold.LEAVING
            for holder in busy.holders
        }
        gone = frozenset(uid for uid, hold in holds.items() if hold is not Hold.HELD)
        still = await asyncio.to_thread(self._preparer.blockers, claim, gone)
        if still:
            names = ", ".join(map(str, still))
            if set(still) <= await asyncio.to_thread(self._preparer.held_under_other_names, claim):
                raise ClaimError(
                    f"claim {claim.ref} was allocated devices of a card that is held by {names} from a pool of another name, "
                    "because the node was renamed or the card was moved; delete the pods that hold it, and the kubelet tries "
                    "again"
                )
            raise ClaimError(
                f"claim {claim.ref} was allocated devices that are held by {names}; this is a double allocation: "
                "delete this pod to have it scheduled again, and update the scheduler if it is older than 1.36.2"
            )
        return gone, frozenset(uid for uid, hold in holds.items() if hold is Hold.RELEASED)
