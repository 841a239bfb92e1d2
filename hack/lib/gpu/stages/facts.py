"""Every answer of NVML to the driver's calls, raw, as JSON: golden data for the simulator. Reads only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine

FILE = "nvml.json"
_SYSTEM = (
    "nvmlSystemGetDriverVersion",
    "nvmlSystemGetNVMLVersion",
    "nvmlSystemGetCudaDriverVersion_v2",
    "nvmlDeviceGetCount",
)
_CARD = (
    *(
        "nvmlDeviceGetName",
        "nvmlDeviceGetUUID",
        "nvmlDeviceGetPciInfo",
        "nvmlDeviceGetMinorNumber",
        "nvmlDeviceGetBrand",
    ),
    *("nvmlDeviceGetArchitecture", "nvmlDeviceGetCudaComputeCapability", "nvmlDeviceGetMemoryInfo"),
    *("nvmlDeviceGetBAR1MemoryInfo", "nvmlDeviceGetMigMode", "nvmlDeviceGetMaxMigDeviceCount"),
    *("nvmlDeviceGetComputeMode", "nvmlDeviceGetPersistenceMode", "nvmlDeviceGetVirtualizationMode"),
    *("nvmlDeviceGetAttributes_v2", "nvmlDeviceGetNumGpuCores", "nvmlDeviceGetAddressingMode"),
    *("nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetMPSComputeRunningProcesses"),
    *("nvmlDeviceGetGraphicsRunningProcesses", "nvmlDeviceGetSupportedEventTypes", "nvmlDeviceGetRemappedRows"),
)
# MIG: resetless switch, and other fields that our driver reads (nvml.h, NVML_FI_*).
_FIELDS = (184, 193, 226, 227, 230)
_R615 = ("nvmlDeviceGetMemoryLimits_v1", "nvmlDeviceGetMemoryLimits")  # a container's memory limit, from driver 615 on


def run(machine: Machine, results: Results) -> None:
    import pynvml
    from gpuslice.errors import DeviceError
    from gpuslice.nvml import library

    try:
        library.start(machine.driver_root)
    except DeviceError as e:
        results.leave_out("NVML answers", str(e))
        return
    answers: dict[str, Any] = {name: _ask(getattr(pynvml, name)) for name in _SYSTEM}
    for index in range(pynvml.nvmlDeviceGetCount()):
        card = pynvml.nvmlDeviceGetHandleByIndex(index)
        answers |= {f"{index}.{key}": value for key, value in _card(pynvml, card)}
    (machine.out / FILE).write_text(json.dumps(answers, indent=1), encoding="utf-8")
    refused = sorted(key for key, value in answers.items() if isinstance(value, dict) and "error" in value)
    raised = {key: value for key, value in answers.items() if isinstance(value, dict) and "raised" in value}
    results.check("NVML answers", True, f"{len(answers)} answers, {len(refused)} refused: {' '.join(refused)}")
    results.check("pynvml raises nothing but NVML's errors", not raised, raised)
    pynvml.nvmlShutdown()


def _card(pynvml: Any, card: object) -> Iterator[tuple[str, object]]:
    for name in _CARD:
        if hasattr(pynvml, name):
            yield name, _ask(getattr(pynvml, name), card)
    yield "memory_v2", _ask(lambda: pynvml.nvmlDeviceGetMemoryInfo(card, version=pynvml.nvmlMemory_v2))
    yield "fields", _ask(lambda: [_field(value) for value in pynvml.nvmlDeviceGetFieldValues(card, list(_FIELDS))])
    for enum in range(max(0x20, pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT)):
        info = _ask(pynvml.nvmlDeviceGetGpuInstanceProfileInfoV, card, enum)
        if isinstance(info, dict) and "id" in info:
            yield f"profile.{enum}", info
            yield f"remaining.{enum}", _ask(pynvml.nvmlDeviceGetGpuInstanceRemainingCapacity, card, info["id"])
            yield f"placements.{enum}", _ask(_placements, pynvml, card, info["id"])
    for name in _R615:
        yield f"has.{name}", hasattr(pynvml, name)


def _placements(pynvml: Any, card: object, profile: int) -> list[tuple[int, int]]:
    room = pynvml.c_uint(32)
    array = (pynvml.c_nvmlGpuInstancePlacement_t * room.value)()
    call = pynvml._nvmlGetFunctionPointer("nvmlDeviceGetGpuInstancePossiblePlacements_v2")
    pynvml._nvmlCheckReturn(call(card, pynvml.c_uint(profile), array, pynvml.byref(room)))
    return [(one.start, one.size) for one in array[: room.value]]


def _field(value: Any) -> tuple[int, int, int]:
    return value.fieldId, value.nvmlReturn, value.value.ullVal


def _ask(call: Callable[..., object], *arguments: object) -> object:
    import pynvml

    try:
        return _plain(call(*arguments))
    except pynvml.NVMLError as e:
        return {"error": e.value, "text": str(e)}
    except Exception as e:  # noqa: BLE001  pynvml raises other errors than its own, too
        return {"raised": repr(e)}


def _plain(value: Any) -> object:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if hasattr(value, "_fields_"):
        return {name: _plain(getattr(value, name)) for name, *_ in value._fields_}
    if isinstance(value, int | float | str | bool | None):
        return value
    try:
        return [_plain(one) for one in value]
    except TypeError:
        return str(value)
