"""Writes the wanted ResourceSlices to the API, and writes them again when others delete or change them.

There are two threads. The *watcher* lists and watches our slices into a `SliceCache`. The *writer* compares the cache with
the wanted pools (`core.pools.reconcile`) and writes the difference. No failure is final: if the API server refuses a write
or does not answer, the writer tries again, with growing delays. Prepare and unprepare are not affected.

Others write, too. When the kubelet starts, it deletes all slices of its node in the background, perhaps after the driver
has published again. The driver answers each foreign change after a quiet time. If another foreign change follows an answer
within a minute, the quiet time doubles. So two instances of different versions do not write against each other for ever.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

from gpuslice.core.pools.backoff import CALM_S, DEFAULT_BACKOFF, Backoff, BackoffConfig
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.errors import ApiError, ConflictError, ExpiredError
from gpuslice.kube import Kube, Watch
from gpuslice.publishing.status import Status, StatusReporter
from gpuslice.publishing.write_state import WriteState
from gpuslice.publishing.writer import SliceWriter
from gpuslice.system.threads import ThreadWatch

log = logging.getLogger(__name__)


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
        watch = self._watch
        if watch is not None:
            watch.close()
        self._threads.join(2.0)  # one may be in a hung call, which holds nothing

    def publish(self, desired: Sequence[PoolSlices]) -> None:
        """Set the wanted pools. Returns at once."""
        self._state.want(desired)

    def forget_dropped(self) -> None:
        """Send fields again that the API server dropped, because it keeps them now."""
        self._writer.forget_dropped()
        self._reporter.forget_dropped()
        self._state.look_in(0.0)

    # ------------------------------------------------------------ the watcher

    def _keep_watching(self) -> None:
        stopped, retry = self._state.stopped, Backoff(self._backoff)
        while not stopped.is_set():
            began = time.monotonic()
            try:
                self._follow(self._list())
            except ExpiredError:
                pass
            except ApiError as e:
                self._reporter.report(error=str(e))
            except Exception:  # if the thread died, the driver would never notice a change again
                log.exception("the watch of ResourceSlices failed unexpectedly; the driver starts it again")
            lasted_s = time.monotonic() - began
            if lasted_s > CALM_S:
                retry = Backoff(self._backoff)
            if lasted_s < self._backoff.relist_s:  # otherwise a new list is due anyway
                stopped.wait(retry.delay_s(random.random()))  # noqa: S311 - not a secret

    def _list(self) -> str:
        began = self._state.begin_list()
        bodies, version = self._kube.resource_slices(self._driver, self._node)
        self._state.take_list(bodies, began)
        return version

    def _follow(self, version: str) -> None:
        """Watch until a new list is due. ApiError: the watch broke. ExpiredError: its resource version is too old."""
        stopped, end = self._state.stopped, time.monotonic() + self._backoff.relist_s
        while not stopped.is_set() and (left_s := end - time.monotonic()) > 0:
            began = time.monotonic()
            timeout_s = max(1, int(min(self._backoff.watch_s, left_s)))
            watch = self._kube.watch_resource_slices(self._driver, self._node, version, timeout_s)
            # In this order, because `stop` sets the event first and then closes the watch that it finds here.
            self._watch = watch
            if stopped.is_set():
                watch.close()
            for event in watch:
                now = event["object"]["metadata"]["resourceVersion"]
                if int(now) < int(version):
                    raise ExpiredError(f"resource versions went back from {version} to {now}, as after a restored etcd")
                version = now
                if event["type"] != "BOOKMARK":
                    self._state.take_event(event["type"], event["object"])
            if time.monotonic() - began < timeout_s / 2 and not stopped.is_set():
                raise ApiError(
                    f"the API server at {self._kube.server} ended a watch too early; check the API server and the "
                    "proxies before it"
                )

    # ------------------------------------------------------------ the writer

    def _keep_writing(self) -> None:
        stale, retry = False, Backoff(self._backoff)
        while (wanted := self._state.next_look()) is not None:
            try:
                if stale:  # a conflict shows that the watch lags or is dead
                    self._list()
                    stale = False
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
