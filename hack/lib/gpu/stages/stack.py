"""The whole stack: kubelet, containerd and our driver, and pods that compute on the card; simulated where there is none."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hack.lib.cluster.versions import VERSIONS
from hack.lib.gpu import programs
from hack.lib.gpu.bundle import TREE
from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine
from hack.lib.gpu.stages.program import numbers

FILE = "stack.txt"  # what the parts of the cluster said
_PATIENCE_S = 40
# The card's settings are not ours to change: docs/policy.md, `keep`.
_POLICY = {
    "apiVersion": "gpuslice.dev/v1alpha1",
    "kind": "Policy",
    "default": {"modes": ["gpu", "mps", "timeslice"], "keep": ["computeMode", "timeSlice"]},
}


def run(machine: Machine, results: Results) -> None:
    # Where NVIDIA's hook does not work here, the driver has another way to tell a container about its libraries.
    for hook in (True, False) if machine.driver_root is not None else (False,):
        stack = Stack(machine, hook=hook)
        try:
            if _start(stack, results) and _works(stack, results):
                _trials(stack, results)
                return
        finally:
            stack.keep_logs()
            stack.cluster("down")


def _start(stack: Stack, results: Results) -> bool:
    """Whether claims may be made."""
    begun = time.perf_counter()
    up = stack.cluster("up", *stack.cards())
    took = time.perf_counter() - begun
    said = f"{took:.1f} s" if up.returncode == 0 else up.stderr[-1500:]
    return results.check(f"Kubernetes {VERSIONS[0]} with our driver starts", up.returncode == 0, said) and _published(
        stack, results
    )


def _works(stack: Stack, results: Results) -> bool:
    """Whether the first pod computes; the others are not worth their time otherwise."""
    found = False
    with results.trying("a pod computes on the card that its claim holds"):
        found = _whole(stack, results)
    stack.clear()
    return found


def _trials(stack: Stack, results: Results) -> None:
    for trial in (_memory, _extended, _time_slicing, _mps, _replaced, _restart):
        with results.trying(trial.__name__.strip("_").replace("_", " ")):
            trial(stack, results)
        stack.clear()
    with results.trying("nothing is left"):
        _nothing_left(stack, results)
    _times(stack, results)


class Stack:
    """The cluster as its administrator has it, and pods that run the CUDA program, or a shell where there is no card."""

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
        """Its output. RuntimeError with what it said where it fails."""
        kube = self.programs / "cache" / "gpuslice" / "cluster" / f"v{VERSIONS[0]}" / "kube"
        command = [str(kube), "kubectl", f"--kubeconfig={self.folder / 'admin.conf'}", *arguments]
        done = subprocess.run(
            command, input=given, capture_output=True, text=True, check=False, timeout=_PATIENCE_S + 10
        )
        if done.returncode:
            raise RuntimeError(f"kubectl {' '.join(arguments[:3])}: {done.stderr.strip()[-600:]}")
        return done.stdout

    def items(self, *what: str) -> list[Mapping[str, Any]]:
        return list(json.loads(self.kubectl("get", *what, "--output=json"))["items"])

    # ------------------------------------------------------------ pods

    def command(self, *lines: str) -> list[str]:
        """What the container runs: the CUDA program obeying these lines; what it was given where the card is simulated."""
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

    def pod(self, name: str, template: str, *lines: str, limits: Mapping[str, str] | None = None) -> None:
        resources: dict[str, object] = {"limits": limits} if limits else {"claims": [{"name": "gpu"}]}
        container = {"name": "main", "image": "ubuntu:24.04", "command": self.command(*lines), "resources": resources}
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
            self.kubectl("wait", f"--for={condition}", f"pod/{name}", f"--timeout={_PATIENCE_S}s")
        except RuntimeError as e:
            raise RuntimeError(f"{e}; {self.kubectl('describe', 'pod', name)[-1500:]}; logs: {self.said(name)}") from e

    def ends(self, name: str) -> str:
        self.until(name, "jsonpath={.status.phase}=Succeeded")
        return self.said(name)

    def holds(self, name: str) -> str:
        """Wait until its program has done all and holds; what it said."""
        self.until(name, "condition=Ready")
        deadline = time.monotonic() + _PATIENCE_S
        while (
            "hold" not in (said := self.said(name))
            and "error" not in said
            and time.monotonic() < deadline
            and self.real
        ):
            time.sleep(0.2)  # a log tells nobody that it grew
        return said

    def said(self, name: str) -> str:
        with contextlib.suppress(RuntimeError):
            return self.kubectl("logs", name).strip()
        return "(no log)"

    def clear(self) -> None:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.kubectl(
                "delete", "pods,resourceclaimtemplates", "--all", "--grace-period=3", f"--timeout={_PATIENCE_S}s"
            )

    def keep_logs(self) -> None:
        with (self.machine.out / FILE).open("a", encoding="utf-8") as file:
            for name in ("driver", "mps-supervisor", "kubelet", "containerd"):
                path = self.folder / "log" / f"{name}.log"
                if path.exists():
                    file.write(f"==== {name}\n{path.read_text(errors='replace')[-400_000:]}\n")


def _published(stack: Stack, results: Results) -> bool:
    """Whether claims may be made: on a real card none of them may switch MIG mode."""
    slices = stack.items("resourceslices")
    devices = [device for body in slices for device in body["spec"].get("devices") or ()]
    kinds = sorted({device["attributes"]["type"]["string"] for device in devices})
    results.check("the card is published", "gpu" in kinds, f"{len(devices)} devices of {', '.join(kinds)}")
    (stack.machine.out / "slices.json").write_text(json.dumps(slices, indent=1), encoding="utf-8")
    return not stack.real or results.check("no claim can switch MIG mode", "mig" not in kinds, kinds)


def _computes(stack: Stack, said: str) -> bool:
    """Whether every command was answered with ok; whether the container was given a device where there is no card."""
    lines = said.splitlines()
    if not stack.real:
        return bool(lines) and lines[0] == "ok" and "GPUSLICE_" in said
    return bool(lines) and all(line.startswith("ok") for line in lines)


def _whole(stack: Stack, results: Results) -> bool:
    stack.template("whole", "gpu")
    begun = time.perf_counter()
    stack.pod("whole", "whole", "allocate 4096", "touch 1024", "spin 20000", "memory")
    said = stack.ends("whole")
    took = time.perf_counter() - begun
    name = "a pod computes on the card that its claim holds"
    return results.check(name, _computes(stack, said), f"{took:.1f} s; {said}")


def _memory(stack: Stack, results: Results) -> None:
    stack.template("memory", "slice", memory="9Gi")
    stack.pod("memory", "memory", "allocate 1024", "spin 20000", "memory", "hold")
    said = stack.holds("memory")
    device = stack.items("resourceclaims")[0]["status"]["allocation"]["devices"]["results"][0]["device"]
    results.check("a pod asks for memory alone and computes", _computes(stack, said), f"{device}; {said}")


def _extended(stack: Stack, results: Results) -> None:
    stack.pod("extended", "", "spin 20000", limits={"nvidia.com/gpu": "1"})
    said = stack.ends("extended")
    results.check("a pod with `nvidia.com/gpu: 1` computes", _computes(stack, said), said)


def _time_slicing(stack: Stack, results: Results) -> None:
    stack.template("turns", "timeslice", memory="20Gi")
    for name in ("turns-1", "turns-2"):
        stack.pod(name, "turns", "touch 1024", "second 2", "memory", "hold")
    said = [stack.holds(name) for name in ("turns-1", "turns-2")]
    results.check("two pods with time-slicing shares compute at once", all(_computes(stack, one) for one in said), said)


def _mps(stack: Stack, results: Results) -> None:
    stack.template("large", "mps", memory="8Gi", smPercent="50")
    stack.template("small", "mps", memory="4Gi", smPercent="25")
    begun = time.perf_counter()
    stack.pod("large", "large", "allocate 4096", "second 2", "memory", "hold")
    stack.pod("small", "small", "allocate 2048", "allocate 2048", "second 2", "memory", "hold")
    large, small = stack.holds("large"), stack.holds("small")
    took = time.perf_counter() - begun
    if not stack.real:
        results.check(
            "two pods with MPS shares run at once", _computes(stack, large) and _computes(stack, small), large
        )
        return
    sees = [numbers(said.splitlines()[0]) for said in (large, small)]
    results.check(
        "two pods with MPS shares compute at once", _computes(stack, large), f"{took:.1f} s; {large} | {small}"
    )
    results.check("a share sees its own memory", sees[0]["free"] <= 8192 and sees[1]["free"] <= 4096, sees)
    results.check("a share cannot take more than its memory", "error 2" in small, small)
    results.check("a share has its part of the multiprocessors", sees[1]["sms"] < sees[0]["sms"], sees)
    enforcement = stack.kubectl("get", "resourceclaims", "-o", "jsonpath={.items[*].status.devices}")
    results.check("what the claims say", True, enforcement)


def _replaced(stack: Stack, results: Results) -> None:
    """A pod is deleted by force, and the next one wants its card at once."""
    stack.template("again", "gpu")
    stack.pod("first", "again", "touch 1024", "hold")
    stack.holds("first")
    stack.kubectl("delete", "pod", "first", "--force", "--grace-period=0")
    begun = time.perf_counter()
    stack.pod("second", "again", "touch 1024", "spin 20000")
    said = stack.ends("second")
    took = time.perf_counter() - begun
    results.check(
        "the card of a pod deleted by force goes to the next", _computes(stack, said), f"{took:.1f} s; {said}"
    )


def _restart(stack: Stack, results: Results) -> None:
    """The driver is killed while a pod computes, and the kubelet's next calls find another one."""
    stack.template("survives", "mps", memory="4Gi")
    stack.pod("survives", "survives", "second 6", "hold")
    stack.until("survives", "condition=Ready")
    pid = stack.cluster("status", "--pid", "driver").stdout.strip()
    stack.cluster("stop", "driver")
    started = stack.cluster("start", "driver")
    results.check("a killed driver serves again", started.returncode == 0, started.stderr or f"was {pid}")
    said = stack.holds("survives")
    results.check("the pod computed on while the driver was dead", _computes(stack, said), said)
    stack.pod("beside", "survives", "second 1")
    said = stack.ends("beside")
    results.check("the new driver prepares a share beside the old one's", _computes(stack, said), said)


def _nothing_left(stack: Stack, results: Results) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while (left := _left(stack)) and time.monotonic() < deadline:
        time.sleep(0.5)  # several parts of the node give back at their own pace
    results.check("nothing is left: claims, records, CDI files, MPS daemons", not left, left)
    if stack.machine.driver_root is not None:
        from gpuslice.nvml.api import ComputeMode
        from gpuslice.nvml.real import RealNvml

        nvml = RealNvml(stack.machine.driver_root)
        gpu = nvml.gpus()[0].uuid
        live = nvml.look(gpu)
        untouched = nvml.compute_mode(gpu) == ComputeMode.DEFAULT and not live.mig
        results.check("the card's settings are untouched", untouched, live)
        results.check("no process is left on the card", not nvml.processes(gpu), nvml.processes(gpu))
        nvml.close()


def _left(stack: Stack) -> list[str]:
    claims = [str(claim["metadata"]["name"]) for claim in stack.items("resourceclaims")]
    plugin = stack.folder / "kubelet" / "plugins" / "gpuslice.dev" / "claims"
    records = [str(path) for path in (*plugin.glob("*.json"), *(stack.folder / "cdi").glob("*.json"))]
    daemons = [path.name for path in Path("/proc").glob("[0-9]*") if "nvidia-cuda-mps" in _text(path / "comm")]
    return [*claims, *records, *daemons]


def _times(stack: Stack, results: Results) -> None:
    """The driver's own figures: memory, and how long each call took."""
    done = stack.cluster("status")
    resident = re.findall(r"^\s+(driver|mps-supervisor)\s+\d+\s+(\d+) MB", done.stdout, re.MULTILINE)
    results.check("memory resident", True, ", ".join(f"{name} {mb} MB" for name, mb in resident))
    for line in _lines(stack.folder / "log" / "driver.log", r"(prepared|unprepared)\b.*"):
        print(f"  {line}")


def _lines(path: Path, pattern: str) -> Iterator[str]:
    yield from (line for line in _text(path).splitlines() if re.search(pattern, line))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
