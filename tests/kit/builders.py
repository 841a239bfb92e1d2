"""Plain functions that make objects with sensible values. A test overrides the values that matter to it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from gpuslice.core.inventory import Inventory
from gpuslice.core.model import API_VERSION, MIB, Gpu, GpuUuid
from gpuslice.core.policy.reading import KIND
from gpuslice.core.policy.rules import Policy
from gpuslice.nvml.sim import models


@cache
def _card(product: str) -> Gpu:
    body = models.product(product)
    return Gpu(
        uuid=GpuUuid("GPU-00000000-0000-0000-0000-000000000000"),
        index=0,
        bus_id="0000:3b:00.0",
        product=body.name,
        architecture=body.architecture,
        compute_capability=body.compute_capability,
        memory_bytes=body.memory_mib * MIB,
        reserved_bytes=body.reserved_mib * MIB,
        driver_version="580.65.06",
        cuda_version="13.0",
        profiles=body.profiles,
        resetless=body.resetless,
        numa_node=0,
        pcie_root="pci0000:3a",
    )


def a_gpu(product: str = "h100", index: int = 0, **changes: Any) -> Gpu:
    """A card of this product as NVML would describe it. Each index has its own UUID and its own place on the bus."""
    own = {"uuid": GpuUuid(f"GPU-{index:08x}-0000-0000-0000-000000000000"), "bus_id": f"0000:{0x3B + index:02x}:00.0"}
    return replace(_card(product), index=index, **(own | changes))


def a_policy(**default: object) -> Policy:
    """A policy with these settings for every card, in the keys of the document."""
    return Policy.parse({"apiVersion": API_VERSION, "kind": KIND, "default": default})


def an_inventory(*gpus: Gpu, policy: Policy | None = None, node: str = "node-1", static: bool = False) -> Inventory:
    return Inventory.of(gpus or (a_gpu(),), policy or Policy.default(), node, static=static)
