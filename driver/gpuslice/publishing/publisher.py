"""Writes the wanted ResourceSlices to the API, and writes them again when others delete or change them.

There are two threads. The *watcher* lists and watches our slices into a `SliceCache`. The *writer* compares the cache with
the wanted pools (`core.pools.reconcile`) and writes the difference. No failure is final: if the API server refuses a write
or does not answer, the writer tries again, with growing delays. Prepare and unprepare are not affected.

All nodes of a cluster lose their watches at the same time when an API server goes away. Each node then watches again from
the version that it knows, which costs little. The delays grow up to a minute. A node lists only if that version is too old,
as after a restart of the API server, or if versions have gone back. It then lists at a random time within a minute. It lists
at once if an event of its own needs a list: a conflict, or a kubelet that registers while there is no watch, or shortly
before.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence

from gpuslice.api import Watch
from gpuslice.core.pools.backoff import CALM_S, DEFAULT_BACKOFF, Backoff, BackoffConfig, around
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.errors import ApiError, ConflictError, ExpiredError
from gpuslice.kube import Kube
from gpuslice.publishing.status import Status, StatusReporter
from gpuslice.publishing.write_state import WriteState
from gpuslice.publishing.writer import SliceWriter
from gpuslice.system.threads import ThreadWatch

log = logging.getLogger(__name__)

_FRUITLESS = 3


class Publisher:
    """Keeps the ResourceSlices of a driver on a node equal to the pools of the last `publish`.

    `published` is set while the API has exactly these pools. `changed` is called with each new `Status`, from a thread
    of the publisher; it must not block. Nothing is written before the first `publish`.
    """

    def __init__(
        self,
        kube: Kube,
        driver: str,
        node: str,
        *,
        backoff: BackoffConfig = DEFAULT_BACKOFF,
        changed: Callable[[Status], None] = lambda _: None,
        threads: ThreadWatch | None = None,
    ) -> None:
        self._kube, self._driver, self._node = kube, driver, node
        self._backoff = backoff
        self._state = WriteState(backoff)
        self.published = self._state.published
        self._reporter = StatusReporter(changed)
        self._writer = SliceWriter(kube, driver, node, self._state, self._reporter)
        self._watch: Watch | None = None
        self._version = ""  # the start of the next watch; "" if a list is needed
        self._fruitless = 0  # watches in a row that broke without an event
        self._list_at = 0.0  # when the next list is due
        self._kubelet_until = 0.0  # a kubelet has registered, and may delete slices until then
        self._hurry = threading.Event()  # ends a pause of the watcher
        self._threads = threads or ThreadWatch()

    # ------------------------------------------------------------ for the caller

    @property
    def status(self) -> Status:
        return self._reporter.status

    def start(self) -> None:
        self._threads.start("publisher-watching", self._keep_watching)
        self._threads.start("publisher-writing", self._keep_writing)

    def stop(self) -> None:
        """End both threads. The published slices stay, because a restart must not take the node's devices away."""
        self._threads.stopping()
        self._state.stop()
        self._hurry.set()
        watch = self._watch
        if watch is not None:
            watch.close()
        self._threads.join(2.0)  # one may be in a hung call, which holds nothing

    def publish(self, desired: Sequence[PoolSlices]) -> None:
        """Set the wanted pools. Returns at once."""
        self._state.want(desired)

    def catch_up(self) -> None:
        """List at once if no watch shows changes of our slices, or if the present watch ends within a minute and cannot go
        on. Returns at once.

        Call it when a kubelet has registered, because its start deletes the slices of the node.
        """
        self._kubelet_until = time.monotonic() + CALM_S
        if self._watch is None:
            self._list_at = 0.0
            self._hurry.set()

    def forget_dropped(self) -> None:
        """Send the dropped fields again, because the API server keeps other fields now."""
        self._writer.forget_dropped()
        self._reporter.forget_dropped()
        self._state.look_in(0.0)

    # ------------------------------------------------------------ the watcher

    def _keep_watching(self) -> None:
        stopped, retry = self._state.stopped, Backoff(self._backoff)
        while not stopped.is_set():
            self._hurry.clear()
            began, pause_s = time.monotonic(), 0.0
            try:
                if anew := not self._version or began >= self._list_at:
                    self._list()
                self._follow(resumed=not anew)
                retry = Backoff(self._backoff)
            except ExpiredError as e:
                log.info("the driver lists the ResourceSlices of this node again: %s", e)
                pause_s = self._forget()
            except Exception as e:  # noqa: BLE001 - if the thread died, the driver would never notice a change again
                if time.monotonic() - began > CALM_S:
                    retry = Backoff(self._backoff)
                self._report_break(e)
                # If watches from this version bring nothing of use, the next watch brings the same.
                stuck = self._fruitless >= _FRUITLESS
                pause_s = self._forget() if stuck else retry.delay_s(random.random())  # noqa: S311 - not a secret
            if not stopped.is_set():
                self._hurry.wait(pause_s)

    def _forget(self) -> float:
        """Go on with a list. Returns the delay before it."""
        self._version, self._fruitless = "", 0
        if time.monotonic() < self._kubelet_until:
            self._kubelet_until = 0.0  # one such list for each registration
            return 0.0
        return random.random() * self._backoff.spread_s  # noqa: S311 - not a secret

    def _report_break(self, error: Exception) -> None:
        if isinstance(error, ApiError):
            self._reporter.report(error=str(error))
        else:
            log.error("the watch of ResourceSlices failed unexpectedly; the driver starts it again", exc_info=error)
            self._version = ""  # the same events would fail again

    def _list(self) -> None:
        began = self._state.begin_list()
        bodies, version = self._kube.resource_slices(self._driver, self._node)
        self._state.take_list(bodies, began)
        self._version = version
        self._list_at = time.monotonic() + around(self._backoff.relist_s, random.random())  # noqa: S311 - not a secret

    def _follow(self, *, resumed: bool) -> None:
        """Watch until a new list is due. ApiError: the watch broke. ExpiredError: only a list helps.

        `resumed`: the watch goes on from a version before the break. After the restore of an etcd, the API server may not
        have reached this version yet. Until then it sends nothing. So the first watch is short. If it brings no event and
        no bookmark, a list is due. The same if a watch that was as long as it should be did not show our own writes.
        """
        stopped = self._state.stopped
        most_s = min(self._backoff.watch_s, self._backoff.spread_s) if resumed else self._backoff.watch_s
        while not stopped.is_set() and (left_s := self._list_at - time.monotonic()) > 0:
            began, unseen = time.monotonic(), self._state.unseen()
            timeout_s = max(1, int(min(most_s * (1 + random.random()) / 2, left_s)))  # noqa: S311 - not a secret
            heard = self._follow_one(timeout_s, resumed=resumed)
            if stopped.is_set():
                return
            if time.monotonic() - began < timeout_s / 2:
                raise ApiError(
                    f"the API server at {self._kube.server} ended a watch too early; check the API server and the "
                    "proxies before it"
                )
            self._fruitless = 0
            if (resumed and not heard) or unseen & self._state.unseen():
                self._list_at = 0.0
            most_s, resumed = self._backoff.watch_s, False

    def _follow_one(self, timeout_s: int, *, resumed: bool) -> bool:
        """One watch. True if it brought an event or a bookmark."""
        version, heard = self._version, False
        watch = self._kube.watch_resource_slices(self._driver, self._node, version, timeout_s)
        # In this order, because `stop` sets the event first and then closes the watch that it finds here.
        self._watch = watch
        self._fruitless += 1
        try:
            if self._state.stopped.is_set():
                watch.close()
            if resumed:
                self._state.look_in(0.0)  # a write that failed meanwhile may succeed now
            for event in watch:
                now, heard = event["object"]["metadata"]["resourceVersion"], True
                if int(now) < int(version):
                    raise ExpiredError(f"resource versions went back from {version} to {now}, as after a restored etcd")
                self._version, self._fruitless = now, 0
                version = now
                if event["type"] != "BOOKMARK":
                    self._state.take_event(event["type"], event["object"])
        finally:
            self._watch = None
        return heard

    # ------------------------------------------------------------ the writer

    def _keep_writing(self) -> None:
        stale, retry = False, Backoff(self._backoff)
        while (wanted := self._state.next_look()) is not None:
            try:
                if stale:  # a conflict shows that the watch lags or is dead
                    self._list()
                    stale = False
                    self._hurry.set()  # a watcher that pauses can watch from this list
                self._writer.sync(wanted)
                retry = Backoff(self._backoff)
            except ApiError as e:
                stale = stale or isinstance(e, ConflictError)
                self._fail(str(e), retry)
            except Exception as e:
                log.exception("writing ResourceSlices failed unexpectedly; the driver tries again")
                self._fail(f"writing failed unexpectedly: {e!r}; see the traceback in the log", retry)

    def _fail(self, error: str, retry: Backoff) -> None:
        self._reporter.report(error=error)
        self._state.look_in(retry.delay_s(random.random()))  # noqa: S311 - not a secret
