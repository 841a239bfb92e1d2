"""Finds the features of the API server before the first write."""

from __future__ import annotations

from gpuslice.core.json import Body
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.pool import Features
from gpuslice.errors import ApiError
from gpuslice.kube import Kube


def probe(kube: Kube, driver: str, node: str) -> Features:
    """The fields of a ResourceSlice that the API server keeps. Found by creates with dryRun=All, which store nothing.

    Call it before the first write, because the scheduler allocates a partition without counters twice. ApiError if there
    is no answer, or an answer that does not show which fields are kept.
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
        # policy, which does not depend on gates.
        if e.status in (400, 422) and any(field in str(e) for field in reconcile.PROBED):
            return False
        raise
    return not reconcile.dropped(body["spec"], returned["spec"])
