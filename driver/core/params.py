"""Opaque config: strict parse of `SliceConfig`, and the order in which several of them count.

The device fixes the mode, config only tunes it. An unknown key, a wrong value or a setting that would have no effect is
an error which names the field and the remedy. Class configs count first, claim configs override them field by field
(KEP-4381).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import assert_never

from driver.core.model import Exclusive, Monitor, Offer, Settings
from driver.errors import ClaimError

API_VERSION = "gpuslice.dev/v1alpha1"
KIND = "SliceConfig"
_ENFORCEMENT = ("required", "preferred")


def parse(parameters: object, where: str) -> Settings:
    """One `SliceConfig`; `where` names its place in the claim for the error."""
    if not isinstance(parameters, Mapping):
        raise ClaimError(f"{where} must be an object of kind {KIND} ({API_VERSION}), not {type(parameters).__name__}")
    body = dict(parameters)
    if (body.pop("apiVersion", None), body.pop("kind", None)) != (API_VERSION, KIND):
        raise ClaimError(f"{where} must say apiVersion: {API_VERSION} and kind: {KIND}")
    enforcement = body.pop("enforcement", None)
    if enforcement is not None and enforcement not in _ENFORCEMENT:
        raise ClaimError(f"{where}.enforcement is {enforcement!r} and must be one of: {', '.join(_ENFORCEMENT)}")
    if body:
        unknown = ", ".join(sorted(map(str, body)))
        raise ClaimError(f"{where} has the unknown key {unknown}; known keys: apiVersion, kind, enforcement")
    return Settings(enforcement)


def merge(layers: Iterable[Settings]) -> Settings:
    """Later layers override earlier ones, field by field."""
    merged = Settings()
    for layer in layers:
        if layer.enforcement is not None:
            merged = replace(merged, enforcement=layer.enforcement)
    return merged


def check(settings: Settings, offer: Offer, device: object) -> None:
    """Refuse a setting that this device would ignore, and a demand that it cannot meet."""
    match offer.sharing:
        case Exclusive():  # a card or a partition of one's own: the hardware enforces it, whatever was demanded
            return
        case Monitor():
            if settings.enforcement is not None:
                raise ClaimError(
                    f"enforcement has no effect on {device}, which only watches its GPU; remove the setting"
                )
        case _:
            assert_never(offer.sharing)
