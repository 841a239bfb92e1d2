"""The controllers and kubelets of a cluster of nodes, beside a stand-in API server: DaemonSets get pods, pods end, claims
are deallocated, and what belongs to a deleted object is deleted."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.standin.store import Key, RefusalError

Body = dict[str, Any]
NAMESPACE = "gpuslice-system"
DRIVER = "gpuslice.dev"


class Workloads:
    """`cleanup` decides how the container of a clean-up pod ends on a node: exit code and last words.

    `stuck`: names of pods that never end. `owned`: kinds whose objects go with their owner.
    """

    owned = ("daemonsets", "jobs", "pods", "devicetaintrules")

    def __init__(self, api: StandInApiServer, nodes: tuple[str, ...] = ("n1",)) -> None:
        self.api = api
        self.stuck: set[str] = set()
        self.cleanup: Callable[[str, list[str]], tuple[int, str]] = lambda node, arguments: (0, "")
        self.runs: list[tuple[str, list[str]]] = []  # each clean-up: node and arguments
        self._over = False
        self._thread = threading.Thread(target=self._work, name="workloads", daemon=True)
        for name in nodes:
            api.add_node(name)
            self.report(name, ready=True)

    def __enter__(self) -> Workloads:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self.api.store.changed:
            self._over = True
            self.api.store.changed.notify_all()
        self._thread.join(10)

    # ------------------------------------------------------------ what a test does

    def install(self) -> None:
        """What `helm install` makes, as far as the removal looks at it."""
        for resource, namespace in (("clusterroles", ""), ("configmaps", NAMESPACE), ("jobs", NAMESPACE)):
            notes = {"meta.helm.sh/release-name": "gpuslice"}
            self.api.create(resource, {"metadata": {"name": "gpuslice-uninstall", "annotations": notes}}, namespace)
        for name in ("gpuslice", "gpuslice-mps-supervisor"):
            labels = {"app.kubernetes.io/name": name}
            template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c"}]}}
            body = {"metadata": {"name": name}, "spec": {"template": template}}
            self.api.create("daemonsets", body, NAMESPACE)

    def report(self, node: str, *, ready: bool) -> None:
        body = self.api.get("nodes", node)
        body["status"] = {"conditions": [{"type": "Ready", "status": "True" if ready else "Unknown"}]}
        self.api.update("nodes", body)

    def run(self, pod: str, node: str = "n1", *, labels: dict[str, str] | None = None, driver: str = DRIVER) -> None:
        """A pod that runs on a node with a claim for a device of a driver."""
        body = {"metadata": {"name": pod, "labels": labels or {}}, "spec": {"nodeName": node}}
        made = self.api.create("pods", body, "default")
        term = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [node]}]}
        self.api.create("resourceclaims", {"metadata": {"name": f"{pod}-gpu"}, "spec": {}}, "default")
        claim = self.api.get("resourceclaims", f"{pod}-gpu", "default")
        result = {"request": "gpu", "driver": driver, "pool": f"{node}/1", "device": "gpu"}
        claim["status"] = {
            "allocation": {"devices": {"results": [result]}, "nodeSelector": {"nodeSelectorTerms": [term]}},
            "reservedFor": [{"resource": "pods", "name": pod, "uid": made["metadata"]["uid"]}],
        }
        self.api.update("resourceclaims", claim)

    def force(self) -> None:
        self.annotate("evict")

    def annotate(self, value: str) -> None:
        body = self.api.get("daemonsets", "gpuslice", NAMESPACE)
        body["metadata"]["annotations"] = {"gpuslice.dev/uninstall": value}
        self.api.update("daemonsets", body)

    def names(self, resource: str) -> list[str]:
        return [body["metadata"]["name"] for body in self.api.all(resource)]

    # ------------------------------------------------------------ the controllers

    def _work(self) -> None:
        store, seen = self.api.store, -1
        while True:
            with store.changed:
                store.changed.wait_for(lambda: self._over or store.version != seen)  # noqa: B023 - called at once
                if self._over:
                    return
                seen = store.version
                self._collect()
                self._end_pods()
                for daemonset in self.api.all("daemonsets"):
                    self._serve(daemonset)

    def _collect(self) -> None:
        alive = {
            body["metadata"]["uid"]
            for resource in ("daemonsets", "configmaps", "clusterroles", "pods")
            for body in self.api.all(resource)
        }
        for resource in self.owned:
            for body in self.api.all(resource):
                owners = body["metadata"].get("ownerReferences", [])
                if owners and not any(owner["uid"] in alive for owner in owners):
                    self._delete(resource, body)

    def _delete(self, resource: str, body: Body) -> None:
        meta = body["metadata"]
        key = Key(resource, meta.get("namespace", ""), meta["name"])
        if resource != "pods" or not body["spec"].get("nodeName"):
            self.api.store.delete(key, {})
        elif "deletionTimestamp" not in meta:
            self.api.store.mark(key, {"deletionTimestamp": "2026-01-01T00:00:00Z"})

    def _end_pods(self) -> None:
        for pod in self.api.all("pods"):
            meta = pod["metadata"]
            if (
                "deletionTimestamp" in meta
                and meta["name"] not in self.stuck
                and self._reports(pod["spec"]["nodeName"])
            ):
                self.api.delete("pods", meta["name"], meta["namespace"])
                self._deallocate(meta["uid"])

    def _deallocate(self, uid: str) -> None:
        for claim in self.api.all("resourceclaims"):
            if any(user["uid"] == uid for user in claim.get("status", {}).get("reservedFor", [])):
                claim["status"] = {}
                self.api.update("resourceclaims", claim)

    def _serve(self, daemonset: Body) -> None:
        meta, template = daemonset["metadata"], daemonset["spec"]["template"]
        nodes = self.names("nodes")
        status = {"desiredNumberScheduled": len(nodes), "observedGeneration": meta["generation"]}
        if daemonset.get("status") != status:
            self.api.update("daemonsets", daemonset | {"status": status})
        for node in nodes:
            name = f"{meta['name']}-{meta['uid'][:5]}-{node}"
            owner = {"uid": meta["uid"], "kind": "DaemonSet", "name": meta["name"], "apiVersion": "apps/v1"}
            labels = template["metadata"]["labels"]
            body = {
                "metadata": {"name": name, "labels": labels, "ownerReferences": [owner]},
                "spec": {**template["spec"], "nodeName": node},
            }
            with contextlib.suppress(RefusalError):  # it is there
                self.api.create("pods", body, meta["namespace"])
            pod = self.api.get("pods", name, meta["namespace"])
            if meta["name"] == "gpuslice-cleanup" and self._reports(node):
                self._run_cleanup(pod, node)

    def _run_cleanup(self, pod: Body, node: str) -> None:
        if "status" in pod:
            return
        arguments = pod["spec"]["containers"][0]["args"]
        self.runs.append((node, arguments))
        code, words = self.cleanup(node, arguments)
        ended = {"exitCode": code, "message": words}
        pod["status"] = {"containerStatuses": [{"state": {"waiting": {}}, "lastState": {"terminated": ended}}]}
        self.api.update("pods", pod)

    def _reports(self, node: str) -> bool:
        conditions = self.api.get("nodes", node).get("status", {}).get("conditions", [])
        return any(one["status"] == "True" for one in conditions)
