"""`Gpu` ↔ JSON: the last known inventory. So a card that cannot be read now keeps its pool (and gets a taint)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from typing import Any

from gpuslice.core.model import Gpu, MigProfile, Placement


def encode(gpus: Sequence[Gpu]) -> list[dict[str, object]]:
    return [asdict(gpu) for gpu in gpus]


def decode(body: object) -> tuple[Gpu, ...]:
    """Cards that this or another version wrote. A card with a missing fact is left out, because it cannot be offered."""
    if not isinstance(body, list):
        return ()
    found = []
    for card in body:
        try:
            found.append(Gpu(**{**_known(Gpu, card), "profiles": tuple(map(_profile, card["profiles"]))}))
        except (TypeError, KeyError, AttributeError):  # the last: it is no object
            continue
    return tuple(found)


def _profile(body: dict[str, Any]) -> MigProfile:
    places: Iterable[dict[str, int]] = body["placements"]
    return MigProfile(
        **{**_known(MigProfile, body), "placements": tuple(Placement(p["start"], p["size"]) for p in places)}
    )


def _known(cls: type, body: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(cls)}
    return {name: value for name, value in body.items() if name in names}
