"""The kinds of object that the stand-in API server keeps."""

from __future__ import annotations

from dataclasses import dataclass

from gpuslice.core.json import Body


@dataclass(frozen=True, slots=True)
class Kind:
    prefix: str  # "/apis/resource.k8s.io/v1"
    kind: str
    namespaced: bool = False
    fields: frozenset[str] = frozenset()  # field selectors besides metadata.name
    since: int = 0  # the first minor release of Kubernetes that serves it

    @property
    def api_version(self) -> str:
        return self.prefix.removeprefix("/apis/").removeprefix("/api/")

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]


RESOURCE_GROUP = "/apis/resource.k8s.io/v1"
_SINCE = 34
KINDS = {
    "nodes": Kind("/api/v1", "Node"),
    "namespaces": Kind("/api/v1", "Namespace"),
    "pods": Kind("/api/v1", "Pod", True, frozenset({"spec.nodeName"})),
    "events": Kind("/api/v1", "Event", True),
    "configmaps": Kind("/api/v1", "ConfigMap", True),
    "daemonsets": Kind("/apis/apps/v1", "DaemonSet", True),
    "jobs": Kind("/apis/batch/v1", "Job", True),
    "poddisruptionbudgets": Kind("/apis/policy/v1", "PodDisruptionBudget", True),
    "clusterroles": Kind("/apis/rbac.authorization.k8s.io/v1", "ClusterRole"),
    "resourceslices": Kind(
        RESOURCE_GROUP, "ResourceSlice", fields=frozenset({"spec.nodeName", "spec.driver"}), since=_SINCE
    ),
    "resourceclaims": Kind(RESOURCE_GROUP, "ResourceClaim", True, since=_SINCE),
    "resourceclaimtemplates": Kind(RESOURCE_GROUP, "ResourceClaimTemplate", True, since=_SINCE),
    "deviceclasses": Kind(RESOURCE_GROUP, "DeviceClass", since=_SINCE),
    "devicetaintrules": Kind(RESOURCE_GROUP, "DeviceTaintRule", since=37),
}


def is_served(version: str) -> bool:
    """Whether this version has resource.k8s.io/v1."""
    return int(version.split(".")[1]) >= _SINCE


def discovery(version: str) -> Body:
    """The resources of resource.k8s.io/v1, as discovery lists them."""
    served = [
        {"name": name, "kind": kind.kind, "namespaced": kind.namespaced, "verbs": ["create", "delete", "get", "list"]}
        for name, kind in KINDS.items()
        if kind.prefix == RESOURCE_GROUP and kind.since <= int(version.split(".")[1])
    ]
    group = RESOURCE_GROUP.removeprefix("/apis/")
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": served}
