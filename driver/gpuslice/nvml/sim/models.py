"""The products of the simulator, from models.json: our own record of the figures in NVIDIA's MIG guide and listings.

Only the simulator reads it; for real cards everything comes from NVML. `inferred` names the values that are not from a
listing of the same product. A product with a missing value is refused, and the error names the missing value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import cast

from gpuslice.core.model import MigProfile, Placement
from gpuslice.errors import ConfigError
from gpuslice.nvml.api import suffix

_CARD_FIELDS = (
    "name",
    "architecture",
    "compute_capability",
    "memory_mib",
    "reserved_mib",
    "pci_device_id",
    "resetless",
)
_COUNTS = ("memory_mib", "compute_slices", "multiprocessors", "copy_engines", "decoders", "encoders", "jpegs", "ofas")
_PROFILE_FIELDS = ("name", "id", *_COUNTS, "max_instances", "starts", "size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One card with NVML's facts. `inferred` names the values that are not from a listing of this product."""

    key: str  # "h100"
    name: str  # nvmlDeviceGetName
    architecture: str
    compute_capability: str
    memory_mib: int
    reserved_mib: int
    pci_device_id: str  # "0x233010DE": device, then vendor
    resetless: bool  # MIG mode switches without a reset and is lost at reboot: Hopper and later
    profiles: tuple[MigProfile, ...]
    inferred: tuple[str, ...] = ()

    @property
    def memory_slices(self) -> int:
        """Memory slices of the card: the end of the last placement. Usually 8; 4 on an A30, 12 on an RTX PRO 6000."""
        return max((p.start + p.size for profile in self.profiles for p in profile.placements), default=0)

    @property
    def engines(self) -> dict[str, int]:
        """Engine totals of the card: the engines of its widest profile (`MigProfile.engines`)."""
        return max(self.profiles, key=lambda profile: profile.multiprocessors).engines() if self.profiles else {}


@cache
def catalogue() -> Mapping[str, Mapping[str, object]]:
    """The content of models.json, by product key. Pass an entry on to `product`."""
    text = resources.files("gpuslice.nvml.sim").joinpath("models.json").read_text(encoding="utf-8")
    return cast("Mapping[str, Mapping[str, object]]", json.loads(text)["products"])


def known() -> tuple[str, ...]:
    """Keys of the products that can be simulated."""
    return tuple(key for key, body in catalogue().items() if "missing" not in body)


def product(key: str, own: Mapping[str, Mapping[str, object]] | None = None) -> Product:
    """The product of this key, from `own` (a node file's section) or the catalogue.

    Raises ConfigError if the key is unknown or a value of the product is unknown.
    """
    body = _body(key, own or {})
    _check(f"product {key!r}", body, (*_CARD_FIELDS, "profiles"), ("inferred",))
    profiles = cast("list[Mapping[str, object]]", _list(f"product {key!r}", body, "profiles"))
    inferred = [*map(str, _list(f"product {key!r}", body, "inferred"))]
    for entry in profiles:
        where = f"a profile of product {key!r}"
        _check_mapping(where, entry)
        _check(where, entry, _PROFILE_FIELDS, ("inferred",))
        inferred += [f"{entry['name']}.{name}" for name in _list(where, entry, "inferred")]
    return Product(
        key=key,
        name=_text(key, body, "name"),
        architecture=_text(key, body, "architecture"),
        compute_capability=_text(key, body, "compute_capability"),
        memory_mib=_count(key, body, "memory_mib"),
        reserved_mib=_count(key, body, "reserved_mib"),
        pci_device_id=_text(key, body, "pci_device_id"),
        resetless=body["resetless"] is True,
        profiles=tuple(_profile(key, entry) for entry in profiles),
        inferred=tuple(inferred),
    )


def _body(key: str, own: Mapping[str, Mapping[str, object]]) -> Mapping[str, object]:
    """The entry of this product, complete or not."""
    body = own.get(key) or catalogue().get(key)
    if body is None:
        near = [other for other in known() if other.startswith(key.split("-")[0])] or list(known())
        raise ConfigError(
            f"product {key!r} is unknown; simulate one of {', '.join(near)}, or describe it in a node file"
        )
    _check_mapping(f"product {key!r}", body)
    if body.get("missing"):
        what = "; ".join(map(str, _list(f"product {key!r}", body, "missing")))
        raise ConfigError(f"{key} cannot be simulated, because its {what} is not published; describe it in a node file")
    return body


def _profile(key: str, body: Mapping[str, object]) -> MigProfile:
    name = _text(key, body, "name")
    counts = {field: _count(f"{key} {name}", body, field) for field in _COUNTS}
    size = _count(f"{key} {name}", body, "size")
    starts = _list(f"{key} {name}", body, "starts")
    if not all(type(start) is int and start >= 0 for start in starts):
        raise ConfigError(f"starts of {key} {name} is {starts!r} and must be a list of whole numbers")
    return MigProfile(
        id=_count(f"{key} {name}", body, "id"),
        name=name,
        suffix=suffix(name),
        max_instances=_count(f"{key} {name}", body, "max_instances"),
        placements=tuple(Placement(start, size) for start in cast("list[int]", starts)),
        **counts,
    )


def _check_mapping(where: str, body: object) -> None:
    if not isinstance(body, Mapping):
        raise ConfigError(f"{where} is {body!r} and must be a mapping, like an entry of models.json")


def _list(where: str, body: Mapping[str, object], field: str) -> list[object]:
    value = body.get(field, [])
    if not isinstance(value, list):
        raise ConfigError(f"{field} of {where} is {value!r} and must be a list")
    return value


def _check(where: str, body: Mapping[str, object], wanted: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if missing := [field for field in wanted if body.get(field) is None]:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; a simulated card needs every value")
    if unknown := sorted(str(name) for name in set(body) - set(wanted) - set(optional)):
        raise ConfigError(
            f"{where} has unknown fields {', '.join(unknown)}; known are {', '.join((*wanted, *optional))}"
        )


def _count(where: str, body: Mapping[str, object], field: str) -> int:
    value = body[field]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{field} of {where} is {value!r} and must be a whole number of at least 0")
    return value


def _text(where: str, body: Mapping[str, object], field: str) -> str:
    value = body[field]
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{field} of {where} is {value!r} and must be a text; quote it in YAML")
    return value
