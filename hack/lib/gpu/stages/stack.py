"""The whole stack: kubelet, containerd and our driver, with pods that compute on the card. Without a card, simulated."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from hack.lib.api import fetch
from hack.lib.cluster.versions import VERSIONS
from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.cluster import TIMEOUT_S, Stack
from hack.lib.gpu.stages.machine import Machine
from hack.lib.gpu.stages.program import numbers


def run(machine: Machine, results: Results) -> None:
    # If NVIDIA's hook does not work here, the driver tells a container about its libraries in another way.
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
    """Start the cluster. Returns whether claims may be made."""
    begun = time.perf_counter()
    up = stack.cluster("up", *stack.cards())
    took = time.perf_counter() - begun
    log = f"{took:.1f} s" if up.returncode == 0 else up.stderr[-1500:]
    return results.check(f"Kubernetes {VERSIONS[0]} with our driver starts", up.returncode == 0, log) and _published(
        stack, results
    )


def _works(stack: Stack, results: Results) -> bool:
    """Whether the first pod computes. Without it the other checks would only take time."""
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


def _published(stack: Stack, results: Results) -> bool:
    """Whether claims may be made: on a real card no claim may be able to switch MIG mode."""
    slices = stack.items("resourceslices")
    devices = [device for body in slices for device in body["spec"].get("devices") or ()]
    kinds = sorted({device["attributes"]["type"]["string"] for device in devices})
    results.check("the card is published", "gpu" in kinds, f"{len(devices)} devices of {', '.join(kinds)}")
    (stack.machine.out / "slices.json").write_text(json.dumps(slices, indent=1), encoding="utf-8")
    return not stack.real or results.check("no claim can switch MIG mode", "mig" not in kinds, kinds)


def _computes(stack: Stack, log: str) -> bool:
    """Whether every command was answered with ok. Without a card: whether the container has a device."""
    lines = log.splitlines()
    if not stack.real:
        return bool(lines) and lines[0] == "ok" and "GPUSLICE_" in log
    return bool(lines) and all(line.startswith("ok") for line in lines)


def _whole(stack: Stack, results: Results) -> bool:
    stack.template("whole", "gpu")
    begun = time.perf_counter()
    stack.pod("whole", "whole", "allocate 4096", "touch 1024", "spin 20000", "memory")
    log = stack.ends("whole")
    took = time.perf_counter() - begun
    name = "a pod computes on the card that its claim holds"
    return results.check(name, _computes(stack, log), f"{took:.1f} s; {log}")


def _memory(stack: Stack, results: Results) -> None:
    stack.template("memory", "slice", memory="9Gi")
    stack.pod("memory", "memory", "allocate 1024", "spin 20000", "memory", "hold")
    log = stack.holds("memory")
    device = stack.items("resourceclaims")[0]["status"]["allocation"]["devices"]["results"][0]["device"]
    results.check("a pod asks for memory alone and computes", _computes(stack, log), f"{device}; {log}")


def _extended(stack: Stack, results: Results) -> None:
    stack.template("listed", "gpu")
    if stack.real:
        stack.pod("listed", "listed", command=["nvidia-smi", "-L"])
        log = stack.ends("listed")
        results.check("nvidia-smi of the driver runs in a container", "GPU-" in log, log)
        stack.clear()
    stack.pod("extended", "", "spin 20000", limits={"nvidia.com/gpu": "1"})
    log = stack.ends("extended")
    results.check("a pod with `nvidia.com/gpu: 1` computes", _computes(stack, log), log)


def _time_slicing(stack: Stack, results: Results) -> None:
    stack.template("turns", "timeslice", memory="20Gi")
    for name in ("turns-1", "turns-2"):
        stack.pod(name, "turns", "touch 1024", "second 2", "memory", "hold")
    log = [stack.holds(name) for name in ("turns-1", "turns-2")]
    results.check("two pods with time-slicing shares compute at once", all(_computes(stack, one) for one in log), log)


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
    sees = [numbers(log.splitlines()[0]) for log in (large, small)]
    results.check(
        "two pods with MPS shares compute at once", _computes(stack, large), f"{took:.1f} s; {large} | {small}"
    )
    results.check("a share sees its own memory", sees[0]["free"] <= 8192 and sees[1]["free"] <= 4096, sees)
    results.check("a share cannot take more than its memory", "error 2" in small, small)
    results.check("a share has its part of the multiprocessors", sees[1]["sms"] < sees[0]["sms"], sees)
    enforcement = stack.kubectl("get", "resourceclaims", "-o", "jsonpath={.items[*].status.devices}")
    results.check("what the claims say", True, enforcement)


def _replaced(stack: Stack, results: Results) -> None:
    """A pod is deleted by force, and the next pod wants the same card at once."""
    stack.template("again", "gpu")
    stack.pod("first", "again", "touch 1024", "hold")
    stack.holds("first")
    stack.kubectl("delete", "pod", "first", "--force", "--grace-period=0")
    begun = time.perf_counter()
    stack.pod("second", "again", "touch 1024", "spin 20000")
    log = stack.ends("second")
    took = time.perf_counter() - begun
    results.check("the card of a pod deleted by force goes to the next", _computes(stack, log), f"{took:.1f} s; {log}")


def _restart(stack: Stack, results: Results) -> None:
    """The driver is killed while a pod computes. The next calls of the kubelet find a new driver."""
    stack.template("survives", "mps", memory="4Gi")
    stack.pod("survives", "survives", "second 6", "hold")
    stack.until("survives", "condition=Ready")
    pid = stack.cluster("status", "--pid", "driver").stdout.strip()
    stack.cluster("stop", "driver")
    started = stack.cluster("start", "driver")
    results.check("a killed driver serves again", started.returncode == 0, started.stderr or f"was {pid}")
    log = stack.holds("survives")
    results.check("the pod computed on while the driver was dead", _computes(stack, log), log)
    stack.pod("beside", "survives", "second 1")
    log = stack.ends("beside")
    results.check("the new driver prepares a share beside the old one's", _computes(stack, log), log)


def _nothing_left(stack: Stack, results: Results) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while (left := _left(stack)) and time.monotonic() < deadline:
        time.sleep(0.5)  # kubelet, driver and supervisor clean up independently
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
    """The driver's own figures: memory, and the duration of each call."""
    done = stack.cluster("status")
    resident = re.findall(r"^\s+(driver|mps-supervisor)\s+\d+\s+(\d+) MB", done.stdout, re.MULTILINE)
    results.check("memory resident", True, ", ".join(f"{name} {mb} MB" for name, mb in resident))
    ports = json.loads(_text(stack.folder / "cluster.json"))["ports"]
    text = fetch(f"http://127.0.0.1:{ports['driver']}/metrics", timeout_s=5).decode()
    print(text)
    for operation in ("prepare", "unprepare"):
        found = re.findall(
            rf'^gpuslice_request_duration_seconds_(sum|count){{.*{operation}"?.*}} (\S+)$', text, re.MULTILINE
        )
        seen = {kind: float(value) for kind, value in found}
        if seen.get("count"):
            mean = seen["sum"] / seen["count"] * 1e3
            results.check(
                f"each {operation} of the driver that serves now", True, f"mean {mean:.1f} ms of {seen['count']:.0f}"
            )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
