"""The devices of the simulated node that a daemon sees: CUDA_VISIBLE_DEVICES compared with nvml/sim/state.py's files.

This module reads the files itself, because the daemon starts without installed packages such as YAML. It imports as little as
server.py says: no `pathlib`, `typing` or `uuid` either.
"""

from __future__ import annotations

import _json

from gpuslice.core import journal

try:
    from _sha1 import sha1  # type: ignore[import-not-found]  # OpenSSL, which hashlib loads, takes 3 ms
except ImportError:  # some distributions build Python without it
    from hashlib import sha1

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class VisibleError(Exception):
    """CUDA_VISIBLE_DEVICES names a device that does not exist. The text is the last message of the daemon."""


def visible(node: str, names: str | None) -> tuple[str, ...]:
    """UUIDs of the devices, in the order of their names; without names, all cards that are not partitioned."""
    try:
        return _visible(node, names)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise VisibleError(f"No simulated node in {node}: {e!r}") from e


def _visible(node: str, names: str | None) -> tuple[str, ...]:
    body = _parse(_read(f"{node}/node.json"))
    count, seed = len(body["node"]["gpus"]), bytes.fromhex(body["seed"].replace("-", ""))
    states = [_parse(journal.last(_read(f"{node}/gpu{index}.json"))) for index in range(count)]
    cards = [f"GPU-{_uuid5(seed, str(index))}" for index in range(count)]
    if names is None:
        return tuple(card for card, state in zip(cards, states, strict=True) if not state["mig"])
    return tuple(_named(name.strip(), cards, states) for name in names.split(","))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class _Rules:
    """What `json.loads` tells the scanner."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None  # the last one since Python 3.15
    parse_float, parse_int, parse_constant = float, int, float


def _parse(data: bytes) -> dict[str, Any]:
    text = data.decode().strip(" \t\r\n")
    try:
        body, end = _json.make_scanner(_Rules)(text, 0)  # type: ignore[arg-type]  # any object with these names
    except StopIteration:
        raise ValueError("it is no JSON") from None
    if not isinstance(body, dict) or end != len(text):
        raise ValueError("it is not one object")
    return body


def _uuid5(namespace: bytes, name: str) -> str:
    """As `uuid.uuid5`."""
    data = bytearray(sha1(namespace + name.encode(), usedforsecurity=False).digest()[:16])
    data[6], data[8] = data[6] & 0x0F | 0x50, data[8] & 0x3F | 0x80
    text = data.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def _named(name: str, cards: list[str], states: list[dict[str, Any]]) -> str:
    there = {card: state for card, state in zip(cards, states, strict=True) if not state["mig"] and not state["lost"]}
    partitions = [p["uuid"] for state in states if not state["lost"] for p in state["partitions"] if p["uuid"]]
    if name.isdigit() and int(name) < len(cards) and cards[int(name)] in there:
        return cards[int(name)]
    if name in there or name in partitions:
        return name
    raise VisibleError(f"No CUDA-capable device is detected: {name} is no usable card or partition here")
