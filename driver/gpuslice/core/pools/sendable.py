"""The part of the wanted pools that may be sent, as the answers of the API server to earlier writes show."""

from __future__ import annotations

from gpuslice.core.json import Body, ReadOnlyBody
from gpuslice.core.model import PoolName
from gpuslice.core.pools import reconcile, validation
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Create, Update


class SendablePools:
    """No pool with a fault of ours, none whose counters the API server drops, and no field that it drops.

    A field that the server drops is never sent again: writer and server would change it for ever. Not for several threads
    at once: its owner locks.
    """

    def __init__(self) -> None:
        self._wanted: tuple[PoolSlices, ...] = ()
        self._faults: dict[PoolName, tuple[str, ...]] = {}
        self._refused: dict[PoolName, PoolSlices] = {}  # the server dropped their counters
        self._kept: dict[tuple[PoolName, int], tuple[ReadOnlyBody, ReadOnlyBody]] = {}  # sent → what the server kept

    def want(self, wanted: tuple[PoolSlices, ...]) -> None:
        """Take these pools as the wanted ones and check them. The same pools again cost nothing."""
        if self._wanted != wanted:
            self._wanted, self._faults = wanted, {pool.name: validation.problems(pool) for pool in wanted}

    def faults(self) -> tuple[str, ...]:
        return tuple(fault for found in self._faults.values() for fault in found)

    def pools(self) -> list[PoolSlices]:
        """The pools that may be sent, each slice as the server is known to keep it."""
        return [self._as_kept(pool) for pool in self._wanted if self._may_send(pool)]

    def writable(self, name: str) -> bool:
        """Whether slices of this pool may be changed or deleted: a wanted pool that may not be sent keeps what it has."""
        return all(self._may_send(pool) for pool in self._wanted if pool.name == name)

    def learn(self, change: Update | Create, returned: Body) -> frozenset[str]:
        """Learn from the answer to a write. Returns the gates whose fields the server dropped."""
        sent = change.body["spec"]
        lost = reconcile.dropped(sent, returned["spec"])
        if reconcile.PARTITIONABLE in lost:
            self._refused |= {pool.name: pool for pool in self._wanted if pool.name == change.pool}
        elif lost:
            self._kept[change.pool, change.index] = (sent, returned["spec"])
        return lost

    def _may_send(self, pool: PoolSlices) -> bool:
        return not self._faults[pool.name] and self._refused.get(pool.name) != pool

    def _as_kept(self, pool: PoolSlices) -> PoolSlices:
        specs = list(pool.specs)
        for index, spec in enumerate(specs):
            sent, kept = self._kept.get((pool.name, index), (None, {}))
            if sent is not None and reconcile.same(sent, spec):
                specs[index] = kept
        return PoolSlices(pool.name, tuple(specs))
