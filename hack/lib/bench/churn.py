"""Pods of all modes that come and go, eight at a time, and a node at rest: the cost for the node and the API server."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass

from hack.lib.bench.machine import cpu_s
from hack.lib.bench.measures import resident_mb
from hack.lib.bench.onkube import MeasuredCluster
from hack.lib.bench.pods import failures, spread
from hack.lib.bench.stage import ClusterStage, Extent
from hack.lib.bench.table import Figures

_SETTLED_S = 3.0  # by then, everything after the last pod is written


@dataclass(frozen=True, slots=True)
class _Counts:
    """Counters that only grow."""

    failed: float
    kubelet_failed: float
    writes: float
    cpu_s: float
    supervisor_cpu_s: float

    @classmethod
    def of(cls, kube: MeasuredCluster) -> _Counts:
        name, labels = "dra_operations_duration_seconds_count", {"operation_name": "PrepareResources"}
        error = "false" if kube.version.startswith("v1.35.") else "true"  # in 1.35 the label has the opposite meaning
        return cls(
            failures(kube),
            kube.kubelet().total(name, is_error=error, **labels),
            kube.slice_writes(),
            cpu_s(kube.pid("driver")),
            cpu_s(kube.pid("mps-supervisor")),
        )


def churn(stage: ClusterStage, extent: Extent) -> Figures:
    """Eight threads. Each one starts a pod, waits until it is ready, deletes it, waits until it is gone, and takes the
    next."""
    kube = stage.kube
    stage.clear()
    before, memory, began = _Counts.of(kube), resident_mb(kube.pid("driver")), time.perf_counter()
    modes = itertools.islice(itertools.cycle(stage.modes), extent.churn)
    took = kube.eight(lambda pod: _come_and_go(stage, pod), [stage.pod(mode) for mode in modes])
    seconds = time.perf_counter() - began
    stage.clear()
    after, resident = _Counts.of(kube), resident_mb(kube.pid("driver"))
    return spread("churn_ready", took) | {
        "churn_rate": extent.churn / seconds,
        "churn_failed_count": after.failed - before.failed,
        "churn_kubelet_failed_count": after.kubelet_failed - before.kubelet_failed,
        "churn_writes_count": (after.writes - before.writes) / extent.churn,
        "churn_cpu_ms": (after.cpu_s - before.cpu_s) / extent.churn * 1e3,
        "churn_supervisor_cpu_ms": (after.supervisor_cpu_s - before.supervisor_cpu_s) / extent.churn * 1e3,
        "churn_mb": resident,
        "churn_growth_mb": resident - memory,
        "churn_supervisor_mb": resident_mb(kube.pid("mps-supervisor")),
    }


def _come_and_go(stage: ClusterStage, pod: dict[str, object]) -> float:
    seconds = stage.run(pod)
    stage.end(pod)
    return seconds


def rest(stage: ClusterStage, extent: Extent) -> Figures:
    """Nothing happens: no pod and no claim comes or goes."""
    stage.clear()
    stage.kube.elapse(_SETTLED_S)
    before = _Counts.of(stage.kube)
    stage.kube.elapse(extent.rest_s)
    after = _Counts.of(stage.kube)
    minutes = extent.rest_s / 60.0
    return {
        "rest_writes_count": (after.writes - before.writes) / minutes,
        "rest_cpu_ms": (after.cpu_s - before.cpu_s) / minutes * 1e3,
    }
