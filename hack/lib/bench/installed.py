"""The driver in pods, from our image and our chart: its start on a node without slices, and its memory."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from hack.lib.api import SLICES, ApiServer
from hack.lib.bench import onkube
from hack.lib.bench.machine import MachineLoad, namespace_cpu_s
from hack.lib.bench.measures import resident_mb
from hack.lib.bench.onkube import CARDS, MeasuredCluster
from hack.lib.bench.rows import INSTALLED_ROWS
from hack.lib.bench.subject import BenchError, here
from hack.lib.bench.table import Figures, Report, figures
from hack.lib.cluster.installed import NAMESPACE

_DAEMONSET = f"/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/gpuslice"
_PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"
_OWN = f"{_PODS}?labelSelector=app.kubernetes.io%2Fname%3Dgpuslice"
_LABEL = "gpuslice.dev/measured"
_TIMEOUT_S = 60.0
_REGISTERED = re.compile(r"^(\S+) INFO .*registered with the kubelet", re.MULTILINE)
_CONTAINERS = {"driver": "driver", "mps-supervisor": "supervisor"}


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    starts: int
    rest_s: float  # before the memory is read


FULL, QUICK = Extent(10, 30.0), Extent(3, 5.0)


def run(options: argparse.Namespace) -> Report:
    """Measure an installed driver, and then the same processes outside of pods. BenchError if a measurement fails."""
    extent = QUICK if options.quick else FULL
    machine, subject = MachineLoad(), here()
    print("starting a Kubernetes with the driver in pods", file=sys.stderr)
    with onkube.cluster(options.cluster_version, "--install") as kube:
        found = _memory_in_pods(kube, extent) | _starts(kube, extent)
        machine.exclude(namespace_cpu_s(kube.pid("kubelet")))
        version = kube.version
    print("starting a Kubernetes with the driver as processes", file=sys.stderr)
    with onkube.cluster(options.cluster_version) as kube:
        kube.elapse(extent.rest_s)
        found |= {f"process_{name}_mb": resident_mb(kube.pid(part)) for part, name in _CONTAINERS.items()}
        machine.exclude(namespace_cpu_s(kube.pid("kubelet")))
    for name in _CONTAINERS.values():
        found[f"pod_{name}_ratio"] = found[f"pod_{name}_mb"] / found[f"process_{name}_mb"]
    return Report(
        what=f"driver in pods on Kubernetes {version}, {CARDS} simulated cards",
        machine=machine.facts(),
        size=dataclasses.asdict(extent),
        extent=f"{extent.starts} starts; memory after {extent.rest_s:.0f} s of rest",
        notes=[],
        figures=figures(INSTALLED_ROWS, {subject.name: [found]}),
    )


def _memory_in_pods(kube: MeasuredCluster, extent: Extent) -> Figures:
    """The memory of both containers as the kubelet counts it: megabytes of their working sets and of their pages without a
    file."""
    kube.elapse(extent.rest_s)
    summary = json.loads(kube.of_kubelet("/stats/summary"))
    found: Figures = {}
    for pod in summary["pods"]:
        for container in pod["containers"]:
            if pod["podRef"]["namespace"] == NAMESPACE and container["name"] in _CONTAINERS:
                name, memory = _CONTAINERS[container["name"]], container["memory"]
                found[f"pod_{name}_mb"] = memory["workingSetBytes"] / 1e6
                found[f"pod_{name}_anonymous_mb"] = memory["rssBytes"] / 1e6
    if len(found) != 2 * len(_CONTAINERS):
        raise BenchError(f"the kubelet counts no memory of {', '.join(_CONTAINERS)}; see its /stats/summary")
    return found


def _starts(kube: MeasuredCluster, extent: Extent) -> Figures:
    """Seconds from the pod's binding to its node until the kubelet has registered the driver and the API server has all
    slices."""
    took = []
    for number in range(extent.starts):
        print(f"start {number + 1} of {extent.starts}", file=sys.stderr)
        took.append(_start(kube.api))
    cuts = statistics.quantiles(took, n=100, method="inclusive")
    return {"installed_start_p50_s": cuts[49], "installed_start_p95_s": cuts[94]}


def _start(server: ApiServer) -> float:
    _choose(server, "away")
    server.wait_gone(_OWN, _TIMEOUT_S)
    server.clear(SLICES)
    pods, slices = (server.ask("GET", path)["metadata"]["resourceVersion"] for path in (_OWN, SLICES))
    _choose(server, None)
    name, bound_s = _until(server, _OWN, pods, _bound)
    _, published_s = _until(server, SLICES, slices, _Pools().complete)
    _until(server, _OWN, pods, _ready)
    log = server.text(f"{_PODS}/{name}/log")
    registered = _REGISTERED.search(log)
    if registered is None:
        raise BenchError(f"pod {name} is ready, but it was not registered with the kubelet; its log: {log[-600:]}")
    registered_s = datetime.fromisoformat(registered[1]).replace(tzinfo=UTC).timestamp()
    return max(published_s, registered_s) - bound_s


def _choose(server: ApiServer, value: str | None) -> None:
    """Let the DaemonSet have its pod on no node ("away"), or on the node again (None)."""
    server.merge([(_DAEMONSET, {"spec": {"template": {"spec": {"nodeSelector": {_LABEL: value}}}}})])


def _until(
    server: ApiServer, path: str, version: str, wanted: Callable[[Mapping[str, Any]], bool]
) -> tuple[str, float]:
    """The name of the first object with the wanted state, and the moment when the watch delivered it (time.time)."""
    for event in (watch := server.watch(path, version, _TIMEOUT_S)):
        moment = time.time()
        if event["type"] != "DELETED" and wanted(event["object"]):
            watch.close()
            return event["object"]["metadata"]["name"], moment
    raise BenchError(f"{path} did not come to the wanted state within {_TIMEOUT_S:.0f} s")


def _bound(pod: Mapping[str, Any]) -> bool:
    return bool(pod["spec"].get("nodeName"))


def _ready(pod: Mapping[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


class _Pools:
    """The pools of the node as their slices arrive."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {}  # names of slices, by pool
        self._complete: set[str] = set()

    def complete(self, body: Mapping[str, Any]) -> bool:
        """Whether each card's pool has all slices, with this slice."""
        pool = body["spec"]["pool"]
        seen = self._seen.setdefault(pool["name"], set())
        seen.add(body["metadata"]["name"])
        if len(seen) == pool["resourceSliceCount"]:
            self._complete.add(pool["name"])
        return len(self._complete) == CARDS
