"""One look at the whole node for what cannot be had now: lost or hung GPUs, foreign partitions, a MIG mode that is stuck."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from driver.checkpoint import Checkpoint
from driver.core import health
from driver.core.health import Taints
from driver.core.inventory import Inventory
from driver.core.model import GpuUuid, LiveGpu, Taint
from driver.errors import DeviceError
from driver.nvml.api import Nvml

log = logging.getLogger(__name__)


class Surveyor:
    def __init__(
        self,
        *,
        nvml: Nvml,
        checkpoint: Checkpoint,
        hung: Callable[[], Mapping[GpuUuid, str]],
    ) -> None:
        self._nvml = nvml
        self._checkpoint = checkpoint
        self._hung = hung
        self._told: Taints = {}

    def look(self, inventory: Inventory) -> Taints:
        """Taints of all devices, with news of them logged. Blocks; a hung GPU is not asked."""
        hung = self._hung()
        unwell = {gpu: Taint("gpu", "hung", reason=text) for gpu, text in hung.items()}
        # Records before and after the look: a partition of ours has its record before it is made and until it is gone.
        records = self._checkpoint.records()
        live: dict[GpuUuid, LiveGpu] = {}
        for pool in inventory.pools:
            uuid = pool.gpu.uuid
            if uuid in unwell:
                continue
            try:
                live[uuid] = self._nvml.look(uuid)
            except DeviceError as e:
                unwell[uuid] = Taint("gpu", "lost", reason=str(e))
        records |= self._checkpoint.records()
        taints = health.taints(inventory, live, unwell, records.values())
        self._tell(taints)
        return taints

    def _tell(self, taints: Taints) -> None:
        def reasons(of: Taints) -> set[str]:
            return {taint.reason for here in of.values() for taint in here}

        for reason in sorted(reasons(taints) - reasons(self._told)):
            log.warning("tainted: %s", reason)
        for reason in sorted(reasons(self._told) - reasons(taints)):
            log.info("taint is over: %s", reason)
        self._told = taints
