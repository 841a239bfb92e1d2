"""Keeps the node's offer up to date: probe the API server, look at the node, plan the pools, pass them on.

The controller has one thread. It plans again after each nudge and every half minute. The publisher writes only
differences. The controller collects nudges for a tenth of a second. So eight simultaneous claims cost one look at the node,
and no claim waits for it. Without this, looks and plans took two thirds of the driver's time under load (measured).

Before the first write, dry runs show which fields the API server keeps. If the server drops counters, the scheduler would
allocate devices twice, so the plan is then static (Kubernetes 1.34 and 1.35). Nothing is sent before this is known. After
an upgrade of the cluster or a change of a gate, the plan follows within about a minute (`api_features`).

A pod may wait for the first slices of a new node. It starts as soon as they are there, and fails once if the kubelet does not
know the driver yet. The kubelet looks for new drivers once a second. So the first slices wait for it, but not long.

If the API server is away or busy, or forbids something, the driver waits, because the problem can end while the driver
runs. A refused token, an untrusted certificate and a server without resource.k8s.io/v1 stay until the process starts again,
or for hours. Then the process ends with the reason. It continues while claims are prepared, because unprepare needs no API
server.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.inventory import Inventory
from gpuslice.core.pools.backoff import DEFAULT_BACKOFF, Backoff, BackoffConfig, Hopelessness, Repeats
from gpuslice.core.pools.pool import Features
from gpuslice.core.pools.reconcile import CONSUMABLE, PARTITIONABLE, TAINTS
from gpuslice.errors import ApiError, DriverError, LastingApiError
from gpuslice.kube import Kube
from gpuslice.publishing.api_features import ApiFeatures
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.planner import PoolPlanner
from gpuslice.publishing.publisher import Publisher
from gpuslice.publishing.shapes import Shapes
from gpuslice.system import refusals
from gpuslice.system.threads import ThreadWatch

log = logging.getLogger(__name__)

_PERIOD_S = 30.0
_RETRY_S = 2.0
_GATHER_S = 0.1
_END = "waiting does not change that and no claim is prepared on this node, so the process ends"


class SliceController:
    def __init__(
        self,
        *,
        kube: Kube,
        driver: str,
        node: str,
        dynamic: Inventory,
        static: Inventory,
        health: NodeHealth,
        checkpoint: Checkpoint,
        folder: Path,
        on_taints_changed: Callable[[], object] = lambda: None,
        backoff: BackoffConfig = DEFAULT_BACKOFF,
        threads: ThreadWatch | None = None,
        kubelet_s: float = 0.0,
    ) -> None:
        """The controller calls `on_taints_changed` from one of its threads when the taints of the devices have changed.

        `kubelet_s`: the longest time that the first slices wait for a registration by the kubelet.

        `refused` fails with a LastingApiError if all answers of the API server were lasting errors and no claim needs
        the driver.
        """
        self._kube, self._driver, self._node = kube, driver, node
        self._checkpoint = checkpoint
        self._shapes = Shapes(folder / "shapes.json", kube, driver, node)
        self._planner = PoolPlanner(
            driver=driver,
            dynamic=dynamic,
            static=static,
            health=health,
            checkpoint=checkpoint,
            shapes=self._shapes,
            on_taints_changed=on_taints_changed,
        )
        self._backoff = backoff
        self._api_features = ApiFeatures(kube, driver, node, backoff)
        self._threads = threads or ThreadWatch()
        self._publisher = Publisher(
            kube, driver, node, backoff=backoff, changed=lambda _: self.nudge(), threads=self._threads
        )
        self.refused: Future[None] = Future()
        self.refused.set_running_or_notify_cancel()  # so that a waiter that leaves cannot cancel it
        self._wake = threading.Condition()
        self._nudged, self._stopped = False, False
        self._kubelet_s, self._registered = kubelet_s, False
        self._problem = "nothing has been published yet; wait a moment"
        self._repeats = Repeats()
        self._failed = ""  # the reason why the last try to plan failed

    def start(self) -> None:
        self._threads.start("controller", self._run)

    def stop(self) -> None:
        self._threads.stopping()
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        self._publisher.stop()

    def nudge(self) -> None:
        """Plan again now, because something on the node has changed."""
        with self._wake:
            self._nudged = True
            self._wake.notify_all()

    def catch_up(self) -> None:
        """Call it when a kubelet has registered, because its start deletes the slices of the node. Returns at once."""
        with self._wake:
            self._registered = True
            self._wake.notify_all()
        self._publisher.catch_up()

    @property
    def inventory(self) -> Inventory:
        """The present offer of the node."""
        return self._planner.inventory

    def problem(self) -> str | None:
        """The reason why the API server does not have the node's offer, or None if it has the offer."""
        if self._failed:
            return self._failed
        return None if self._publisher.published.is_set() else self._publisher.status.error or self._problem

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        features = self._probe()
        with self._wake:  # `stop` comes before this, or the thread is started
            self._wake.wait_for(lambda: self._stopped or self._registered, self._kubelet_s)
            if features is not None and not self._stopped:
                self._publisher.start()
        retry = Backoff(self._backoff)
        while features is not None and not self._stopped:
            features = self._look_again(features)
            try:
                kept = self._without_dropped(features)
                pools = self._planner.plan(kept, published=self._publisher.published.is_set())
                self._failed, retry = "", Backoff(self._backoff)
                self._publisher.publish(pools)
            except DriverError as e:
                self._fail(str(e))
            except OSError as e:
                self._fail(str(refusals.untranslated(e)))
            except Exception as e:
                log.exception("planning the ResourceSlices of this node failed unexpectedly")
                self._fail(f"planning failed unexpectedly: {e!r}; see the traceback in the log")
            if self._shapes.only_taints_awaited and not self._publisher.published.is_set():
                self._publisher.published.wait(_RETRY_S)
            elif self._failed:
                self._pause(retry.delay_s(random.random()))  # noqa: S311 - not a secret
            else:
                period_s = min(_PERIOD_S, max(_GATHER_S, self._api_features.due_s(time.monotonic())))
                self._pause(_RETRY_S if self._shapes.only_taints_awaited else period_s)

    def _fail(self, error: str) -> None:
        self._failed = error
        if self._repeats.is_news(error, time.monotonic()):
            log.warning("cannot plan the ResourceSlices of this node; the driver tries again: %s", error)

    def _probe(self) -> Features | None:
        """The features of the API server. None if the controller has to stop, or if `refused` has an error."""
        retry, hopelessness = Backoff(self._backoff), Hopelessness(self._backoff)
        while not self._stopped:
            try:
                return self._api_features.first(time.monotonic(), random.random())  # noqa: S311 - not a secret
            except ApiError as e:
                self._problem, lasting = str(e), isinstance(e, LastingApiError)
            except Exception as e:  # no real answer; if the thread died, nothing would be published any more
                log.debug("the API server's answer is not understood", exc_info=True)
                self._problem, lasting = f"the API server gave an answer that is not understood ({e!r})", False
            if self._repeats.is_news(self._problem, time.monotonic()):
                log.warning("cannot find out what the API server supports; the driver tries again: %s", self._problem)
            now = time.monotonic()
            if hopelessness.reached(now, lasting=lasting) and not self._serves_claims():
                self._threads.stopping()  # this thread ends for the reason in `refused`
                self.refused.set_exception(LastingApiError(f"{self._problem}; {_END}"))
                return None
            delay_s = hopelessness.shorten(retry.delay_s(random.random()), now)  # noqa: S311 - not a secret
            with self._wake:  # a nudge reports a change of the node, not of the API server
                self._wake.wait_for(lambda: self._stopped, delay_s)
        return None

    def _look_again(self, features: Features) -> Features:
        """The present features of the API server. Without an answer, the former ones: the publisher reports the failure."""
        dropped = bool(self._publisher.status.dropped)
        try:
            found = self._api_features.look(time.monotonic(), random.random(), dropped=dropped)  # noqa: S311 - no secret
        except Exception:  # an answer that is not understood says nothing about the features
            log.debug("cannot find out whether the API server keeps other fields now", exc_info=True)
            return features
        if found is None:
            return features
        self._publisher.forget_dropped()
        return found

    def _serves_claims(self) -> bool:
        """Whether there are claims to unprepare. Unprepare needs no API server."""
        return bool(self._checkpoint.records() or self._checkpoint.broken())

    def _without_dropped(self, features: Features) -> Features:
        """The features of the probe, without those that the server has dropped since (a downgraded API server)."""
        dropped = self._publisher.status.dropped
        return Features(
            partitionable=features.partitionable and PARTITIONABLE not in dropped,
            consumable=features.consumable and CONSUMABLE not in dropped,
            taints=features.taints and TAINTS not in dropped,
        )

    def _pause(self, seconds: float) -> None:
        with self._wake:
            if self._wake.wait_for(lambda: self._nudged or self._stopped, seconds):
                self._wake.wait_for(lambda: self._stopped, _GATHER_S)
            self._nudged = False
