"""Finds the features of the API server: before the first write, and again when they may have changed.

A cluster may be upgraded while the driver runs, and a feature gate may be turned on or off. During such a change API servers
of different versions may answer in turn. So one answer changes nothing: the driver takes other features only after two equal
answers, some seconds apart. It asks less often while one server drops a field that another server keeps.
"""

from __future__ import annotations

import logging

from gpuslice.core.json import Body
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.backoff import BackoffConfig
from gpuslice.core.pools.pool import Features
from gpuslice.errors import ApiError
from gpuslice.kube import Kube

log = logging.getLogger(__name__)

_ALL = Features(partitionable=True, consumable=True, taints=True)


class ApiFeatures:
    """The features of the API server, as two probes found them. For one thread.

    A look costs one GET of the version. It costs dry runs only if the version has changed, or if a feature is missing
    that the server may have by now. Looks for missing features become rarer, from `version_s` to `missing_most_s`.
    """

    def __init__(self, kube: Kube, driver: str, node: str, config: BackoffConfig) -> None:
        self._kube, self._driver, self._node, self._config = kube, driver, node, config
        self._features: Features | None = None
        self._version = ""  # the version of the server at the last probe
        self._seen = ""  # the version at the last look
        self._doubted: Features | None = None  # found once, not confirmed yet
        self._look_at = 0.0
        self._missing_at, self._missing_s = 0.0, config.version_s

    def first(self, now: float, chance: float) -> Features:
        """Probe. ApiError as in `probe`. `chance`: a random number from 0 to 1, which spreads the looks of a fleet."""
        features = probe(self._kube, self._driver, self._node)
        self._take(features, self._kube.version(), now, chance)
        return features

    def look(self, now: float, chance: float, *, dropped: bool) -> Features | None:
        """The features to plan with from now on. None if the former features are still right, or if no look is due.

        `dropped`: since the last probe the server has dropped fields that it kept in the probe. ApiError as in `probe`.
        """
        if now < self._look_at:
            return None
        self._look_at = now + self._config.version_s * (1 + chance) / 2
        version = self._kube.version()
        if version != self._seen:
            self._seen, self._missing_s = version, self._config.version_s
        missing = (dropped or self._features != _ALL) and now >= self._missing_at
        if version == self._version and not missing and self._doubted is None:
            return None
        features = probe(self._kube, self._driver, self._node)
        if features == self._features and not dropped:
            self._take(features, version, now, chance)
            return None
        if features != self._doubted:
            self._doubted, self._look_at = features, now + self._config.confirm_s
            return None
        self._take(features, version, now, chance)
        return features

    def due_s(self, now: float) -> float:
        """The time until the next look."""
        return max(0.0, self._look_at - now)

    def _take(self, features: Features, version: str, now: float, chance: float) -> None:
        self._features, self._version, self._doubted = features, version, None
        self._seen = self._seen or version
        self._look_at = now + self._config.version_s * (1 + chance) / 2
        self._missing_at = now + self._missing_s * (1 + chance) / 2
        self._missing_s = min(2 * self._missing_s, self._config.missing_most_s)
        log.info(
            "found out which fields of ResourceSlices the API server keeps version=%s partitionable=%s consumable=%s "
            "taints=%s",
            version,
            features.partitionable,
            features.consumable,
            features.taints,
        )


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
