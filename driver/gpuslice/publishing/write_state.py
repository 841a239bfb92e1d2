"""The state that watcher and writer share: the wanted pools, our slices in the API, and the time of the next comparison."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from gpuslice.core.json import Body
from gpuslice.core.pools.backoff import BackoffConfig, Debounce
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Owner
from gpuslice.core.pools.slice_cache import SliceCache, Unseen


class WriteState:
    """Every method takes the lock and may be called from any thread. `published`: the API has exactly the wanted pools."""

    def __init__(self, backoff: BackoffConfig) -> None:
        self.published, self.stopped = threading.Event(), threading.Event()
        self._lock = threading.Condition()  # guards the fields below
        self._cache = SliceCache()
        self._listed = False
        self._wanted: tuple[PoolSlices, ...] | None = None
        self._owner: Owner | None = None
        self._due: float | None = None  # the time of the writer's next look
        self._writing = False
        self._debounce = Debounce(backoff)

    def want(self, desired: Sequence[PoolSlices]) -> None:
        """Set the wanted pools."""
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
        """Let the writer look after this delay, or earlier if an earlier look is planned."""
        with self._lock:
            self._wake(delay_s)

    def _wake(self, delay_s: float) -> None:
        due = time.monotonic() + delay_s
        self._due = due if self._due is None else min(self._due, due)
        self._lock.notify_all()

    # ------------------------------------------------------------ the watcher

    def begin_list(self) -> int:
        """Call it before the request for a list."""
        with self._lock:
            return self._cache.began()

    def take_list(self, bodies: Sequence[Body], began: int) -> None:
        with self._lock:
            self._cache.replace(bodies, began)
            self._owner = None  # the Node may have been replaced by a Node of the same name
            self._listed = True
            self._wake(0.0)

    def unseen(self) -> frozenset[Unseen]:
        """Our own changes that a watch which begins now will show."""
        with self._lock:
            return self._cache.unseen()

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
            # Not `_wake`: when many slices are deleted, each further deletion delays the answer.
            self._due = self._debounce.due(time.monotonic())
            self._lock.notify_all()

    # ------------------------------------------------------------ the writer

    def next_look(self) -> tuple[PoolSlices, ...] | None:
        """Wait for the next comparison. Returns the wanted pools, or None if the writer has to stop."""
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
        """The owner. None if the UID of the Node has to be read again."""
        with self._lock:
            return self._owner

    def start_writing(self, owner: Owner) -> list[Body]:
        """Our slices in the API. Foreign changes get an answer only after the end of the writing."""
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
        """Record that writing failed unexpectedly, so its result is unknown."""
        with self._lock:
            self._writing = False

    def end_writing(self, wanted: tuple[PoolSlices, ...], *, wrote: bool, complete: bool) -> None:
        """`complete`: everything for `wanted` was written. Then it is published, if there was no change in the meantime."""
        with self._lock:
            self._writing = False
            self._debounce.record_answer(time.monotonic(), wrote=wrote)
            self._answer_foreign()
            if complete and self._due is None and self._wanted == wanted:
                self.published.set()
