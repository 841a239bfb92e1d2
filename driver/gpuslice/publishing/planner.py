"""Decides what to publish now: looks at the node, plans its pools, and delays changes while claims hold devices."""

from __future__ import annotations

from collections.abc import Callable

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import DeviceRef
from gpuslice.core.pools import pool
from gpuslice.core.pools.pool import Features, PoolSlices
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.shapes import Shapes


class PoolPlanner:
    """Plans again only if the features, the taints or the held devices have changed. For one thread."""

    def __init__(
        self,
        *,
        driver: str,
        dynamic: Inventory,
        static: Inventory,
        health: NodeHealth,
        checkpoint: Checkpoint,
        shapes: Shapes,
        on_taints_changed: Callable[[], object],
    ) -> None:
        self._driver = driver
        self._dynamic, self._static = dynamic, static
        self._health, self._checkpoint, self._shapes = health, checkpoint, shapes
        self._on_taints_changed = on_taints_changed
        self._planned_from: tuple[Features, Taints, frozenset[DeviceRef]] | None = None
        self._wanted: tuple[PoolSlices, ...] = ()
        self.inventory = dynamic  # the last plan

    def plan(self, features: Features, *, published: bool) -> tuple[PoolSlices, ...]:
        """The pools. `published`: the API has the pools of the last plan. DriverError if there can be no plan."""
        inventory = self.inventory = self._dynamic if features.partitionable else self._static
        taints = self._health.look(inventory)
        records = tuple(self._checkpoint.records().values())
        held = frozenset[DeviceRef](grant.allocation.device for record in records for grant in record.plan.grants)
        facts = (features, taints, held & taints.keys())
        if facts != self._planned_from:
            self._wanted = pool.resource_slices(inventory, taints, driver=self._driver, features=features, held=held)
            if self._planned_from is not None and self._planned_from[1] != taints:
                self._on_taints_changed()
            self._planned_from = facts
        return self._shapes.admit(self._wanted, records, taints=features.taints, published=published)
