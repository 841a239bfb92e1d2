"""The rows of the table of `hack/bench`, in order. docs/performance.md explains them."""

from __future__ import annotations

from hack.lib.bench.table import Row


def _call_rows() -> list[Row]:
    limits = {"prepare": 10.0, "prepare_eight": 40.0}
    rows = []
    for eight, how in (("", "one by one"), ("_eight", "eight at once, eight GPUs")):
        for call, verb in (("prepare", "NodePrepareResources"), ("unprepare", "NodeUnprepareResources")):
            for kind, what in (("card", "whole card"), ("mig", "MIG partition")):
                for percentile in ("p50", "p99"):
                    limit = limits.get(call + eight) if percentile == "p50" else None
                    key = f"{call}_{kind}{eight}_{percentile}_ms"
                    rows.append(Row(key, f"{verb}, {what}, {how}, {percentile}", limit))
    for kind, what in (("card", "whole card"), ("mig", "MIG partition")):
        rows.append(Row(f"cpu_{kind}_ms", f"CPU time of the driver for a claim's way, {what}"))
    return rows


ROWS = [
    Row("start_s", "exec to all slices of 8 GPUs stored", 1.0),
    *_call_rows(),
    Row("mps_first_p50_ms", "NodePrepareResources, a card's first MPS share, its daemon's start included, p50", 500.0),
    Row("mps_first_p99_ms", "NodePrepareResources, a card's first MPS share, its daemon's start included, p99"),
    Row("mps_share_p50_ms", "NodePrepareResources, each further MPS share, p50", 15.0),
    Row("mps_share_p99_ms", "NodePrepareResources, each further MPS share, p99"),
    Row("mps_share_back_p50_ms", "NodeUnprepareResources, an MPS share that is not the last, p50"),
    Row("timeslice_share_p50_ms", "NodePrepareResources, each further time-slicing share, p50", 15.0),
    Row("timeslice_share_p99_ms", "NodePrepareResources, each further time-slicing share, p99"),
    Row("timeslice_share_back_p50_ms", "NodeUnprepareResources, a time-slicing share that is not the last, p50"),
    Row("mps_supervisor_mb", "resident memory of the MPS supervisor, eight daemons", 30.0),
    Row("mig_one_s", "one MIG creation, NVML taking its time"),
    Row("mig_eight_s", "eight MIG creations at once, eight GPUs, the same"),
    Row("mig_ratio", "eight MIG creations against one", 1.3),
    Row("rss_start_mb", "resident memory, 8 GPUs, at start"),
    Row("rss_100_mb", "resident memory after 100 claims"),
    Row("rss_end_mb", "resident memory after all claims", 75.0),
    Row("rss_peak_mb", "its peak"),
    Row("rss_growth_mb", "its growth since 100 claims", 1.0),
    Row("hang_get_info_ms", "slowest GetInfo while a prepare hangs in NVML", 1000.0),
    Row("hang_prepare_ms", "slowest prepare on another GPU, the same", 1000.0),
]


# ---------------------------------------------------------------- on a real Kubernetes

MODES = {"gpu": "whole card", "mig": "MIG 1g.10gb", "mps": "MPS share", "timeslice": "time-slicing share"}
_BESIDE = {"mps": " beside another", "timeslice": " beside another"}


def _ready_rows() -> list[Row]:
    rows = []
    for eight, how, limit in (("", "one by one", 0.35), ("_eight", "eight at once", 1.5)):
        rows += _ready(f"none{eight}", f"without a device, {how}", None)
        for key, what in MODES.items():
            rows += _ready(f"{key}{eight}", f"{what}{'' if eight else _BESIDE.get(key, '')}, {how}", limit)
    return [*rows, *_ready("mps_first", "a card's first MPS share, its daemon's start included, one by one", None)]


def _ready(key: str, what: str, limit: float | None) -> list[Row]:
    """`limit` applies to the median."""
    return [
        Row(f"ready_{key}_p50_s", f"pod, create to Ready, {what}, p50", limit),
        Row(f"ready_{key}_p95_s", f"pod, create to Ready, {what}, p95"),
    ]


def _kubelet_rows() -> list[Row]:
    rows = []
    for call, verb in (("prepare", "NodePrepareResources"), ("unprepare", "NodeUnprepareResources")):
        for key, what in MODES.items():
            for percentile in ("p50", "p95"):
                limit = 10.0 if (call, percentile) == ("prepare", "p50") else None
                text = f"kubelet's {verb}, {what}{_BESIDE.get(key, '')}, one by one, {percentile}"
                rows.append(Row(f"kubelet_{call}_{key}_{percentile}_ms", text, limit))
        if call == "prepare":
            rows.append(Row("kubelet_prepare_mps_first_p50_ms", f"kubelet's {verb}, a card's first MPS share, p50"))
        for key, what in MODES.items():
            daemons = ", daemons' start included" if (call, key) == ("prepare", "mps") else ""
            limit = 50.0 if call == "prepare" and not daemons else None
            rows.append(
                Row(f"kubelet_{call}_{key}_eight_ms", f"kubelet's {verb}, {what}, eight at once{daemons}, mean", limit)
            )
            text = f"the same inside the driver, {what}, eight at once, p95 out of its buckets"
            rows.append(Row(f"driver_{call}_{key}_eight_p95_ms", text))
    return rows


CLUSTER_ROWS = [
    *_ready_rows(),
    *_kubelet_rows(),
    Row("forced_p50_s", "successor of a force-deleted pod on its card, create to Ready, p50", 1.5),
    Row("forced_p95_s", "successor of a force-deleted pod on its card, create to Ready, p95"),
    Row("forced_prepare_p50_ms", "its NodePrepareResources, the wait for the predecessor included, p50"),
    Row("forced_prepare_p95_ms", "its NodePrepareResources, the wait for the predecessor included, p95"),
    Row("forced_failed_count", "prepares of such successors that failed at first", 0.0),
    Row("deaf_p50_s", "the same, where the predecessor ignores SIGTERM and is killed after 2 s, p50"),
    Row("deaf_prepare_p50_ms", "its NodePrepareResources, the wait for the predecessor included, p50"),
    Row("deaf_failed_count", "prepares of such successors that failed at first", 0.0),
    Row("graceful_p50_s", "successor of a pod deleted with grace, create to Ready, p50"),
    Row("graceful_p95_s", "successor of a pod deleted with grace, create to Ready, p95"),
    Row("graceful_prepare_p50_ms", "its NodePrepareResources, p50"),
    Row("graceful_failed_count", "prepares of such successors that failed at first", 0.0),
    Row("churn_rate", "churn, all modes, eight at once: pods come and gone"),
    Row("churn_ready_p50_s", "churn: create to Ready, p50"),
    Row("churn_ready_p95_s", "churn: create to Ready, p95"),
    Row("churn_failed_count", "churn: calls for prepare that failed, and claims refused by the driver", 0.0),
    Row("churn_kubelet_failed_count", "churn: prepares that the kubelet counts as failed, its own refusals included"),
    Row("churn_writes_count", "churn: API writes of the driver for a pod"),
    Row("churn_cpu_ms", "churn: CPU time of the driver for a pod"),
    Row("churn_supervisor_cpu_ms", "churn: CPU time of the MPS supervisor for a pod"),
    Row("churn_mb", "resident memory of the driver after the churn", 75.0),
    Row("churn_growth_mb", "its growth over the churn"),
    Row("churn_supervisor_mb", "resident memory of the MPS supervisor after the churn", 30.0),
    Row("rest_writes_count", "at rest: API writes of the driver in a minute", 0.0),
    Row("rest_cpu_ms", "at rest: CPU time of the driver in a minute"),
]


# ---------------------------------------------------------------- in pods

INSTALLED_ROWS = [
    Row("installed_start_p50_s", "pod bound to the node, until registered and all slices of 8 GPUs published, p50"),
    Row(
        "installed_start_p95_s", "pod bound to the node, until registered and all slices of 8 GPUs published, p95", 3.0
    ),
    Row("pod_driver_mb", "memory of the driver's container, as the kubelet counts it (working set)"),
    Row("pod_driver_anonymous_mb", "the pages of it that belong to no file"),
    Row("process_driver_mb", "resident memory of the same process outside of a pod"),
    Row("pod_driver_ratio", "driver in a pod against the process", 1.1),
    Row("pod_supervisor_mb", "memory of the supervisor's container, as the kubelet counts it (working set)"),
    Row("pod_supervisor_anonymous_mb", "the pages of it that belong to no file"),
    Row("process_supervisor_mb", "resident memory of the same process outside of a pod"),
    Row("pod_supervisor_ratio", "supervisor in a pod against the process", 1.1),
]
