"""Attributes and capacities of devices: what they mean, and how a selector uses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gpuslice.config import DRIVER_NAME

from hack.lib.docs import devices
from hack.lib.docs.devices import NOWHERE, Body
from hack.lib.docs.text import code, paired, table

_OURS = f"device.attributes['{DRIVER_NAME}']"
_STANDARD = "device.attributes['resource.kubernetes.io']"
_CAPACITY = f"device.capacity['{DRIVER_NAME}']"
_NOT_SHARED = {"default": "0", "validValues": ["0"]}


class AttributeText(NamedTuple):
    meaning: str
    example: str  # a CEL expression
    unit: str = ""


ATTRIBUTES = {
    "architecture": AttributeText(
        "NVIDIA's name of the card's generation", f"{_OURS}.architecture in ['Hopper', 'Blackwell']"
    ),
    "cudaComputeCapability": AttributeText(
        "compute capability of the card", f"{_OURS}.cudaComputeCapability.compareTo(semver('9.0.0')) >= 0"
    ),
    "cudaDriverVersion": AttributeText(
        "newest CUDA version that the NVIDIA driver supports",
        f"{_OURS}.cudaDriverVersion.isGreaterThan(semver('12.8.0'))",
    ),
    "driverVersion": AttributeText(
        "version of the NVIDIA driver; leading zeros are dropped, because the API refuses them",
        f"{_OURS}.driverVersion.isLessThan(semver('580.0.0'))",
    ),
    "index": AttributeText("NVML's index of the card on its node, as `nvidia-smi -L` shows it", f"{_OURS}.index == 0"),
    "memoryEnforcement": AttributeText(
        "what enforces the memory limit of a claim: `hardware`, `mps` or `none`",
        f"{_OURS}.memoryEnforcement == 'hardware'",
    ),
    "parentUUID": AttributeText(
        "UUID of the card of the device; a whole card has its own UUID. In `matchAttribute` and `distinctAttribute` "
        "it means: the same card, different cards",
        f"{_OURS}.parentUUID == '{NOWHERE}'",
    ),
    "productName": AttributeText(
        "product name, as `nvidia-smi -L` shows it", f"{_OURS}.productName.startsWith('NVIDIA H100')"
    ),
    "profile": AttributeText("MIG profile of the partition", f"{_OURS}.profile == '1g.10gb'"),
    "timeSliceInterval": AttributeText(
        "the time-slicing interval that the policy sets for the card", f"{_OURS}.timeSliceInterval == 'long'"
    ),
    "type": AttributeText("the kind of device: see above", f"{_OURS}.type == 'mig'"),
    "uuid": AttributeText(
        "NVML's UUID of the card; a partition has one only while it exists", f"{_OURS}.uuid == '{NOWHERE}'"
    ),
    "resource.kubernetes.io/pciBusID": AttributeText(
        "place of the card on the PCI bus", f"{_STANDARD}.pciBusID == '0000:0a:00.0'"
    ),
    "resource.kubernetes.io/pcieRoot": AttributeText(
        "PCIe root of the card, for `matchAttribute` with a network card",
        f"'pcieRoot' in {_STANDARD} && {_STANDARD}.pcieRoot == 'pci0000:08'",
    ),
    "resource.kubernetes.io/numaNode": AttributeText(
        "NUMA node of the card", f"'numaNode' in {_STANDARD} && {_STANDARD}.numaNode == 0"
    ),
}

CAPACITIES = {
    "memory": AttributeText(
        "memory of a card without its reserve, or of a partition; of a shared device, what all shares have together",
        f"{_CAPACITY}.memory.compareTo(quantity('40Gi')) >= 0",
        "bytes",
    ),
    "clients": AttributeText(
        "CUDA contexts that the MPS daemon can serve", f"{_CAPACITY}.clients.compareTo(quantity('24')) >= 0", "count"
    ),
    "copyEngines": AttributeText("copy engines", f"{_CAPACITY}.copyEngines.compareTo(quantity('2')) >= 0", "count"),
    "decoders": AttributeText("video decoders (NVDEC)", f"{_CAPACITY}.decoders.compareTo(quantity('1')) >= 0", "count"),
    "encoders": AttributeText("video encoders (NVENC)", f"{_CAPACITY}.encoders.compareTo(quantity('1')) >= 0", "count"),
    "jpegEngines": AttributeText("JPEG engines", f"{_CAPACITY}.jpegEngines.compareTo(quantity('1')) >= 0", "count"),
    "multiprocessors": AttributeText(
        "multiprocessors (SMs)", f"{_CAPACITY}.multiprocessors.compareTo(quantity('60')) >= 0", "count"
    ),
    "ofaEngines": AttributeText(
        "optical flow engines", f"{_CAPACITY}.ofaEngines.compareTo(quantity('1')) >= 0", "count"
    ),
    "shares": AttributeText(
        "time-slicing shares of the device", f"{_CAPACITY}.shares.compareTo(quantity('2')) >= 0", "count"
    ),
    "smPercent": AttributeText(
        "part of the card's multiprocessors; of an MPS device, the most that all shares can have together",
        f"{_CAPACITY}.smPercent.compareTo(quantity('25')) >= 0",
        "percent",
    ),
}


def attributes() -> str:
    found = devices.published()
    names = sorted({name for device in found for name in device["attributes"]}, key=lambda name: ("/" in name, name))
    rows = []
    for name, word in paired("attributes", names, ATTRIBUTES):
        (kind,) = {kind for device in found for kind in device["attributes"].get(name, ())}
        rows.append([code(name), kind, _attribute_holders(name), word.meaning])
    return table(["attribute", "type", "has a value on", "meaning"], rows)


def capacities() -> str:
    found = devices.published()
    names = sorted({name for device in found for name in device["capacity"]}, key=lambda name: (name != "memory", name))
    rows = []
    for name, word in paired("capacities", names, CAPACITIES):
        holders = devices.types(device for device in found if device["capacity"][name]["value"] != "0")
        rows.append([code(name), word.unit, holders, _shares(name), word.meaning])
    return table(["capacity", "unit", "more than 0 on", "asked of a share of", "meaning"], rows)


def attributes_in_cel() -> str:
    return _lines(ATTRIBUTES)


def capacities_in_cel() -> str:
    return _lines(CAPACITIES)


def _lines(words: Mapping[str, AttributeText]) -> str:
    """One expression per line, in the order of the table."""
    names = sorted(words, key=lambda name: ("/" in name, name != "memory", name))
    return "```cel\n" + "".join(f"{words[name].example}\n" for name in names) + "```\n"


def _attribute_holders(name: str) -> str:
    found = devices.published()
    mine = [device for device in found if any(value != "" for value in device["attributes"].get(name, {}).values())]
    missing = any(name not in device["attributes"] for device in found)
    return devices.types(mine) + (", if the machine reports it" if missing else "")


def _shares(name: str) -> str:
    """The shared devices of which a claim can ask for a part of this capacity."""
    return devices.types(device for device in devices.published() if _divided(device, name)).replace("none", "–")


def _divided(device: Body, name: str) -> bool:
    return bool(device["capacity"][name].get("requestPolicy", _NOT_SHARED) != _NOT_SHARED)


def examples() -> Iterator[tuple[str, str]]:
    """(name, CEL expression) of every attribute and capacity."""
    yield from ((name, word.example) for name, word in (*ATTRIBUTES.items(), *CAPACITIES.items()))
