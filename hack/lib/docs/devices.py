"""Every device that the driver publishes: for all simulated products, all modes and both ways to plan a card."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from gpuslice.config import DRIVER_NAME
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import API_VERSION, Gpu, GpuUuid
from gpuslice.core.policy.reading import KIND
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import pool
from gpuslice.core.pools.pool import Features
from gpuslice.core.share import MODES
from gpuslice.nvml.sim import models
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.system.host import SimHost

Body = Mapping[str, Any]

ALL = Features(partitionable=True, consumable=True, taints=True)  # Kubernetes 1.36 and later
NOWHERE = GpuUuid("GPU-0db83714-25dc-5e03-a7b4-350736339ffe")  # the UUID in the examples
SUFFIXES = ["+me", "-me", "+gfx", "+me.all"]


@dataclass(frozen=True, slots=True)
class CardPlan:
    """One way to plan a card."""

    default: Mapping[str, object]  # of the policy
    static: bool = False


PLANS = (
    CardPlan({}),
    CardPlan({"modes": ["mig"], "suffixes": SUFFIXES, "sharedPartitions": ["mps", "timeslice"]}),
    CardPlan({"modes": ["mps", "timeslice"], "timeslice": {"interval": "long"}, "keep": ["computeMode"]}),
    CardPlan({}, static=True),
    CardPlan({"static": {"mps": 4}}, static=True),
    CardPlan({"static": {"timeslice": 4}}, static=True),
)


@cache
def published() -> tuple[Body, ...]:
    """The devices of the ResourceSlices."""
    return tuple(device for plan in PLANS for device in _devices(_cards(), plan))


def type_of(device: Body) -> str:
    """The kind of a device: one of `MODES`."""
    return str(device["attributes"]["type"]["string"])


def types(devices: Iterable[Body]) -> str:
    """The kinds of these devices, in the order of `MODES`, as a cell of a table."""
    found = {type_of(device) for device in devices}
    return "all" if found == set(MODES) else ", ".join(mode for mode in MODES if mode in found) or "none"


def a_card() -> Gpu:
    """A card that supports everything."""
    return next(card for card in _cards() if card.profiles and card.resetless)


@cache
def _cards() -> tuple[Gpu, ...]:
    """One card of each product as a node has it, and one card with an older driver on a machine that reports less."""
    with tempfile.TemporaryDirectory() as folder:
        cards = [card for key in models.known() for card in _of_product(Path(folder) / key, key)]
    bare = replace(cards[0], uuid=NOWHERE, index=1, bus_id="0000:0b:00.0", numa_node=None, pcie_root=None)
    return (*cards, replace(bare, driver_version="570.124.06", cuda_version="12.8"))


def _of_product(folder: Path, key: str) -> Iterator[Gpu]:
    nvml = SimNvml(folder, key, latency="zero")
    host = SimHost(folder)
    yield from (host.locate(gpu) for gpu in nvml.gpus())
    nvml.close()


def _devices(cards: Iterable[Gpu], plan: CardPlan) -> Iterator[Body]:
    policy = Policy.parse({"apiVersion": API_VERSION, "kind": KIND, "default": plan.default})
    for number, card in enumerate(cards):  # one node per card, because all have the same PCI address
        inventory = Inventory.of([card], policy, f"node-{number}", static=plan.static)
        for planned in pool.resource_slices(inventory, {}, driver=DRIVER_NAME, features=ALL):
            for spec in planned.specs:
                yield from spec.get("devices", ())
