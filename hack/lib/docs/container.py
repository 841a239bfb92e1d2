"""The environment of a container that has a claim. tests/docs compares it with the CDI files of every kind of device."""

from __future__ import annotations

from typing import NamedTuple

from gpuslice.core.share import MODES

from hack.lib.docs.text import code, table


class Variable(NamedTuple):
    types: tuple[str, ...]
    meaning: str
    unit: str = ""


_MPS, _SHARES = ("mps",), ("mps", "timeslice")
REQUEST = "GPUSLICE_<REQUEST>_"

VARIABLES = {
    f"{REQUEST}DEVICE": Variable(MODES, "the device, as `POOL/NAME`; the pool is `NODE/PCI-BUS-ID`"),
    f"{REQUEST}UUID": Variable(MODES, "NVML's UUID: `GPU-…` of a card, `MIG-…` of a partition"),
    f"{REQUEST}MEMORY_MIB": Variable(
        MODES, "the memory of the claim on this device; on a monitor device, of the card", "MiB"
    ),
    f"{REQUEST}MEMORY_ENFORCEMENT": Variable(MODES, "what enforces that limit: `hardware`, `mps` or `none`"),
    f"{REQUEST}SM_PERCENT": Variable(_MPS, "ceiling on multiprocessors; missing without a ceiling", "percent"),
    f"{REQUEST}PROFILE": Variable(("mig", *_SHARES), "MIG profile; on shares, only of a partition"),
    "NVIDIA_VISIBLE_DEVICES": Variable(MODES, "always `void`, so that NVIDIA's older hook adds no cards of its own"),
    "LD_LIBRARY_PATH": Variable(
        MODES, "folders of the NVIDIA driver's libraries; only if the node has no `nvidia-cdi-hook`"
    ),
    "CUDA_MPS_PIPE_DIRECTORY": Variable(_MPS, "folder in which CUDA finds the MPS daemon"),
    "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": Variable(_MPS, "the memory of the share, for CUDA: `0=20480M`", "MiB"),
    "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": Variable(_MPS, "the ceiling on multiprocessors, for CUDA", "percent"),
    "GPUSLICE_SIMULATED": Variable(MODES, "`true` on a simulated node; missing on real cards"),
}


def environment() -> str:
    rows = ([code(name), _types(word.types), word.unit, word.meaning] for name, word in VARIABLES.items())
    return table(["variable", "set for", "unit", "meaning"], rows)


def _types(types: tuple[str, ...]) -> str:
    return "all" if types == MODES else ", ".join(types)
