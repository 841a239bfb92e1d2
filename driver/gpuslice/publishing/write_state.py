"""What watcher and writer share: the wanted pools, our slices as the API has them, and when to compare the two next."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from gpuslice.core.json import Body
from gpuslice.core.pools.backoff import BackoffConfig, Debounce
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Owner
from gpuslice.core.pools.slice_cache import SliceCache


class WriteState:
    """Every method takes the lock and may be called from any thread. `published`: the API shows exactly what is wanted."""

    def __init__(self, backoff: BackoffConfig) -> None:
        self.published, self.stopped = threading.Event(), threading.Event()
        self._lock = threading.Condition()  # guards what follows
        self._cache = SliceCache()
        self._listed = False
        self._wanted: tuple[PoolSlices, ...] | None = None
        self._owner: Owner | None = None
        self._due: float | None = None  # when the writer is to look
        self._writing = False
        self._debounce = Debounce(backoff)

    def want(self, desired: Sequence[PoolSlices]) -> None:
        """Want exactly these pools from now on."""
        with self._lock:
            if self._wanted != tuple(desired):
                self._wanted = tuple(desired)
                self.published.clear()
                self._wake(0.0)

    def stop(self) -> None:
        with self._lock:
            self.stopped.set()
            self._lock.notify_all()

    def look_in(self, delay_s: float) -> None:
        """Have the writer look after this delay, or earlier if that is planned already."""
        with self._lock:
            self._wake(delay_s)

    def _wake(self, delay_s: float) -> None:
        due = time.monotonic() + delay_s
        self._due = due if self._due is None else min(self._due, due)
        self._lock.notify_all()

    # ------------------------------------------------------------ the watcher

    def take_list(self, bodies: Sequence[Body], version: str) -> None:
        with self._lock:
            self._cache.replace(bodies, version)
            self._owner = None  # the Node may be another one of the same name by now
            self._listed = True
            self._wake(0.0)

    def take_event(self, kind: str, body: Body) -> None:
        with self._lock:
            self._cache.observe(kind, body)
            if kind == "DELETED":
                self._owner = None
            if not self._writing:
                self._answer_foreign()

    def _answer_foreign(self) -> None:
        if self._cache.foreign():
            self.published.clear()
            # Not `_wake`: each further change of a wipe puts the answer off.
            self._due = self._debounce.due(time.monotonic())
            self._lock.notify_all()

    # ------------------------------------------------------------ the writer

    def next_look(self) -> tuple[PoolSlices, ...] | None:
        """Wait until there is something to compare: the wanted pools, or None when we are to stop."""
        with self._lock:
            while not self.stopped.is_set():
                now = time.monotonic()
                due = self._due if self._listed and self._wanted is not None else None
                if due is not None and due <= now:
                    self._due = None
                    return self._wanted
                self._lock.wait(None if due is None else due - now)
        return None

    def owner(self) -> Owner | None:
        """None where the UID of the Node has to be asked again."""
        with self._lock:
            return self._owner

    def start_writing(self, owner: Owner) -> list[Body]:
        """Our slices as the API has them. Foreign changes are answered only when the writing has ended."""
        with self._lock:
            self._owner = owner
            self._writing = True
            return self._cache.bodies()

    def take_written(self, body: Body) -> None:
        with self._lock:
            self._cache.mutate(body)

    def take_removed(self, body: Body) -> None:
        with self._lock:
            self._cache.remove(body)

    def abort_writing(self) -> None:
        """Writing failed unexpectedly, so nothing is known of its result."""
        with self._lock:
            self._writing = False

    def end_writing(self, wanted: tuple[PoolSlices, ...], *, wrote: bool, complete: bool) -> None:
        """`complete`: all that `wanted` needs was written; so it is published, if nothing new has come meanwhile."""
        with self._lock:
            self._writing = False
            self._debounce.record_answer(time.monotonic(), wrote=wrote)
            self._answer_foreign()
            if complete and self._due is None and self._wanted == wanted:
                self.published.set()
