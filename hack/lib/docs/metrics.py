"""Every metric of the driver, read from a registry that is filled like the driver's own."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

from gpuslice.checkpoint import Checkpoint
from gpuslice.core.share import MODES
from gpuslice.mps.client import MpsClient
from gpuslice.plugin import gauges
from gpuslice.telemetry import Telemetry
from prometheus_client import Metric

from hack.lib.docs.text import code, codes, paired, table


class MetricText(NamedTuple):
    unit: str
    meaning: str


METRICS = {
    "gpuslice_published": MetricText(
        "0 or 1", "1 while the ResourceSlices in the API show what the node offers; `/readyz` says why not"
    ),
    "gpuslice_prepared_claims": MetricText("claims", "claims with a record on this node"),
    "gpuslice_prepared_devices": MetricText("devices", "devices that these claims hold, by kind of device"),
    "gpuslice_hung_gpus": MetricText("cards", "cards with an NVML call that has not returned for 15 s"),
    "gpuslice_mps_daemons_unwell": MetricText(
        "daemons", "MPS daemons with a problem; -1 while no MPS supervisor answers"
    ),
    "gpuslice_requests_total": MetricText("claims", "claims in finished requests of the kubelet, by outcome"),
    "gpuslice_request_duration_seconds": MetricText("seconds", "time for one claim, including the wait for its cards"),
    "gpuslice_requests_inflight": MetricText("claims", "claims in unfinished requests of the kubelet"),
}

LABELS = {
    "operation": ("prepare", "unprepare"),
    "result": ("ok", "error"),
    "type": MODES,
}


@cache
def families() -> tuple[Metric, ...]:
    """The metrics without `_created`, which the client library adds with the time of its first count."""
    telemetry, nowhere = Telemetry(), Path("/nonexistent")
    gauges.register(telemetry, Checkpoint(nowhere, "boot"), MpsClient(nowhere), hung=tuple, problem=lambda: None)
    with telemetry.request("prepare"):
        pass  # a metric has its labels only after it has counted something
    return tuple(telemetry.registry.collect())


def name_of(family: Metric) -> str:
    """The name on /metrics."""
    return f"{family.name}_total" if family.type == "counter" else family.name


def metrics() -> str:
    found = {name_of(family): family for family in families()}
    rows = []
    for name, word in paired("metrics", [name for name in METRICS if name in found] + sorted(found), METRICS):
        rows.append([code(name), found[name].type, codes(_labels(found[name])), word.unit, word.meaning])
    return table(["metric", "type", "labels", "unit", "meaning"], rows)


def labels() -> str:
    found = sorted({label for family in families() for label in _labels(family)})
    return table(["label", "values"], ([code(name), codes(values)] for name, values in paired("labels", found, LABELS)))


def _labels(family: Metric) -> list[str]:
    """The labels without `le`, which every histogram has."""
    return sorted({label for sample in family.samples for label in sample.labels} - {"le"})
