"""What the API server can do, found out before the first write."""

from __future__ import annotations

import logging
import random
import threading

from driver.core import reconcile
from driver.core.pace import DEFAULT_PACE, Pace, Retry
from driver.core.pool import Features
from driver.errors import ApiError
from driver.kube import Body, Kube

log = logging.getLogger(__name__)


def features(kube: Kube, driver: str, node: str) -> Features:
    """What the API server keeps of a ResourceSlice, found out by creates with dryRun=All; nothing is stored.

    Before the first write, for a partition published without its counters is given out twice. ApiError: no answer, or
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


def await_features(
    kube: Kube, driver: str, node: str, stopped: threading.Event, pace: Pace = DEFAULT_PACE
) -> Features | None:
    """`features`, tried until the API server answers; None when `stopped` was set before."""
    retry = Retry(pace)
    while not stopped.is_set():
        try:
            return features(kube, driver, node)
        except ApiError as e:
            log.warning("the features of the API server are not known yet: %s", e)
            stopped.wait(retry.delay_s(random.random()))  # noqa: S311 - not a secret
    return None
