"""The kinds of object that the stand-in API server keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    prefix: str  # "/apis/resource.k8s.io/v1"
    kind: str
    namespaced: bool = False
    fields: frozenset[str] = frozenset()  # field selectors besides metadata.name

    @property
    def api_version(self) -> str:
        return self.prefix.removeprefix("/apis/").removeprefix("/api/")

    @property
    def group(self) -> str:
        return self.api_version.rpartition("/")[0]


RESOURCE_GROUP = "/apis/resource.k8s.io/v1"
KINDS = {
    "nodes": Kind("/api/v1", "Node"),
    "namespaces": Kind("/api/v1", "Namespace"),
    "pods": Kind("/api/v1", "Pod", True, frozenset({"spec.nodeName"})),
    "events": Kind("/api/v1", "Event", True),
    "resourceslices": Kind(RESOURCE_GROUP, "ResourceSlice", False, frozenset({"spec.nodeName", "spec.driver"})),
    "resourceclaims": Kind(RESOURCE_GROUP, "ResourceClaim", True),
    "resourceclaimtemplates": Kind(RESOURCE_GROUP, "ResourceClaimTemplate", True),
    "deviceclasses": Kind(RESOURCE_GROUP, "DeviceClass"),
}
