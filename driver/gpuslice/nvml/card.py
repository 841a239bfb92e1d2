"""Reads the facts of one card while the driver lists the cards.

A card needs an identity: a handle, a UUID and a place on the bus. Everything else is a fact that some cards or some NVIDIA
drivers do not report. If a fact is unknown, the card loses the offers that need the fact, but never its place in the list.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import pynvml

from gpuslice.core.model import Gpu, GpuUuid, MigProfile
from gpuslice.errors import DeviceError
from gpuslice.nvml import mig
from gpuslice.nvml.api import Code
from gpuslice.nvml.library import asking
from gpuslice.nvml.mig import Handle, tolerating

_ARCHITECTURES = {
    pynvml.NVML_DEVICE_ARCH_MAXWELL: "Maxwell",
    pynvml.NVML_DEVICE_ARCH_PASCAL: "Pascal",
    pynvml.NVML_DEVICE_ARCH_VOLTA: "Volta",
    pynvml.NVML_DEVICE_ARCH_TURING: "Turing",
    pynvml.NVML_DEVICE_ARCH_AMPERE: "Ampere",
    pynvml.NVML_DEVICE_ARCH_ADA: "Ada",
    pynvml.NVML_DEVICE_ARCH_HOPPER: "Hopper",
    pynvml.NVML_DEVICE_ARCH_BLACKWELL: "Blackwell",
}
_BUS_ID = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_NOWHERE = "0000:00:00.0"  # the text of a bus id of zeros; at this place a machine has its host bridge
_UNKNOWN_TEXT = "unknown"
_GONE = (Code.UNINITIALIZED, Code.GPU_IS_LOST)  # not a missing fact: the whole card is unreachable
_Profiles = tuple[tuple[MigProfile, ...], tuple[str, ...]]  # the profiles, and a clause for each odd answer
Fact = TypeVar("Fact")


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """Versions of the NVIDIA driver; "" if it does not report them."""

    driver: str = ""
    cuda: str = ""


@dataclass(frozen=True, slots=True)
class CardFacts:
    gpu: Gpu
    label: str
    notes: tuple[str, ...]  # one sentence for each fact that is missing or assumed


class _Asker:
    """Asks for facts of one thing, and notes the missing ones."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.notes: list[str] = []

    def fact(self, what: str, default: Fact, ask: Callable[[], Fact]) -> Fact:
        try:
            with asking(self.label, f"read its {what}"):
                return ask()
        except DeviceError as e:
            if e.code in _GONE:
                raise
            self.notes.append(f"{e}; it counts as unknown")
            return default


def versions() -> tuple[Versions, tuple[str, ...]]:
    """The versions of the NVIDIA driver, and a note for each missing one."""
    node = _Asker("this node")
    cuda = node.fact("CUDA version", 0, lambda: int(pynvml.nvmlSystemGetCudaDriverVersion_v2()))
    driver = node.fact("NVIDIA driver version", "", lambda: str(pynvml.nvmlSystemGetDriverVersion()))
    return Versions(driver=driver, cuda=f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda > 0 else ""), tuple(node.notes)


def read(index: int, of: Versions) -> tuple[CardFacts, Handle]:
    """The card of this index. DeviceError if it has no identity, or is lost."""
    with asking(f"GPU {index}", "read it"):
        device = pynvml.nvmlDeviceGetHandleByIndex(index)
    with asking(f"GPU {index}", "read its UUID"):
        uuid = GpuUuid(pynvml.nvmlDeviceGetUUID(device))
    if not uuid:
        raise DeviceError(f"GPU {index} has no UUID, so no call can name it; update the NVIDIA driver", Code.UNKNOWN)
    with asking(f"GPU {index}", "read its place on the bus"):
        bus_id = _bus_id(pynvml.nvmlDeviceGetPciInfo(device))
    card = _Asker(f"GPU {index} ({bus_id})")
    return CardFacts(_described(card, device, index, uuid, bus_id, of), card.label, tuple(card.notes)), device


def _described(card: _Asker, device: Handle, index: int, uuid: GpuUuid, bus_id: str, of: Versions) -> Gpu:
    total, reserved, _ = card.fact("memory", (0, 0, 0), lambda: memory(device))
    if not total:
        card.notes.append(f"{card.label} does not report its memory, so it counts as 0")
    architecture = card.fact("architecture", 0, lambda: int(pynvml.nvmlDeviceGetArchitecture(device)))
    return Gpu(
        uuid=uuid,
        index=index,
        bus_id=bus_id,
        product=card.fact("name", "", lambda: str(pynvml.nvmlDeviceGetName(device))) or _UNKNOWN_TEXT,
        architecture=_ARCHITECTURES.get(architecture, f"architecture {architecture}")
        if architecture
        else _UNKNOWN_TEXT,
        compute_capability=card.fact("compute capability", "", lambda: _capability(device)),
        memory_bytes=total,
        reserved_bytes=min(reserved, total),
        driver_version=of.driver,
        cuda_version=of.cuda,
        profiles=_profiles(card, device, of),
        resetless=card.fact(
            "way to switch MIG mode", _is_hopper(architecture), lambda: _resetless(device, architecture)
        ),
    )


def _profiles(card: _Asker, device: Handle, of: Versions) -> tuple[MigProfile, ...]:
    if card.fact("MIG mode", None, lambda: mig.mode(device)) is None:
        return ()
    nothing: _Profiles = (), ()
    found, odd = card.fact("MIG profiles", nothing, lambda: _listed(device))
    card.notes += [f"{card.label}: {clause}" for clause in odd]
    if not found:
        card.notes.append(
            f"{card.label} lists no MIG profiles with NVIDIA driver {of.driver}: "
            f"update that driver, run as root, or switch MIG mode on"
        )
    return found


def _listed(device: Handle) -> _Profiles:
    with tolerating(Code.FUNCTION_NOT_FOUND, Code.NO_PERMISSION):
        return mig.profiles(device)
    return (), ()


def memory(device: Handle) -> tuple[int, int, int]:
    """(total, reserved, used) in bytes; zeros if NVML does not report them."""
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(device, version=pynvml.nvmlMemory_v2)
        return info.total, info.reserved, info.used
    except pynvml.NVMLError as e:
        if e.value in _GONE:
            raise
    with tolerating(Code.NOT_SUPPORTED):
        info = pynvml.nvmlDeviceGetMemoryInfo(device)
        return info.total, 0, info.used
    return 0, 0, 0  # unified memory (GB10): the card has none of its own


def _capability(device: Handle) -> str:
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(device)
    return f"{major}.{minor}"


def _resetless(device: Handle, architecture: int) -> bool:
    """Field 184. If a driver does not fill it, the architecture decides, because the feature began with Hopper."""
    with tolerating(Code.NOT_SUPPORTED, Code.FUNCTION_NOT_FOUND, Code.INVALID_ARGUMENT):
        (field,) = pynvml.nvmlDeviceGetFieldValues(device, [pynvml.NVML_FI_DEV_IS_RESETLESS_MIG_SUPPORTED])
        if field.nvmlReturn == Code.SUCCESS:
            return bool(field.value.uiVal)
    return _is_hopper(architecture)


def _is_hopper(architecture: int) -> bool:
    """Whether the architecture is Hopper or newer. An unknown newer one counts as the newest in this table."""
    return int(pynvml.NVML_DEVICE_ARCH_HOPPER) <= architecture < int(pynvml.NVML_DEVICE_ARCH_UNKNOWN)


def _bus_id(info: pynvml.nvmlPciInfo_t) -> str:
    """NVML's "00000000:3B:00.0" in the form of the kernel, "0000:3b:00.0". Made from its numbers if the text is unusable."""
    try:
        domain, _, rest = str(info.busId).lower().partition(":")
        text = f"{int(domain, 16):04x}:{rest}"
    except ValueError:
        text = f"{info.domain:04x}:{info.bus:02x}:{info.device:02x}.0"
    if _BUS_ID.fullmatch(text) is None or text == _NOWHERE:
        raise ValueError(f"PCI bus id {text!r}")
    return text
