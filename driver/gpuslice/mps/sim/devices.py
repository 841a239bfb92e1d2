"""The devices of the simulated node that a daemon sees: CUDA_VISIBLE_DEVICES compared with nvml/sim/state.py's files.

This module reads the files itself, because the daemon starts without installed packages such as YAML.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from gpuslice.core import journal


class VisibleError(Exception):
    """CUDA_VISIBLE_DEVICES names a device that does not exist. The text is the last message of the daemon."""


def visible(node: Path, names: str | None) -> tuple[str, ...]:
    """UUIDs of the devices, in the order of their names; without names, all cards that are not partitioned."""
    try:
        body = json.loads((node / "node.json").read_text(encoding="utf-8"))
        count, seed = len(body["node"]["gpus"]), uuid.UUID(body["seed"])
        states = [json.loads(journal.last((node / f"gpu{index}.json").read_bytes())) for index in range(count)]
    except (OSError, ValueError, LookupError) as e:
        raise VisibleError(f"No simulated node in {node}: {e}") from e
    cards = [f"GPU-{uuid.uuid5(seed, str(index))}" for index in range(count)]
    if names is None:
        return tuple(card for card, state in zip(cards, states, strict=True) if not state["mig"])
    return tuple(_named(name.strip(), cards, states) for name in names.split(","))


def _named(name: str, cards: list[str], states: list[dict[str, Any]]) -> str:
    there = {card: state for card, state in zip(cards, states, strict=True) if not state["mig"] and not state["lost"]}
    partitions = [p["uuid"] for state in states if not state["lost"] for p in state["partitions"] if p["uuid"]]
    if name.isdigit() and int(name) < len(cards) and cards[int(name)] in there:
        return cards[int(name)]
    if name in there or name in partitions:
        return name
    raise VisibleError(f"No CUDA-capable device is detected: {name} is no usable card or partition here")
