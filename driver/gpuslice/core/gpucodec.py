"""`Gpu` ↔ JSON: the last known inventory. So a card that is unreadable now keeps its pool (and gets a taint)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import asdict

from gpuslice.core.model import Gpu, GpuUuid, MigProfile, Placement
from gpuslice.core.typed import Fields

_UUID = re.compile("GPU-[A-Za-z0-9-]{1,64}")
_BUS = re.compile("[0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2}[.][0-7]")
_BYTES = 2**50  # a pebibyte
_COUNT = 2**16
_SLICES = 64
_ENGINES = ("copy_engines", "decoders", "encoders", "jpegs", "ofas")


def encode(gpus: Sequence[Gpu]) -> list[dict[str, object]]:
    return [asdict(gpu) for gpu in gpus]


def decode(body: object) -> tuple[Gpu, ...]:
    """Cards that this or another version has written. A card without a fact, or with a fact of another type, is left out,
    because it cannot be offered."""
    if not isinstance(body, list):
        return ()
    found = []
    for card in body:
        with contextlib.suppress(ValueError):
            found.append(_gpu(Fields(card, "")))
    return tuple(found)


def _gpu(fields: Fields) -> Gpu:
    return Gpu(
        uuid=GpuUuid(_like(fields, "uuid", _UUID)),
        index=fields.number("index"),
        bus_id=_like(fields, "bus_id", _BUS),
        product=fields.optional_text("product", empty=True) or "",
        architecture=fields.optional_text("architecture", empty=True) or "",
        compute_capability=fields.optional_text("compute_capability", empty=True) or "",
        memory_bytes=fields.number("memory_bytes", 0, _BYTES),
        reserved_bytes=fields.optional_number("reserved_bytes", 0, _BYTES) or 0,
        driver_version=fields.optional_text("driver_version", empty=True) or "",
        cuda_version=fields.optional_text("cuda_version", empty=True) or "",
        profiles=tuple(map(_profile, fields.parts("profiles"))),
        resetless=fields.flag("resetless", False),
        numa_node=fields.optional_number("numa_node"),
        pcie_root=fields.optional_text("pcie_root"),
    )


def _like(fields: Fields, key: str, form: re.Pattern[str]) -> str:
    value = fields.text(key)
    if not form.fullmatch(value):
        fields.fail(f"has a {key} that does not have the form {form.pattern}")
    return value


def _profile(fields: Fields) -> MigProfile:
    return MigProfile(
        id=fields.number("id", 0, _COUNT),
        name=fields.text("name"),
        suffix=fields.optional_text("suffix", empty=True) or "",
        memory_mib=fields.number("memory_mib"),
        compute_slices=fields.number("compute_slices", 0, _COUNT),
        multiprocessors=fields.number("multiprocessors", 0, _COUNT),
        **{engine: fields.optional_number(engine, 0, _COUNT) or 0 for engine in _ENGINES},
        max_instances=fields.number("max_instances", 0, _SLICES),
        placements=tuple(
            Placement(place.number("start", 0, _SLICES), place.number("size", 1, _SLICES))
            for place in fields.parts("placements")
        ),
    )
