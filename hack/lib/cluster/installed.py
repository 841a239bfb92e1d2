"""The driver as operators have it: our image in containerd, installed by `helm install` of our chart."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hack.lib.cluster import software
from hack.lib.cluster.binaries import helm
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import REAL, REPOSITORY, Facts, Place
from hack.lib.image.python import native

CHART = REPOSITORY / "deploy" / "chart"
NAMESPACE = "gpuslice-system"
RELEASE = "gpuslice"
_TIMEOUT_S = 120


def make_image(place: Place) -> None:
    """Make the driver's image from this work tree, for this machine. PlaygroundError with the reason if that fails."""
    command = [sys.executable, "-m", "hack.lib.image", "--architecture", native(), "--out", str(place.image.parent)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or "no reason was printed").splitlines()[-1]
        raise PlaygroundError(f"the driver's image cannot be made: {last}")


def values(place: Place, facts: Facts) -> Mapping[str, Any]:
    """The values of the chart for this cluster: its folders, its API server, and its cards."""
    latency = os.environ.get("SIMULATE_LATENCY", "")
    return {
        "kubeletRootDir": str(place.kubelet),
        "cdiRoot": str(place.cdi),
        "apiServer": {"host": facts.address, "port": facts.ports.api},  # no proxy serves the address of the Service
        "policy": Path(facts.policy).read_text(encoding="utf-8") if facts.policy else "",
        **({"extraEnv": [{"name": "SIMULATE_LATENCY", "value": latency}]} if latency else {}),
        **(
            {"nvidiaDriverRoot": facts.driver_root, "affinity": None}
            if facts.gpus == REAL
            else {"simulate": facts.gpus}
        ),
    }


def install(place: Place, facts: Facts, kubectl: software.Kubectl) -> None:
    """Install the chart as docs/install.md says. Return when its pods are ready."""
    kubectl("apply", "-f", str(REPOSITORY / "deploy" / "namespace.yaml"))
    given = place.root / "values.json"  # JSON is YAML, too
    given.write_text(json.dumps(values(place, facts), indent=2))
    software.call(
        [
            *(str(helm()), "install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(given)),
            *("--wait", f"--timeout={_TIMEOUT_S}s"),
        ],
        environment=environment(place, facts),
    )


def environment(place: Place, facts: Facts) -> dict[str, str]:
    """The environment of Helm as the administrator of this cluster."""
    folders = {f"HELM_{name}_HOME": str(place.helm / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    return facts.environment() | folders | {"KUBECONFIG": str(place.admin)}
