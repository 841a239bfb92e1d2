"""The part of the wanted pools that the driver may send. It depends on the API server's answers to earlier writes."""

from __future__ import annotations

from gpuslice.core.json import Body, ReadOnlyBody
from gpuslice.core.model import PoolName
from gpuslice.core.pools import reconcile, validation
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Create, Update


class SendablePools:
    """Leaves out pools with a fault of ours, pools whose counters the API server drops, and fields that it drops.

    The driver sends a dropped field again only after a probe shows that the server keeps it. Otherwise writer and server
    would change it for ever. Not thread-safe: the owner locks.
    """

    def __init__(self) -> None:
        self._wanted: tuple[PoolSlices, ...] = ()
        self._faults: dict[PoolName, tuple[str, ...]] = {}
        self._refused: dict[PoolName, PoolSlices] = {}  # pools whose counters the server dropped
        self._kept: dict[tuple[PoolName, int], tuple[ReadOnlyBody, ReadOnlyBody]] = {}  # sent → kept by the server

    def want(self, wanted: tuple[PoolSlices, ...]) -> None:
        """Set the wanted pools and check them. A second call with the same pools costs nothing."""
        if self._wanted != wanted:
            self._wanted, self._faults = wanted, {pool.name: validation.problems(pool) for pool in wanted}

    def faults(self) -> tuple[str, ...]:
        return tuple(fault for found in self._faults.values() for fault in found)

    def pools(self) -> list[PoolSlices]:
        """The pools that may be sent. Each slice has only fields that the server keeps, as far as this is known."""
        return [self._as_kept(pool) for pool in self._wanted if self._may_send(pool)]

    def writable(self, name: str) -> bool:
        """Whether slices of this pool may be changed or deleted. A wanted pool that may not be sent keeps its slices."""
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

    def forget_dropped(self) -> None:
        """Forget the dropped fields, because the server keeps other fields now."""
        self._refused.clear()
        self._kept.clear()

    def _may_send(self, pool: PoolSlices) -> bool:
        return not self._faults[pool.name] and self._refused.get(pool.name) != pool

    def _as_kept(self, pool: PoolSlices) -> PoolSlices:
        specs = list(pool.specs)
        for index, spec in enumerate(specs):
            sent, kept = self._kept.get((pool.name, index), (None, {}))
            if sent is not None and reconcile.same(sent, spec):
                specs[index] = kept
        return PoolSlices(pool.name, tuple(specs))
