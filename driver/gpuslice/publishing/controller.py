"""What the node offers, kept up to date: probe the API server once, look at the node, plan the pools, hand them on.

One thread. It plans again when it is nudged and every half minute; the publisher writes only what differs. News is
gathered for a tenth of a second, so that eight claims at once cost one look at the node and none of them waits for it
(without that, looks and plans took two thirds of the driver's time under load: measured).

Before the first write it finds out by dry runs what the API server keeps: a device whose counters are dropped would be
given out twice, so without them the plan is static (Kubernetes 1.34 and 1.35), and nothing is sent before that is known.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import DeviceRef, PoolName
from gpuslice.core.pools import pool, shape
from gpuslice.core.pools.pool import Features, PoolSlices
from gpuslice.core.pools.reconcile import CONSUMABLE, PARTITIONABLE, TAINTS
from gpuslice.core.record import Record
from gpuslice.errors import ApiError, DriverError
from gpuslice.kube import Kube
from gpuslice.publishing.api_features import probe as probe
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.publisher import Publisher, Status
from gpuslice.system import files
from gpuslice.system.files import Version

log = logging.getLogger(__name__)

_PERIOD_S = 30.0
_RETRY_S = 2.0
_GATHER_S = 0.1


class Shapes:
    """The shapes that were last published, on disk: they outlive the kubelet's wipe and a new version of the driver.

    Two instances of a rolling update take turns, and each reads what the other has left: neither may forget a shape of
    which claims hold devices.
    """

    def __init__(self, path: Path, kube: Kube, driver: str, node: str) -> None:
        self._path, self._kube, self._driver, self._node = path, kube, driver, node
        self._kept: dict[PoolName, PoolSlices] = {}
        self._version: Version | None = None  # of the file that `_kept` is
        self._cordoned: set[PoolName] = set()
        self.only_taints_awaited = False  # a pool could change its shape as soon as its taints are in force

    def admit(
        self, wanted: Sequence[PoolSlices], records: Sequence[Record], *, taints: bool, published: bool
    ) -> tuple[PoolSlices, ...]:
        """What may be published now: each pool as wanted, or still its old shape, cordoned, while claims hold it.

        `published` says that what was admitted last is in force: only then do taints keep the scheduler away. Blocks
        on the API server while a change waits (ApiError where it does not answer).
        """
        with files.locked(self._path.with_suffix(".lock")):
            self._read()
            new = {p.name: p for p in wanted}
            waiting = [kept for name, kept in self._kept.items() if not (name in new and shape.allows(kept, new[name]))]
            self._cordoned &= {kept.name for kept in waiting}
            held = self._held(records) if waiting else set()
            admitted = dict(new)
            for kept in waiting:
                if kept.name in held or (taints and not (published and kept.name in self._cordoned)):
                    admitted[kept.name] = shape.cordoned(kept, self._driver) if taints else kept
                    if kept.name not in self._cordoned:
                        log.warning("pool keeps its old shape until its claims have left pool=%s", kept.name)
                    self._cordoned.add(kept.name)
                else:
                    self._cordoned.discard(kept.name)
            self.only_taints_awaited = bool(self._cordoned - held)
            self._keep({name: self._kept[name] if name in self._cordoned else p for name, p in admitted.items()})
            return tuple(admitted[name] for name in sorted(admitted))

    def _held(self, records: Sequence[Record]) -> set[PoolName]:
        ours = {grant.allocation.device.pool for record in records for grant in record.plan.grants}
        return ours | set(shape.pools_of(self._kube.claims(), self._driver))

    def _read(self) -> None:
        """Take in what the file says, if it is news; where it is lost or torn, the shapes that the API server has."""
        try:
            version = Version.of(self._path.stat())
            if version == self._version:
                return
            self._kept, self._version = shape.decode(json.loads(self._path.read_bytes())), version
        except (OSError, ValueError, LookupError, TypeError) as e:
            if not isinstance(e, FileNotFoundError):
                log.warning("%s cannot be read (%s); what is published counts instead", self._path, e)
            bodies, _ = self._kube.resource_slices(self._driver, self._node)
            self._kept = shape.published(bodies)
            self._write()

    def _keep(self, kept: dict[PoolName, PoolSlices]) -> None:
        same = kept.keys() == self._kept.keys() and all(shape.same(kept[name], self._kept[name]) for name in kept)
        self._kept = kept  # also where it is equal: the same objects compare at once the next time
        if not same:
            self._write()

    def _write(self) -> None:
        self._version = files.write_atomic(self._path, json.dumps(shape.encode(tuple(self._kept.values()))))


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
    ) -> None:
        """`on_taints_changed` is called, from a thread of the controller, when the devices' taints are others than before."""
        self._kube, self._driver, self._node = kube, driver, node
        self._on_taints_changed = on_taints_changed
        self._dynamic, self._static = dynamic, static
        self._health, self._checkpoint = health, checkpoint
        self._shapes = Shapes(folder / "shapes.json", kube, driver, node)
        self._publisher = Publisher(kube, driver, node, changed=self._changed)
        self._wake = threading.Condition()
        self._nudged, self._stopped = False, False
        self._problem = "nothing has been published yet; wait a moment"
        self._failed = ""  # why the last try to plan came to nothing
        self._planned_from: tuple[Features, Taints, frozenset[DeviceRef]] | None = None
        self._wanted: tuple[PoolSlices, ...] = ()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        self._publisher.start()
        self._thread.start()

    def stop(self) -> None:
        with self._wake:
            self._stopped = True
            self._wake.notify_all()
        self._publisher.stop()
        self._thread.join(1.0)  # it may be in a call to a hung GPU; it is a daemon and holds nothing

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

    def _changed(self, status: Status) -> None:
        self.nudge()

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        features = self._probed()
        while features is not None and not self._stopped:
            features = self._without_dropped(features)
            try:
                self._publisher.publish(self._planned(features))
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
        news = error != self._failed
        self._failed = error
        if news:
            log.warning("cannot plan what to publish, trying again: %s", error)

    def _probed(self) -> Features | None:
        while not self._stopped:
            try:
                features = probe(self._kube, self._driver, self._node)
            except ApiError as e:
                self._problem = str(e)
                log.warning("cannot ask the API server what it supports, trying again: %s", e)
                self._pause(_RETRY_S)
                continue
            log.info("API server %s: %s", self._kube.version(), features)
            return features
        return None

    def _planned(self, features: Features) -> tuple[PoolSlices, ...]:
        inventory = self._dynamic if features.partitionable else self._static
        taints = self._health.look(inventory)
        records = tuple(self._checkpoint.records().values())
        held = frozenset[DeviceRef](grant.allocation.device for record in records for grant in record.plan.grants)
        question = (features, taints, held & taints.keys())
        if question != self._planned_from:
            self._wanted = pool.resource_slices(inventory, taints, driver=self._driver, features=features, held=held)
            if self._planned_from is not None and self._planned_from[1] != taints:
                self._on_taints_changed()
            self._planned_from = question
        published = self._publisher.published.is_set()
        return self._shapes.admit(self._wanted, records, taints=features.taints, published=published)

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
