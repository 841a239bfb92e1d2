"""Two programs that share the card by time-slicing: speed, visible memory, and a fault in one of them."""

from __future__ import annotations

import threading

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine
from hack.lib.gpu.stages.program import CudaProgram, numbers


def run(machine: Machine, results: Results) -> None:
    if machine.driver_root is None:
        results.leave_out("two programs share the card by time", "no NVIDIA driver here")
        return
    from gpuslice.nvml.real import RealNvml

    nvml = RealNvml(machine.driver_root)
    gpu = nvml.gpus()[0].uuid
    one, other = CudaProgram(machine), CudaProgram(machine)
    started = one.first.startswith("ok") and other.first.startswith("ok")
    results.check("two programs share the card by time", started, f"{one.first} | {other.first}")
    alone = numbers(one.does("second 1"))
    for program in (one, other):
        program.tell("second 2")
    both = [numbers(program.says()) for program in (one, other)]
    rate = [found["kernels"] / found["seconds"] for found in (alone, *both)]
    results.check("kernels a second: alone, and two at once", True, ", ".join(f"{value:.0f}" for value in rate))
    print(one.does("touch 1024"), other.does("touch 512"))
    seen = {process.pid: process for process in nvml.processes(gpu)}
    results.check("NVML lists both processes", {one.process.pid, other.process.pid} <= set(seen), list(seen.values()))
    results.check("each sees what the other has taken", numbers(one.does("memory")) != {}, one.does("memory"))
    nvml.wait_event(0.1)  # from here on NVML keeps events for us
    events: list[object] = []
    listener = threading.Thread(target=lambda: events.append(nvml.wait_event(8.0)), daemon=True)
    listener.start()
    fault = one.does("fault")
    results.check("a fault ends the program with an error of CUDA's", fault.startswith("error"), fault)
    results.check(
        "the other program is not touched by it", other.does("spin 1000").startswith("ok"), other.does("memory")
    )
    listener.join(10)
    results.check("NVML reports the fault as an XID", bool(events and events[0]), events)
    one.end()
    other.end()
    nvml.close()
