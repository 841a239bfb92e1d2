"""The path of a claim through the driver. A claim may wait in this order: claim queue, API server, tickets, thread.

The transaction itself is in `prepare.py`. This module only decides which call waits for which (`claim_queue.py` has the
tools):

* Each claim has one queue of jobs. An unprepare cancels a waiting prepare, and waits for the end of a running one.
* The claim is fetched inside its queue, and again after every wait, because a claim can be deallocated and allocated
  elsewhere under the same UID.
* `Busy` releases everything. If the API still gives the devices to a holder, this is a double allocation and is refused.
  If all holders are gone or deallocated, their unprepare comes soon. The claim waits for it without thread or lock and
  keeps its place in the queue. After a forced delete, the new pod then needs no retry by the kubelet.
* No unprepare comes if a prepare came through after it (a call that the kubelet had given up). So a holder that is released
  is unprepared after a second look, if nothing runs on its devices.
* Claims that take no GPU (admin access) pass the claim queue only.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import random
from collections.abc import Callable, Mapping, Set
from concurrent.futures import Executor
from enum import Enum, auto
from functools import partial
from typing import Protocol, TypeVar

from gpuslice.core import claims
from gpuslice.core.model import Claim, ClaimRef, ClaimUid, GpuUuid
from gpuslice.core.record import Busy, PreparedClaim, Record
from gpuslice.errors import ApiError, ClaimError, DriverError, HungError, NotFoundError
from gpuslice.plugin.claim_queue import ClaimQueue, Job, Releases, Ticket, Tickets, Waiter, Workers
from gpuslice.plugin.prepare import Preparer, Scope

log = logging.getLogger(__name__)

T = TypeVar("T")

# The kubelet ends a call after 45 s (k/k, defaultClientCallTimeout). The driver must answer a waiting claim earlier.
MOST_WAIT_S = 40.0
_SPARE_S = 5.0
# Between two looks at a holder that no unprepare follows any more, because its prepare came after it.
SECOND_LOOK_S = 10.0
# A record is collected when the API server has not had its claim for this time (a force-deleted pod may still run).
ORPHAN_AGE_S = 600.0
# From one question whether a prepared claim still exists to the next, at most. Each minute would be 333 requests a second
# in a cluster with 20,000 claims.
HELD_LOOK_S = 300.0
# What the driver does for a claim without being asked, for the sentence about its failure.
_AIMS = {"recover": "undo a prepare that did not end", "mend": "put the CDI file right"}


class Hold(Enum):
    """What the API says of a claim that has a record here."""

    HELD = auto()  # it still gives the devices to the claim
    LEAVING = auto()  # it does not, and an unprepare comes: a force-deleted pod may still run
    RELEASED = auto()  # it does not, and no unprepare has to come any more


class ClaimReader(Protocol):
    """The call of this module to the API server. It blocks."""

    def claim(self, namespace: str, name: str) -> dict[str, object]: ...


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
        self._api = api
        self._driver = driver
        self._preparer = preparer
        self._releases = releases
        self._executor = executor
        self._queue = ClaimQueue()
        self.tickets = Tickets()
        self.workers = Workers(self.tickets, hang_limit_s, preparer.make_spares)
        self._absent_since: dict[ClaimUid, float] = {}
        self._ask_at: dict[ClaimUid, float] = {}  # when to ask again for a claim that is held
        self._unprepared: dict[ClaimUid, float] = {}  # when the kubelet said that it is done with a claim
        self._closed: DriverError | None = None

    async def prepare(self, ref: ClaimRef, timeout_s: float) -> PreparedClaim:
        """Prepare one claim. DriverError with a sentence for the pod's events. `timeout_s`: the caller's time limit."""
        deadline = asyncio.get_running_loop().time() + max(1.0, min(MOST_WAIT_S, timeout_s - _SPARE_S))
        return await self._queue.run(ref.uid, "prepare", lambda job: self._prepare(ref, deadline, job))

    async def unprepare(self, uid: ClaimUid) -> None:
        """Undo everything that the claim holds. Succeeds if nothing is left. Needs no API server."""
        await self._queue.run(uid, "unprepare", lambda job: self._unprepare(uid, job), calls_off="prepare")
        now = asyncio.get_running_loop().time()
        self._unprepared = {u: at for u, at in self._unprepared.items() if now - at < ORPHAN_AGE_S} | {uid: now}

    async def recover(self, only: Set[ClaimUid] | None = None) -> None:
        """Undo what a killed process or a lost card left incomplete. Called before the server open: it then has the first
        tickets."""
        try:
            unfinished = await asyncio.to_thread(self._preparer.unfinished)
        except DriverError as e:
            log.error("cannot read which prepares did not end, trying again later: %s", e)
            return
        wanted = (uid for uid in unfinished if only is None or uid in only)
        await asyncio.gather(
            *(self._alone(uid, "recover", self._preparer.recover) for uid in wanted if not self._queue.busy(uid))
        )

    async def mend(self) -> None:
        """Have the CDI files as the records want them: what somebody removed, changed or left is put right, not only when
        the kubelet asks."""
        try:
            uids = await asyncio.to_thread(self._preparer.to_mend)
        except DriverError as e:
            log.error("cannot compare the CDI files with the records, trying again later: %s", e)
            return
        await asyncio.gather(
            *(self._alone(uid, "mend", self._preparer.mend) for uid in uids if not self._queue.busy(uid))
        )

    async def ensure_daemons(self) -> None:
        """Make the MPS daemons of all records run and no others, one job for each card. It tries all, and then raises the
        first error."""
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
        hardware that was left on lost cards. `now` in seconds; called once a minute."""
        await self.recover()
        try:
            records = await asyncio.to_thread(self._preparer.records)
        except DriverError as e:
            log.error("cannot read which claims have records, trying again later: %s", e)
            return
        for uid in self._absent_since.keys() - records.keys():
            del self._absent_since[uid]
        self._ask_at = {uid: at for uid, at in self._ask_at.items() if uid in records and at > now}
        for uid, record in records.items():
            if uid in self._ask_at:
                continue
            try:
                if await self._hold(record) is Hold.HELD:
                    self._absent_since.pop(uid, None)
                    self._ask_at[uid] = now + HELD_LOOK_S * (1 + random.random()) / 2  # noqa: S311 - not a secret
                    continue
            except ApiError as e:
                log.info(
                    "cannot ask whether a claim still exists; the driver asks again in a minute claim=%s: %s",
                    record.plan.ref,
                    e,
                )
                continue
            since = self._absent_since.setdefault(uid, now)
            if now - since >= ORPHAN_AGE_S and not await self._in_use(record):
                log.warning("unpreparing a claim that the API server no longer has claim=%s", record.plan.ref)
                try:
                    await self.unprepare(uid)
                except DriverError as e:
                    log.error(
                        "cannot unprepare a claim that was deleted; the driver tries again claim=%s: %s",
                        record.plan.ref,
                        e,
                    )

    async def _in_use(self, record: Record) -> bool:
        name = f"a look at what claim {record.plan.ref} holds"
        scope = Scope(record.plan.gpus, record)
        try:
            return await self._work(scope, self.tickets.arrive(), Job(), name, lambda _: self._preparer.in_use(record))
        except HungError:
            return True

    async def call_apart(self, call: Callable[[], T], name: str) -> T:
        """Run a call for no claim in a thread that may be left behind; HungError where it does not come back."""
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
            claim, scope = await self._fetched(lambda: self._read(ref))
            with self._releases.listening() as news:
                prepare = partial(self._preparer.prepare, claim)
                answer: PreparedClaim | Busy = await self._work(scope, arrival, job, f"prepare {ref.uid}", prepare)
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
        """Wait until one of these claims has left. After a second look, unprepare those that are released."""
        clock = asyncio.get_running_loop().time
        if not released or deadline - clock() <= SECOND_LOOK_S:
            return await news.wait_any(leaving, deadline - clock())
        if await news.wait_any(leaving, SECOND_LOOK_S) or await self._unprepare_released(released):
            return True
        return await news.wait_any(leaving, deadline - clock())

    async def _unprepare_released(self, uids: Set[ClaimUid]) -> bool:
        """Unprepare those that are still released and on whose devices nothing runs; whether there were any."""
        records, done = await asyncio.to_thread(self._preparer.records), False
        for record in (records[uid] for uid in uids if uid in records):
            if await self._hold(record) is Hold.RELEASED and not await self._in_use(record):
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
        """Do something for a claim that nobody asked for; an error is only logged, because it is tried again."""

        async def work(job: Job) -> None:
            scope = self._preparer.scope(uid)
            await self._work(scope, self.tickets.arrive(), job, f"{name} {uid}", partial(verb, uid))

        try:
            await self._queue.run(uid, name, work)
        except DriverError as e:
            log.error("cannot %s, trying again later claim=%s: %s", _AIMS[name], uid, e)

    # ------------------------------------------------------------ parts

    async def _work(self, scope: Scope, arrival: int, job: Job, name: str, verb: Callable[[Scope], T | Scope]) -> T:
        """Run a verb in a thread, under a ticket for its GPUs. If the verb finds other GPUs, run it again with these."""
        while True:
            ticket: Ticket = await self.tickets.take(scope.gpus, arrival)
            answer = await self.workers.run(ticket, job, partial(verb, scope), name)
            if not isinstance(answer, Scope):
                return answer
            scope = answer

    def _read(self, ref: ClaimRef) -> tuple[Claim, Scope]:
        """The present claim in the API server, and the scope of its prepare. It blocks."""
        claim = self._fetch(ref)
        return claim, self._preparer.scope(ref.uid, claim)

    def _fetch(self, ref: ClaimRef) -> Claim:
        try:
            body = self._api.claim(ref.namespace, ref.name)
        except NotFoundError:
            raise ClaimError(
                f"claim {ref} does not exist in the API server, so its pod cannot start; delete the pod"
            ) from None
        return claims.parse(body, ref, self._driver)

    async def _unprepare_unheard(self, ref: ClaimRef, job: Job) -> None:
        """Undo a prepare whose caller is gone and whose claim is deleted, because perhaps no unprepare follows."""
        if job.listeners:
            return
        record = (await asyncio.to_thread(self._preparer.records)).get(ref.uid)
        try:
            if record is not None and await self._hold(record) is not Hold.HELD:
                await self._unprepare(ref.uid, job)
        except ApiError as e:
            log.info("cannot ask whether a claim still exists, so its devices stay prepared claim=%s: %s", ref, e)

    async def _leaving(self, claim: Claim, busy: Busy) -> tuple[frozenset[ClaimUid], frozenset[ClaimUid]]:
        """The holders that the API has let go already, and those of them that are released. ClaimError where their leaving
        would not be enough."""
        records: Mapping[ClaimUid, Record] = await asyncio.to_thread(self._preparer.records)
        holds = {
            holder.uid: await self._hold(records[holder.uid]) if holder.uid in records else Hold.LEAVING
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

    async def _hold(self, record: Record) -> Hold:
        """Whether the API server still gives the record's devices to its claim. ApiError if it does not say."""
        ref = record.plan.ref
        try:
            body = await self._fetched(lambda: self._api.claim(ref.namespace, ref.name))
        except NotFoundError:
            return Hold.RELEASED if ref.uid in self._unprepared else Hold.LEAVING
        devices = [grant.allocation.device for grant in record.plan.grants]
        if claims.is_held(body, ref.uid, devices, self._driver):
            return Hold.HELD
        return Hold.RELEASED if claims.is_released(body, ref.uid) else Hold.LEAVING

    async def _fetched(self, call: Callable[[], T]) -> T:
        """Run a call to the API server with this task's context (`run_in_executor` alone drops the `op=` id).

        These have threads of their own: a silent API server keeps them for many seconds, and what is read on the node
        must not wait behind them.
        """
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, call)
