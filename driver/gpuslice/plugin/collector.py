"""Unprepares claims that the API server no longer has, because the kubelet may have forgotten them.

The longer a claim exists, the less often the driver asks for it: in the end every five to ten minutes. So a node at rest
sends nothing to the API server for most of the time. A cluster with 20,000 claims sends 44 such requests a second.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Mapping

from gpuslice.core.model import ClaimUid
from gpuslice.core.record import Record
from gpuslice.errors import ApiError, DriverError
from gpuslice.plugin.api_claims import Hold

log = logging.getLogger(__name__)

# How long a claim is absent before its record is collected. A force-deleted pod may still run for a while.
ORPHAN_AGE_S = 600.0
# Between two questions whether a prepared claim still exists. The time doubles while the answer is yes.
_ASK_S, _LONGEST_ASK_S = 60.0, 600.0


class Collector:
    """Remembers which claims are absent, and when to ask for a claim again."""

    def __init__(
        self,
        *,
        records: Callable[[], Awaitable[Mapping[ClaimUid, Record]]],
        hold: Callable[[Record], Awaitable[Hold]],
        in_use: Callable[[Record], Awaitable[bool]],
        unprepare: Callable[[ClaimUid], Awaitable[None]],
    ) -> None:
        self._records, self._hold, self._in_use, self._unprepare = records, hold, in_use, unprepare
        self._absent_since: dict[ClaimUid, float] = {}
        self._next_ask: dict[ClaimUid, tuple[float, float]] = {}  # the next question, and the pause after it

    async def collect(self, now: float) -> None:
        """Unprepare claims that are absent for ten minutes, if nothing runs on their devices. `now`: seconds of any clock."""
        try:
            records = await self._records()
        except DriverError as e:
            log.error("cannot find the claims with records; the driver tries again later: %s", e)
            return
        for known in (self._absent_since, self._next_ask):
            for uid in known.keys() - records.keys():
                del known[uid]
        for uid, record in records.items():
            due, pause_s = self._next_ask.get(uid, (now, _ASK_S))
            if now >= due:
                await self._collect_one(uid, record, now, pause_s)

    async def _collect_one(self, uid: ClaimUid, record: Record, now: float, pause_s: float) -> None:
        """Ask for this claim. `pause_s`: the time to the next question, if the claim still exists."""
        ref = record.plan.ref
        try:
            if await self._hold(record) is Hold.HELD:
                self._absent_since.pop(uid, None)
                # At random, because the nodes of a cluster may start together, and must not ask together.
                due = now + pause_s * (1 + random.random()) / 2  # noqa: S311 - not a secret
                self._next_ask[uid] = due, min(2 * pause_s, _LONGEST_ASK_S)
                return
        except ApiError as e:
            log.info("cannot ask whether a claim still exists; the driver asks again in a minute claim=%s: %s", ref, e)
            return
        self._next_ask.pop(uid, None)  # from now on the driver asks each minute
        since = self._absent_since.setdefault(uid, now)
        if now - since < ORPHAN_AGE_S or await self._in_use(record):
            return
        log.warning("unpreparing a claim that the API server no longer has claim=%s", ref)
        try:
            await self._unprepare(uid)
        except DriverError as e:
            log.error("cannot unprepare a claim that was deleted; the driver tries again claim=%s: %s", ref, e)
