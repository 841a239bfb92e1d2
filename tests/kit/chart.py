"""Renders deploy/chart by hack/manifests, which starts Helm."""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from gpuslice import config
from gpuslice.config import Config

from hack.lib.cluster.binaries import helm
from hack.lib.cluster.versions import HELMS
from hack.lib.manifests import manifests as files

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
AGAIN = "deploy/*.yaml is made from deploy/chart: change it there, and run hack/manifests"
DRIVER, SUPERVISOR = "gpuslice", "gpuslice-mps-supervisor"

POLICY = "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy  # ours\ndefault:\n  modes: [mig]  # nothing else\n"
EVERYTHING: dict[str, Any] = {
    "image": {"repository": "example/gpuslice", "tag": "1", "pullPolicy": "Always", "pullSecrets": [{"name": "login"}]},
    "nvidiaDriverRoot": "/run/nvidia/driver",
    "kubeletRootDir": "/var/lib/k0s/kubelet",
    "cdiRoot": "/etc/cdi",
    "policy": POLICY,
    "logLevel": "debug",
    "http": {"port": 8080},
    "hostNetwork": True,
    "apiServer": {"host": "fd00::1", "port": 6443},
    "extraEnv": [{"name": "SIMULATE_LATENCY", "value": "zero"}],
    "priorityQuota": True,
    "resources": {"limits": {"memory": "256Mi"}},
    "supervisor": {
        "resources": {"requests": {"cpu": 1, "memory": "1Gi"}},
        "extraEnv": [{"name": "SIMULATE_FOLDER", "value": "/var/lib/k0s/kubelet/plugins/gpuslice.dev/simulated"}],
    },
    "deviceClasses": {"extendedResourceName": "example.com/card"},
    "nodeSelector": {"pool": "cards"},
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "tolerations": [{"operator": "Exists"}],
    "priorityClassName": "ours",
    "simulate": "a100-40gx2:mig+l4",
}
NOTHING: dict[str, Any] = {
    "resources": {"requests": None},
    "supervisor": {"enabled": False},
    "preflight": {"enabled": False},
    "deviceClasses": {"enabled": False},
    "affinity": None,
    "tolerations": [],
    "priorityClassName": "",
}


def manifests(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    if not all(helm(major).exists() for major in HELMS):  # here, so that all tests share one line of the summary
        pytest.skip("deploy/chart is not rendered: no Helm (hack/cluster build --only helm)")
    return run_module("hack.lib.manifests", "--out", str(out), *flags)


def run_module(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", name, *arguments]
    more = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=more, capture_output=True, text=True, timeout=30)


@functools.cache
def _rendered(values: str, *flags: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder), Path(folder) / "values"
        file.write_text(values, encoding="utf-8")
        made = manifests(out, "--values", str(file), *flags)
        assert made.returncode == 0, made.stderr
        return {path.name: path.read_text(encoding="utf-8") for path in files(out)}


def rendered(values: dict[str, Any], *flags: str) -> list[dict[str, Any]]:
    """Every body that the chart makes of these values."""
    return [body for text in _rendered(json.dumps(values), *flags).values() for body in yaml.safe_load_all(text)]


def pod(daemonset: str, values: dict[str, Any]) -> dict[str, Any]:
    """Template of its pods."""
    (found,) = (
        body for body in rendered(values) if body["kind"] == "DaemonSet" and body["metadata"]["name"] == daemonset
    )
    template: dict[str, Any] = found["spec"]["template"]
    return template


def as_read(spec: dict[str, Any]) -> Config:
    """The settings of the process in this pod, read by the driver's own code."""
    environment = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"] if "value" in entry}
    return config.read(argparse.Namespace(), environment)


def mounts(spec: dict[str, Any]) -> dict[Path, Path]:
    """Folder of the node by its path in the container."""
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    return {
        Path(entry["mountPath"]): Path(paths[entry["name"]])
        for entry in spec["containers"][0]["volumeMounts"]
        if entry["name"] in paths
    }
