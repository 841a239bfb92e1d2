"""The shapes of the published pools: a pool changes its shape only when no claim holds a device of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence, Set
from pathlib import Path

from gpuslice.core.model import PoolName
from gpuslice.core.pools import shape
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.record import Record
from gpuslice.kube import Kube
from gpuslice.publishing.holders import ClaimHolders
from gpuslice.system import files
from gpuslice.system.files import Version

log = logging.getLogger(__name__)


class Shapes:
    """The last published shapes, on disk. They survive the kubelet's deletion of slices and an update of the driver.

    Two instances of a rolling update take turns, and each one reads the file of the other. Neither may lose a shape while
    claims hold devices of it.
    """

    def __init__(self, path: Path, kube: Kube, driver: str, node: str) -> None:
        self._path, self._kube, self._driver, self._node = path, kube, driver, node
        self._holders = ClaimHolders(kube, driver)
        self._kept: dict[PoolName, PoolSlices] = {}
        self._version: Version | None = None  # version of the file from which `_kept` was read
        self._cordoned: set[PoolName] = set()
        self._tainted: set[PoolName] = set()  # cordoned pools that were admitted with taints
        self.only_taints_awaited = False  # a pool can change its shape as soon as its taints are in force

    def admit(
        self, wanted: Sequence[PoolSlices], records: Sequence[Record], *, taints: bool, published: bool
    ) -> tuple[PoolSlices, ...]:
        """The pools that may be published now: the wanted pool, or its old shape with taints while claims hold devices.

        `published`: the API has the last admitted pools. Only then do taints keep the scheduler away. If nothing else
        keeps a pool, the call asks the API server for the holders of the pool, and blocks. ApiError without an answer.
        """
        with files.locked(self._path.with_suffix(".lock")):
            self._read()
            new = {p.name: p for p in wanted}
            waiting = {
                name: kept for name, kept in self._kept.items() if not (name in new and shape.allows(kept, new[name]))
            }
            self._cordoned &= waiting.keys()
            ready = set(waiting) if not taints else self._tainted & waiting.keys() if published else set()
            held = self._held(waiting.keys(), ready, records, taints=taints)
            admitted = dict(new)
            for name in waiting.keys() - (ready - held):
                kept = waiting[name]
                admitted[name] = shape.cordoned(kept, self._driver) if taints else kept
                if name not in self._cordoned:
                    log.warning("a pool keeps its old shape until its claims are released pool=%s", name)
            self._cordoned = waiting.keys() - (ready - held)
            self._tainted = self._cordoned if taints else set()
            self.only_taints_awaited = bool(self._cordoned - held)
            self._keep({name: self._kept[name] if name in self._cordoned else p for name, p in admitted.items()})
            return tuple(admitted[name] for name in sorted(admitted))

    def _held(
        self, waiting: Set[PoolName], ready: Set[PoolName], records: Sequence[Record], *, taints: bool
    ) -> set[PoolName]:
        """The waiting pools of which claims hold a device.

        The call asks the API server only about pools that no record holds and that are `ready` to change otherwise.
        """
        ours = {grant.allocation.device.pool for record in records for grant in record.plan.grants}
        self._holders.keep(waiting)
        return (ours & waiting) | self._holders.held(ready - ours, cordoned=ready if taints else frozenset())

    def _read(self) -> None:
        """Read the file if it has changed. If the file is missing or damaged, take the shapes of the API server."""
        try:
            version = Version.of(self._path.stat())
            if version == self._version:
                return
            self._kept, self._version = shape.decode(json.loads(files.read_plain(self._path))), version
        except (OSError, ValueError, RecursionError) as e:
            if not isinstance(e, FileNotFoundError):
                log.warning(
                    "cannot read the shapes of the pools, so the published ones count path=%s: %s", self._path, e
                )
            bodies, _ = self._kube.resource_slices(self._driver, self._node)
            self._kept = shape.published(bodies)
            self._write()

    def _keep(self, kept: dict[PoolName, PoolSlices]) -> None:
        same = kept.keys() == self._kept.keys() and all(shape.same(kept[name], self._kept[name]) for name in kept)
        self._kept = kept  # also if it is equal, because identical objects compare fast the next time
        if not same:
            self._write()

    def _write(self) -> None:
        self._version = files.write_atomic(self._path, json.dumps(shape.encode(tuple(self._kept.values()))))
