"""The state of publishing, for readiness, metrics and logs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpuslice.core.pools.backoff import Repeats

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    error: str = ""  # the reason why the API does not have the wanted pools; the publisher tries again
    rejected: tuple[str, ...] = ()  # pools with faults of our own making: not sent, not tried again until they change
    dropped: frozenset[str] = frozenset()  # gates that the API server does not have: plan again without them


class StatusReporter:
    """The present status. Passes each new status on, in the thread that reports it, and logs it if it is new."""

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
        """Replace the given parts. Dropped gates stay dropped until `forget_dropped`."""
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

    def forget_dropped(self) -> None:
        """Forget the dropped gates, because the API server keeps other fields now."""
        with self._lock:
            self.status = replace(self.status, dropped=frozenset())
