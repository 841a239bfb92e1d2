"""The files of deploy/ as the API server gets them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from gpuslice import config

Body = Mapping[str, Any]
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted((*DEPLOY.glob("*.yaml"), *(DEPLOY / "examples").glob("*.yaml")))
EXAMPLES = sorted(path for path in (DEPLOY / "examples").glob("*.yaml"))
DRIVER = config.DRIVER_NAME


def documents(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def only(kind: str, name: str = "") -> dict[str, Any]:
    """The one body of this kind, and of this name where there are more."""
    (found,) = (body for body in documents(*FILES) if body["kind"] == kind and name in ("", body["metadata"]["name"]))
    return found


def pod(daemonset: str = "gpuslice") -> dict[str, Any]:
    spec: dict[str, Any] = only("DaemonSet", daemonset)["spec"]["template"]["spec"]
    return spec


def mounts(spec: Body) -> dict[str, dict[str, Any]]:
    """What the only container of a pod mounts, by the path in it, with the path of the node (none of its own volumes)."""
    (container,) = spec["containers"]
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    return {entry["mountPath"]: {**entry, "host": paths[entry["name"]]} for entry in container["volumeMounts"]}


def names_in_environment(spec: Body) -> set[str]:
    return {entry["name"] for entry in spec["containers"][0]["env"]}
