"""What the API server can do, found out before the first write."""

from __future__ import annotations

from gpuslice.core.json import Body
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.pool import Features
from gpuslice.errors import ApiError
from gpuslice.kube import Kube


def probe(kube: Kube, driver: str, node: str) -> Features:
    """What the API server keeps of a ResourceSlice, found out by creates with dryRun=All; nothing is stored.

    Before the first write, because a partition published without its counters is given out twice. ApiError: no answer, or
    one that says nothing about the fields.
    """
    kept = {
        gate: all(_keeps(kube, reconcile.probe(driver, node, content)) for content in contents)
        for gate, contents in reconcile.probes(driver).items()
    }
    return Features(
        partitionable=kept[reconcile.PARTITIONABLE],
        consumable=kept[reconcile.CONSUMABLE],
        taints=kept[reconcile.TAINTS],
    )


def _keeps(kube: Kube, body: Body) -> bool:
    try:
        returned = kube.create_resource_slice(body, dry_run=True)
    except ApiError as e:
        # A newer kind of gate refuses its fields instead of dropping them. A 422 may also come from an admission
        # policy, which says nothing of them.
        if e.status in (400, 422) and any(field in str(e) for field in reconcile.PROBED):
            return False
        raise
    return not reconcile.dropped(body["spec"], returned["spec"])
