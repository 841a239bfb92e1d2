"""The state of publishing, for readiness, metrics and logs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from gpuslice.core.pools.backoff import Repeats

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    error: str = ""  # why the API does not show what is wanted; it is tried again
    rejected: tuple[str, ...] = ()  # pools with faults of our own making: not sent, not tried again until they change
    dropped: frozenset[str] = frozenset()  # gates the API server turned out not to have: plan again without them


class StatusReporter:
    """The status as it is now. Each new one is passed on from the thread that reports it, and logged where it is news."""

    def __init__(self, changed: Callable[[Status], None]) -> None:
        self.status = Status()
        self._changed = changed
        self._repeats = Repeats()
        self._lock = threading.Lock()

    def report(
        self,
        *,
        error: str | None = None,
        rejected: tuple[str, ...] | None = None,
        dropped: frozenset[str] = frozenset(),
    ) -> None:
        """Replace the given parts; gates that were dropped stay dropped."""
        with self._lock:
            old = self.status
            new = Status(
                error=old.error if error is None else error,
                rejected=old.rejected if rejected is None else rejected,
                dropped=old.dropped | dropped,
            )
            self.status = new
            news = bool(new.error) and self._repeats.is_news(new.error, time.monotonic())
        if news:
            log.warning("cannot publish ResourceSlices; the driver tries again: %s", new.error)
        if new == old:
            return
        for fault in new.rejected:
            if fault not in old.rejected:
                log.error("did not publish a pool, because it has a fault: %s", fault)
        self._changed(new)
