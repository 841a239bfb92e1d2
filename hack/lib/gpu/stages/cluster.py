"""A cluster of `hack/cluster` for the stages, and pods that run the CUDA program in it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hack.lib.cluster.versions import VERSIONS
from hack.lib.gpu import programs
from hack.lib.gpu.bundle import TREE
from hack.lib.gpu.stages.machine import Machine

FILE = "stack.txt"  # the logs of the cluster's parts
TIMEOUT_S = 40
# This driver must not change the card's settings: docs/policy.md, `keep`.
_POLICY = {
    "apiVersion": "gpuslice.dev/v1alpha1",
    "kind": "Policy",
    "default": {"modes": ["gpu", "mps", "timeslice"], "keep": ["computeMode", "timeSlice"]},
}


class Stack:
    """The cluster for its administrator, and pods that run the CUDA program. Without a card, the pods run a shell."""

    def __init__(self, machine: Machine, *, hook: bool) -> None:
        assert machine.programs is not None
        self._hook = hook
        self.machine, self.programs = machine, machine.programs
        self.real = machine.driver_root is not None
        self.folder = Path(os.environ.get("TMPDIR", "/tmp"), "gpuslice-cluster")

    def cards(self) -> list[str]:
        if self.machine.driver_root is None:
            return ["--gpus", "h100"]
        policy = self.machine.out / "policy.json"
        policy.write_text(json.dumps(_POLICY), encoding="utf-8")
        program, hook = (str(self.programs / "bin" / name) for name in (programs.PROGRAM, "nvidia-cdi-hook"))
        chosen = ["--gpus", "real", "--driver-root", str(self.machine.driver_root), "--policy", str(policy)]
        return [*chosen, "--program", program, *(("--cdi-hook", hook) if self._hook else ())]

    def cluster(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hack.lib.cluster", *arguments]
        return subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=False)

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        """Run kubectl. Returns its output. RuntimeError with its errors if it fails."""
        kube = self.programs / "cache" / "gpuslice" / "cluster" / f"v{VERSIONS[0]}" / "kube"
        command = [str(kube), "kubectl", f"--kubeconfig={self.folder / 'admin.conf'}", *arguments]
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, timeout=TIMEOUT_S + 10)
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments[:3])}: {done.stderr.strip()[-600:]}")
        return done.stdout

    def items(self, *what: str) -> list[Mapping[str, Any]]:
        return list(json.loads(self.kubectl("get", *what, "--output=json"))["items"])

    # ------------------------------------------------------------ pods

    def command(self, *lines: str) -> list[str]:
        """The command of the container: the CUDA program with these lines; for a simulated card, `env`."""
        if self.real:
            return [f"/usr/bin/{programs.PROGRAM}", *lines]
        held = "trap exit TERM; while :; do sleep 1; done" if "hold" in lines else "true"
        return ["sh", "-c", f"echo ok; env | grep GPUSLICE | sort; {held}"]

    def template(self, name: str, device_class: str, **requests: str) -> None:
        exactly: dict[str, object] = {"deviceClassName": f"{device_class}.gpuslice.dev"}
        if requests:
            exactly["capacity"] = {"requests": requests}
        spec = {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}
        self.apply("resource.k8s.io/v1", "ResourceClaimTemplate", name, {"spec": spec})

    def pod(
        self,
        name: str,
        template: str,
        *lines: str,
        limits: Mapping[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        resources: dict[str, object] = {"limits": limits} if limits else {"claims": [{"name": "gpu"}]}
        container = {
            "name": "main",
            "image": "ubuntu:24.04",
            "command": command or self.command(*lines),
            "resources": resources,
        }
        spec: dict[str, object] = {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 5,
            "containers": [container],
        }
        if not limits:
            spec["resourceClaims"] = [{"name": "gpu", "resourceClaimTemplateName": template}]
        self.apply("v1", "Pod", name, spec)

    def apply(self, version: str, kind: str, name: str, spec: Mapping[str, object]) -> None:
        body = {"apiVersion": version, "kind": kind, "metadata": {"name": name}, "spec": spec}
        self.kubectl("apply", "-f", "-", given=json.dumps(body))

    def until(self, name: str, condition: str) -> None:
        try:
            self.kubectl("wait", f"--for={condition}", f"pod/{name}", f"--timeout={TIMEOUT_S}s")
        except RuntimeError as e:
            raise RuntimeError(f"{e}; {self.kubectl('describe', 'pod', name)[-1500:]}; logs: {self.logs(name)}") from e

    def ends(self, name: str) -> str:
        self.until(name, "jsonpath={.status.phase}=Succeeded")
        return self.logs(name)

    def holds(self, name: str) -> str:
        """Wait until the program of the pod has done all commands and holds. Returns its log."""
        self.until(name, "condition=Ready")
        deadline = time.monotonic() + TIMEOUT_S
        while (
            "hold" not in (log := self.logs(name)) and "error" not in log and time.monotonic() < deadline and self.real
        ):
            time.sleep(0.2)  # a log sends no event when it grows
        return log

    def logs(self, name: str) -> str:
        with contextlib.suppress(RuntimeError):
            return self.kubectl("logs", name).strip()
        return "(no log)"

    def clear(self) -> None:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.kubectl(
                "delete", "pods,resourceclaimtemplates", "--all", "--grace-period=3", f"--timeout={TIMEOUT_S}s"
            )

    def keep_logs(self) -> None:
        with (self.machine.out / FILE).open("a", encoding="utf-8") as file:
            for name in ("driver", "mps-supervisor", "kubelet", "containerd"):
                path = self.folder / "log" / f"{name}.log"
                if path.exists():
                    file.write(f"==== {name}\n{path.read_text(errors='replace')[-400_000:]}\n")
