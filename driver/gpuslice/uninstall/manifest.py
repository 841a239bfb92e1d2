"""The DaemonSet of the clean-up, as the chart describes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpuslice.errors import ConfigError
from gpuslice.system import documents

_PAGE = "docs/uninstall.md"


def read(path: Path) -> Mapping[str, Any]:
    """The DaemonSet in this file. ConfigError if it is none with exactly one container."""
    body = documents.read(path, "manifest", _PAGE)
    containers = body
    for key in ("spec", "template", "spec", "containers"):
        containers = containers.get(key) if isinstance(containers, Mapping) else None
    kind = body.get("kind") if isinstance(body, Mapping) else None
    if not isinstance(body, Mapping) or kind != "DaemonSet" or not isinstance(containers, list) or len(containers) != 1:
        raise ConfigError(
            f"manifest {path} is not a DaemonSet with one container; use the one of deploy/chart ({_PAGE})"
        )
    return body
