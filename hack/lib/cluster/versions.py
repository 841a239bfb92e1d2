"""The supported versions: tested releases of Kubernetes, and the container runtime."""

from __future__ import annotations

from pathlib import Path

KUBE = Path(__file__).parents[2] / "kube"

# Newest first; the first is the default. 1.35 drops the counters for overlapping devices: the driver must notice.
VERSIONS = ("1.37.1", "1.36.3", "1.35.4")
CONTAINERD = "v2.3.6"
CNI = "v1.10.0"  # of the CNI plugins, which connect pods
CNI_GO = (1, 24)  # the oldest release of Go that builds them
TOOLKIT = "v1.20.2"  # of NVIDIA's container toolkit
HELMS = {"3": "v3.22.0", "4": "v4.3.2"}  # by major release; operators use both
HELM_GO = (1, 26)  # the oldest release of Go that builds them
HELM_KUBE = "37"  # minor release of their client-go; without a cluster they render for this Kubernetes


def module_file(version: str) -> str:
    """The go.mod of this version, beside main.go. The default version has the name that editors and `go vet` look for."""
    return "go.mod" if version == VERSIONS[0] else f"v{version}.mod"
