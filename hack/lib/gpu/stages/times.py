"""The driver's own times with real NVML: the start, one look, and the memory of the process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine


def run(machine: Machine, results: Results) -> None:
    if machine.driver_root is None:
        results.leave_out("times of real NVML", "no NVIDIA driver here")
        return
    from gpuslice.nvml.real import RealNvml

    begun = time.perf_counter()
    nvml = RealNvml(machine.driver_root)
    results.check("start of NVML", True, _ms([time.perf_counter() - begun]))
    gpu = nvml.gpus()[0].uuid
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "list of cards": (nvml.gpus, 10),
        "a look at a card": (lambda: nvml.look(gpu), 100),
        "its device minor": (lambda: nvml.minor(gpu), 100),
        "its processes": (lambda: nvml.processes(gpu), 100),
        "its compute mode": (lambda: nvml.compute_mode(gpu), 100),
        "its time slice, by nvidia-smi": (lambda: nvml.time_slice(gpu), 5),
    }
    for name, (call, count) in calls.items():
        with results.trying(name):
            results.check(name, True, _ms([_timed(call) for _ in range(count)]))
    begun = time.perf_counter()
    nvml.close()
    results.check("end of NVML", True, _ms([time.perf_counter() - begun]))


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def _ms(seconds: list[float]) -> str:
    values = [second * 1e3 for second in seconds]
    return f"p50 {statistics.median(values):.3f} ms, most {max(values):.3f} ms, of {len(values)}"
