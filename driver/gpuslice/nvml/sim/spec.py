"""The description of a simulated node: `h100x8`, `a100-40gx2:mig+l4`, or a YAML file.

node  = card *("+" card)
card  = product ["x" count] [":mig"]      ":mig": MIG mode is on from the start

file    driverVersion: "580.65.06"        optional
        cudaVersion: "13.0"               optional
        gpus:
        - {product: h100, count: 4, mig: true, numaNode: 1}
        products: {my-card: {…}}          optional: an entry as in models.json
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from gpuslice.errors import ConfigError
from gpuslice.nvml.sim.models import Product, product
from gpuslice.system import documents

MAX_CARDS = 16
_CARD = re.compile(r"(?P<product>[a-z0-9][a-z0-9-]*?)(?:x(?P<count>[0-9]{1,3}))?(?P<mig>:mig)?")
_DRIVER, _CUDA = "580.65.06", "13.0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    product: str
    mig: bool = False
    numa_node: int | None = None  # None: the first half of the cards on node 0, the rest on node 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """The description of a node. Compared by value, so that a folder can detect a request for another node."""

    cards: tuple[Card, ...]
    driver_version: str = _DRIVER
    cuda_version: str = _CUDA
    products: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    def models(self) -> tuple[Product, ...]:
        """The product of each card, in index order."""
        return tuple(product(card.product, self.products) for card in self.cards)

    def json(self) -> dict[str, object]:
        """The same node as the content of a node file, one entry for each card."""
        gpus = [{"product": c.product, "mig": c.mig, "numaNode": c.numa_node} for c in self.cards]
        return {
            "driverVersion": self.driver_version,
            "cudaVersion": self.cuda_version,
            "gpus": gpus,
            "products": dict(self.products),
        }


def parse(node: str | Path) -> NodeSpec:
    """A node from the grammar above or from a file. ConfigError names the mistake."""
    text = str(node)
    if isinstance(node, Path) or "/" in text or text.endswith((".yaml", ".yml", ".json")):
        return from_body(text, documents.read(Path(node), "node file", "docs/simulator.md"))
    return _checked(text, NodeSpec(cards=tuple(card for part in text.split("+") for card in _cards(text, part))))


def from_body(where: str, body: object) -> NodeSpec:
    """A node from the content of a node file."""
    top = _mapping(where, body, ("driverVersion", "cudaVersion", "gpus", "products"))
    entries = top.get("gpus")
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{where} has no list gpus; name at least one card, as in: gpus: [{{product: h100}}]")
    cards = [card for at, entry in enumerate(entries) for card in _entry(f"{where}: gpus[{at}]", entry)]
    products = cast(
        "Mapping[str, Mapping[str, object]]", _mapping(f"{where}: products", top.get("products") or {}, None)
    )
    spec = NodeSpec(
        cards=tuple(cards),
        driver_version=str(top.get("driverVersion") or _DRIVER),
        cuda_version=str(top.get("cudaVersion") or _CUDA),
        products=products,
    )
    return _checked(where, spec)


def _checked(where: str, spec: NodeSpec) -> NodeSpec:
    if len(spec.cards) > MAX_CARDS:
        raise ConfigError(
            f"{where} has {len(spec.cards)} cards, more than the {MAX_CARDS} of the largest node; use fewer"
        )
    for card, model in zip(spec.cards, spec.models(), strict=True):
        if card.mig and not model.profiles:
            raise ConfigError(f"{where} wants MIG mode on {card.product}, which has no MIG; leave mig out there")
    return spec


def _cards(text: str, part: str) -> list[Card]:
    match = _CARD.fullmatch(part)
    if match is None and _CARD.fullmatch(part.lower()):
        raise ConfigError(f"{part!r} has capital letters, but names of products have none; write {text.lower()}")
    count = int(match["count"] or 1) if match else 0
    if match is None or not 0 < count <= MAX_CARDS:
        place = "" if part == text else f" in {text!r}"
        raise ConfigError(
            f"{part!r}{place} is not a card; write a product, x and a count from 1 to {MAX_CARDS}, as in h100x8, and + "
            "between several"
        )
    return [Card(product=match["product"], mig=match["mig"] is not None)] * count


def _entry(where: str, entry: object) -> list[Card]:
    body = _mapping(where, entry, ("product", "count", "mig", "numaNode"))
    key, count, mig, numa = body.get("product"), body.get("count", 1), body.get("mig", False), body.get("numaNode")
    if not isinstance(key, str):
        raise ConfigError(f"{where} names no product; give one, as in product: h100")
    if type(count) is not int or not 0 < count <= MAX_CARDS:
        raise ConfigError(f"{where}: count is {count!r} and must be a number from 1 to {MAX_CARDS}")
    if not isinstance(mig, bool):
        raise ConfigError(f"{where}: mig is {mig!r} and must be true or false")
    if numa is not None and type(numa) is not int:
        raise ConfigError(f"{where}: numaNode is {numa!r} and must be a number")
    return [Card(product=key, mig=mig, numa_node=numa)] * count


def _mapping(where: str, body: object, known: tuple[str, ...] | None) -> Mapping[str, object]:
    if not isinstance(body, dict):
        raise ConfigError(f"{where} is not a mapping of keys to values; see docs/simulator.md")
    if known and (unknown := sorted(str(key) for key in body if key not in known)):
        raise ConfigError(f"{where} has unknown keys {', '.join(unknown)}; known are {', '.join(known)}")
    return body
