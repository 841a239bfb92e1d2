"""Asks the API server about claims: the claim of a prepare, and whether a claim with a record still has its devices."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import Executor
from enum import Enum, auto
from typing import Protocol, TypeVar

from gpuslice.core import claims
from gpuslice.core.model import Claim, ClaimRef, ClaimUid
from gpuslice.core.record import Record
from gpuslice.errors import ClaimError, NotFoundError

T = TypeVar("T")

_REMEMBERED_S = 600.0  # as long as a record waits for its collection


class Hold(Enum):
    """What the API says about a claim that has a record here."""

    HELD = auto()  # the claim still has the devices
    LEAVING = auto()  # it no longer has them, and an unprepare comes: a force-deleted pod may still run
    RELEASED = auto()  # it no longer has them, and perhaps no unprepare comes


class ClaimReader(Protocol):
    """The only call of this package to the API server. It blocks."""

    def claim(self, namespace: str, name: str) -> dict[str, object]: ...


class ApiClaims:
    """The claims in the API server. Each question raises ApiError if it gets no answer."""

    def __init__(self, api: ClaimReader, driver: str, executor: Executor) -> None:
        self._api, self._driver, self._executor = api, driver, executor
        self._unprepared: dict[ClaimUid, float] = {}  # the time of the kubelet's unprepare

    def fetch(self, ref: ClaimRef) -> Claim:
        """The claim as it is now. ClaimError if it does not exist or cannot be prepared. It blocks."""
        try:
            body = self._api.claim(ref.namespace, ref.name)
        except NotFoundError:
            raise ClaimError(
                f"claim {ref} does not exist in the API server, so its pod cannot start; delete the pod"
            ) from None
        return claims.parse(body, ref, self._driver)

    async def hold(self, record: Record) -> Hold:
        """Whether the API server still gives the record's devices to its claim."""
        ref = record.plan.ref
        try:
            body = await self.run(lambda: self._api.claim(ref.namespace, ref.name))
        except NotFoundError:
            return Hold.RELEASED if ref.uid in self._unprepared else Hold.LEAVING
        devices = [grant.allocation.device for grant in record.plan.grants]
        if claims.is_held(body, ref.uid, devices, self._driver):
            return Hold.HELD
        return Hold.RELEASED if claims.is_released(body, ref.uid) else Hold.LEAVING

    def note_unprepared(self, uid: ClaimUid, now: float) -> None:
        """Note that the kubelet has unprepared this claim. No unprepare follows a prepare that comes only now."""
        self._unprepared = {u: at for u, at in self._unprepared.items() if now - at < _REMEMBERED_S} | {uid: now}

    async def run(self, call: Callable[[], T]) -> T:
        """Run a call to the API server with this task's context (`run_in_executor` alone drops the `op=` id).

        These calls have their own threads: a silent API server keeps threads for many seconds, and reads on the node must not
        wait for them.
        """
        context = contextvars.copy_context()
        return await asyncio.get_running_loop().run_in_executor(self._executor, context.run, call)
