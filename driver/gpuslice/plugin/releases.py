"""Notifications of removed records, for claims that wait for the holders of their devices."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Iterator, Sequence

from gpuslice.core.model import ClaimUid
from gpuslice.errors import DriverError


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
