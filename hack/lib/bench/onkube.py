"""A real Kubernetes for the measurement: start it, end it, and read it with little CPU time."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import subprocess
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hack.lib import api
from hack.lib.api import CLAIMS, PODS, SLICES, ApiServer, RequestError
from hack.lib.bench.exposition import Exposition
from hack.lib.bench.podwatch import PodWatch
from hack.lib.bench.subject import ROOT, BenchError, here

Body = dict[str, Any]

CARDS = 8

_CLUSTER = (str(ROOT / "hack" / "cluster"),)
_RUN_S = 86400.0  # of the watch on pods; longer than any run


@contextlib.contextmanager
def cluster(version: str, *how: str) -> Iterator[MeasuredCluster]:
    """Start Kubernetes with our driver on eight cards that take no time, and end it. BenchError if a cluster runs
    already, or if its programs are not built: a build takes ten minutes, which must not count. `how`: more flags of
    `hack/cluster up`."""
    chosen = ["--version", version] if version else []
    _hack_cluster("check", *chosen)
    _hack_cluster("up", "--gpus", f"h100x{CARDS}", *how, *chosen)  # if it fails, it removes what it started
    try:
        with contextlib.closing(MeasuredCluster(json.loads(_hack_cluster("status", "--json")))) as kube:
            yield kube
    except RequestError as e:
        raise BenchError(f"the cluster could not be measured to the end: {e}") from e
    finally:
        _hack_cluster("down")


def _hack_cluster(*arguments: str) -> str:
    environment = {**os.environ, "SIMULATE_LATENCY": "zero", "PYTHONPATH": here().environment()["PYTHONPATH"]}
    pipe, command = subprocess.PIPE, [*_CLUSTER, *arguments]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            process.terminate()  # SIGTERM, not SIGKILL, so that it removes the cluster
            process.communicate()
            raise
    if process.returncode:
        raise BenchError((errors.strip() or "hack/cluster failed").splitlines()[-1].removeprefix("hack/cluster: "))
    return out


class MeasuredCluster:
    """The cluster for its administrator. Bodies stay JSON, because models would use the CPUs that are measured."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        """`status`: the output of `hack/cluster status --json`."""
        folder = Path(status["folder"])
        self._ports: Mapping[str, int] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))["ports"]
        self._processes: Mapping[str, int] = status["processes"]
        self.api = ApiServer.of_kubeconfig(folder / "admin.conf")
        self._threads = concurrent.futures.ThreadPoolExecutor(CARDS, "pods")
        self.version = str(self.api.ask("GET", "/version")["gitVersion"])  # "v1.37.1"
        version = self.api.ask("GET", PODS)["metadata"]["resourceVersion"]
        self.pods = PodWatch(self.api.watch(PODS, version, _RUN_S))

    def close(self) -> None:
        self.pods.close()
        self._threads.shutdown(cancel_futures=True)
        self.api.close()

    def pid(self, part: str) -> int:
        """Process id of a part. BenchError if the part was restarted, because figures of two processes mean nothing."""
        pid = self._processes.get(part, 0)
        if not Path(f"/proc/{pid}").exists():
            raise BenchError(f"the {part} ended during the measurement; start hack/cluster up and look at its log")
        return pid

    def eight(self, work: Callable[[Body], float], pods: Sequence[Body]) -> list[float]:
        """Do the work for all pods, eight at a time."""
        return list(self._threads.map(work, pods))

    # ------------------------------------------------------------ pods

    def create(self, pod: Body) -> float:
        """Create the pod. Returns the moment just before the request."""
        began = time.perf_counter()
        self.api.ask("POST", PODS, pod)
        return began

    def delete(self, name: str, *, force: bool = False) -> float:
        """Delete with the pod's own grace, or like `kubectl delete --force`. Returns the moment just before the request."""
        began = time.perf_counter()
        self.api.ask("DELETE", f"{PODS}/{name}", {"gracePeriodSeconds": 0} if force else None)
        return began

    def elapse(self, seconds: float) -> None:
        """Return after this time, in whole seconds. It is a watch that the API server ends, so it takes no CPU time here."""
        version = self.api.ask("GET", SLICES)["metadata"]["resourceVersion"]
        for _ in self.api.watch(SLICES, version, seconds):
            pass

    def cards(self) -> int:
        """How many cards claims hold now."""
        claims = self.api.ask("GET", CLAIMS)["items"]
        allocations = (claim.get("status", {}).get("allocation") for claim in claims)
        return len({one["pool"] for found in allocations if found for one in found["devices"]["results"]})

    def types(self) -> frozenset[str]:
        """The kinds of device that the node offers: "gpu", "mig" …"""
        slices = self.api.ask("GET", SLICES)["items"]
        devices = [device for body in slices for device in body["spec"].get("devices") or ()]
        return frozenset(device["attributes"]["type"]["string"] for device in devices)

    # ------------------------------------------------------------ what the parts count

    def kubelet(self) -> Exposition:
        return self._metrics(f"https://127.0.0.1:{self._ports['kubelet']}/metrics", "dra_")

    def of_kubelet(self, path: str) -> str:
        """What the kubelet answers to this path."""
        return api.fetch(f"https://127.0.0.1:{self._ports['kubelet']}{path}").decode()

    def driver(self) -> Exposition:
        return self._metrics(f"http://127.0.0.1:{self._ports['driver']}/metrics", "gpuslice_")

    def slice_writes(self) -> float:
        """Writes by the driver since the API server began, including dry runs and refused writes.

        The driver's ClusterRole lets it write ResourceSlices only. Of the other clients only the kubelet touches them: it
        deletes them as a collection (scope="cluster") when it starts.
        """
        text = self.api.text("/metrics")
        exposition = Exposition.of(text, "apiserver_request_total{")
        verbs = ("POST", "PUT", "PATCH", "APPLY", "DELETE")
        labels = {"resource": "resourceslices", "scope": "resource"}
        writes = sum(exposition.total("apiserver_request_total", verb=verb, **labels) for verb in verbs)
        if not writes:
            raise BenchError(f"{self.version} does not count writes of ResourceSlices as expected; see its /metrics")
        return writes

    def _metrics(self, url: str, family: str) -> Exposition:
        assert urllib.parse.urlsplit(url).hostname == "127.0.0.1"
        return Exposition.of(api.fetch(url).decode(), family)
