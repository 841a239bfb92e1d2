"""Pods on a real Kubernetes: the time until each mode is ready, the waits of the kubelet, and the wait of a successor."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hack.lib.bench.exposition import Exposition
from hack.lib.bench.onkube import CARDS, MeasuredCluster
from hack.lib.bench.stage import CARD_0, IGNORES, STAYS, WITHOUT, ClusterStage, Extent, name_of
from hack.lib.bench.subject import BenchError
from hack.lib.bench.table import Figures

SHARES = ("mps", "timeslice")
CALLS = ("prepare", "unprepare")
_SETTLED_S = 1.0


def spread(name: str, values: Sequence[float], unit: str = "s") -> Figures:
    """p50 and p95 of seconds; in milliseconds if `unit` is "ms"."""
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    factor = 1e3 if unit == "ms" else 1.0
    return {f"{name}_p50_{unit}": cuts[49] * factor, f"{name}_p95_{unit}": cuts[94] * factor}


def pods(stage: ClusterStage, extent: Extent) -> Figures:
    """Each mode one by one, with shares on a card that has another share; then eight at once on a free node."""
    _one(stage, WITHOUT)  # not counted, like the other first pods below: it opens connections and fills the page cache
    figures = spread("ready_none", [_one(stage, WITHOUT) for _ in range(extent.pods)])
    figures |= spread("ready_none_eight", _waves(stage, WITHOUT, extent.waves))
    for mode in stage.modes:
        _one(stage, mode)
        if mode == "mps":
            first = _one_by_one(stage, mode, max(2, extent.pods // 3))
            figures |= {key.replace("_mps_", "_mps_first_"): value for key, value in first.items()}
        stays = stage.pod(mode) if mode in SHARES else None
        if stays:
            stage.run(stays)
        figures |= _one_by_one(stage, mode, extent.pods)
        if stays:
            stage.end(stays)
        figures |= _eight_at_once(stage, mode, extent.waves)
    return figures


def _one(stage: ClusterStage, mode: str) -> float:
    pod = stage.pod(mode)
    seconds = stage.run(pod)
    stage.end(pod)
    return seconds


def _one_by_one(stage: ClusterStage, mode: str, count: int) -> Figures:
    """Between two pods the sums of the kubelet grow by exactly one call each, so they give the time of each call."""
    took, calls = [], dict[str, list[float]](prepare=[], unprepare=[])
    before = stage.kube.kubelet()
    for _ in range(count):
        took.append(_one(stage, mode))
        after = stage.kube.kubelet()
        for call in CALLS:
            calls[call].append(_mean(before, after, call))
        before = after
    figures = spread(f"ready_{mode}", took)
    for call in CALLS:
        figures |= spread(f"kubelet_{call}_{mode}", calls[call], "ms")
    return figures


def _eight_at_once(stage: ClusterStage, mode: str, waves: int) -> Figures:
    """The kubelet's buckets begin at 100 ms, so for calls at the same time only the mean is exact. The driver has finer
    ones."""
    stage.clear()
    kubelet, driver = stage.kube.kubelet(), stage.kube.driver()
    figures = spread(f"ready_{mode}_eight", _waves(stage, mode, waves))
    kubelet_after, driver_after = stage.kube.kubelet(), stage.kube.driver()
    for call in CALLS:
        figures[f"kubelet_{call}_{mode}_eight_ms"] = _mean(kubelet, kubelet_after, call) * 1e3
        inside = [
            exposition.histogram("gpuslice_request_duration_seconds", operation=call)
            for exposition in (driver, driver_after)
        ]
        figures[f"driver_{call}_{mode}_eight_p95_ms"] = inside[1].since(inside[0]).quantile(0.95) * 1e3
    return figures


def _waves(stage: ClusterStage, mode: str, waves: int) -> list[float]:
    """Create to Ready of each pod; eight pods are created at the same moment."""
    took, cards = [], set()
    for _ in range(waves):
        stage.clear()
        eight = [stage.pod(mode) for _ in range(CARDS)]
        took += stage.kube.eight(stage.run, eight)
        cards.add(stage.kube.cards())
        stage.kube.eight(stage.end, eight)
    if mode != WITHOUT:
        stage.notes[mode] = f"eight at once, {mode}: on {' or '.join(map(str, sorted(cards)))} card(s)"
    return took


def _mean(before: Exposition, after: Exposition, call: str) -> float:
    """Seconds of a driver's call, as the kubelet measured it."""
    method = {"prepare": "*/NodePrepareResources", "unprepare": "*/NodeUnprepareResources"}[call]
    earlier, later = (
        exposition.histogram("dra_grpc_operations_duration_seconds", driver_name="gpuslice.dev", method_name=method)
        for exposition in (before, after)
    )
    try:
        return later.since(earlier).mean()
    except ValueError as e:
        raise BenchError(f"the kubelet has not called {method[2:]} for a pod that came and went; see its log") from e


def successors(stage: ClusterStage, extent: Extent) -> Figures:
    """A pod wants the card of a pod that is being deleted. By force: the object of the old pod is gone at once, its
    container ends later or is killed after two seconds. With grace: the object goes after the kubelet has unprepared
    the claims of the pod."""
    figures: Figures = {}
    for key, force, command in (("forced", True, STAYS), ("deaf", True, IGNORES), ("graceful", False, STAYS)):
        before = failures(stage.kube)
        took = [_time_successor(stage, force, command) for _ in range(extent.successors)]
        figures |= spread(key, [ready for ready, _ in took]) | spread(
            f"{key}_prepare", [call for _, call in took], "ms"
        )
        figures[f"{key}_failed_count"] = failures(stage.kube) - before
    return figures


def _time_successor(stage: ClusterStage, force: bool, command: list[str]) -> tuple[float, float]:
    """Seconds from create to Ready of the second pod, and of its NodePrepareResources. `command`: of the first pod."""
    first, second = (stage.pod("gpu", CARD_0) for _ in range(2))
    first["spec"]["containers"][0]["command"] = command
    stage.run(first)
    # Process 1 of a container ignores a signal without a trap, and the kubelet kills it two seconds later.
    stage.kube.elapse(_SETTLED_S)
    before = stage.kube.kubelet()
    stage.kube.delete(name_of(first), force=force)
    seconds = stage.run(second)
    prepared = _mean(before, stage.kube.kubelet(), "prepare")
    stage.end(second)
    stage.clear()
    return seconds, prepared


def failures(kube: MeasuredCluster) -> float:
    """Failed prepares so far: whole calls as the kubelet counts them, and claims that the driver refused."""
    calls, name = kube.kubelet(), "dra_grpc_operations_duration_seconds_count"
    every, good = (calls.total(name, method_name="*/NodePrepareResources", grpc_status_code=c) for c in ("*", "OK"))
    return every - good + kube.driver().total("gpuslice_requests_total", operation="prepare", result="error")
