"""What the node offers, kept up to date: probe the API server once, look at the node, plan the pools, hand them on.

One thread. It plans again when it is nudged and every half minute; the publisher writes only what differs. Nudges are
gathered for a tenth of a second, so that eight claims at once cost one look at the node and none of them waits for it
(without that, looks and plans took two thirds of the driver's time under load: measured).

Before the first write it finds out by dry runs what the API server keeps: a device whose counters are dropped would be
given out twice, so without them the plan is static (Kubernetes 1.34 and 1.35), and nothing is sent before that is known.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.inventory import Inventory
from gpuslice.core.pools.pool import Features
from gpuslice.core.pools.reconcile import CONSUMABLE, PARTITIONABLE, TAINTS
from gpuslice.errors import ApiError, DriverError
from gpuslice.kube import Kube
from gpuslice.publishing.api_features import probe
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.planner import PoolPlanner
from gpuslice.publishing.publisher import Publisher
from gpuslice.publishing.shapes import Shapes
from gpuslice.system.threads import ThreadWatch

log = logging.getLogger(__name__)

_PERIOD_S = 30.0
_RETRY_S = 2.0
_GATHER_S = 0.1


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
        threads: ThreadWatch | None = None,
    ) -> None:
        """`on_taints_changed` is called, from a thread of the controller, when the devices' taints are others than before."""
        self._kube, self._driver, self._node = kube, driver, node
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
        self._threads = threads or ThreadWatch()
        self._publisher = Publisher(kube, driver, node, changed=lambda _: self.nudge(), threads=self._threads)
        self._wake = threading.Condition()
        self._nudged, self._stopped = False, False
        self._problem = "nothing has been published yet; wait a moment"
        self._failed = ""  # why the last try to plan came to nothing

    def start(self) -> None:
        self._publisher.start()
        self._threads.start("controller", self._run)

    def stop(self) -> None:
        self._threads.stopping()
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        self._publisher.stop()

    def nudge(self) -> None:
        """Something changed on the node: plan again now."""
        with self._wake:
            self._nudged = True
            self._wake.notify_all()

    def problem(self) -> str | None:
        """Why the API does not show what this node offers, or None when it does."""
        if self._failed:
            return self._failed
        return None if self._publisher.published.is_set() else self._publisher.status.error or self._problem

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        features = self._probe()
        while features is not None and not self._stopped:
            features = self._without_dropped(features)
            try:
                self._publisher.publish(self._planner.plan(features, published=self._publisher.published.is_set()))
                self._failed = ""
            except DriverError as e:
                self._fail(str(e))
            except Exception as e:
                log.exception("planning failed unexpectedly")
                self._fail(f"unexpected: {e!r}")
            if self._shapes.only_taints_awaited and not self._publisher.published.is_set():
                self._publisher.published.wait(_RETRY_S)
            else:
                self._pause(_RETRY_S if self._failed or self._shapes.only_taints_awaited else _PERIOD_S)

    def _fail(self, error: str) -> None:
        is_new = error != self._failed
        self._failed = error
        if is_new:
            log.warning("cannot plan what to publish, trying again: %s", error)

    def _probe(self) -> Features | None:
        while not self._stopped:
            try:
                features = probe(self._kube, self._driver, self._node)
                log.info("API server %s: %s", self._kube.version(), features)
                return features
            except ApiError as e:
                self._problem = str(e)
                log.warning("cannot ask the API server what it supports, trying again: %s", e)
            except Exception as e:  # an answer that nobody thought of; a thread that died would be silence for ever
                self._problem = f"unexpected: {e!r}"
                log.exception("asking the API server what it supports failed unexpectedly; trying again")
            self._pause(_RETRY_S)
        return None

    def _without_dropped(self, features: Features) -> Features:
        """What the probe promised, less what the server was seen to drop since (an API server that was downgraded)."""
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
