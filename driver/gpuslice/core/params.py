"""Opaque config: strict parser of `SliceConfig`, and the order in which several configs apply.

The device decides the mode; the config only tunes it. An unknown key, a wrong value or a setting without effect is an
error that names the field and the remedy. Class configs apply first. Claim configs override them field by field (KEP-4381).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import fields, replace
from typing import assert_never

from gpuslice.core.model import (
    API_VERSION,
    INTERVALS,
    Exclusive,
    Monitor,
    Mps,
    Offer,
    Setting,
    Settings,
    TimeSlicing,
    WholeGpu,
)
from gpuslice.errors import ClaimError

KIND = "SliceConfig"
_LONGEST = 200  # characters of what a user wrote, in a sentence of ours
_ENFORCEMENT = ("required", "preferred")


def parse(parameters: object, where: str) -> Settings:
    """Parse one `SliceConfig`. `where` is its place in the claim, for the error."""
    if not isinstance(parameters, Mapping):
        raise ClaimError(f"{where} must be an object of kind {KIND} ({API_VERSION}), not {type(parameters).__name__}")
    body = dict(parameters)
    if (body.pop("apiVersion", None), body.pop("kind", None)) != (API_VERSION, KIND):
        raise ClaimError(f"{where} must have apiVersion: {API_VERSION} and kind: {KIND}")
    enforcement = _one_of(body.pop("enforcement", None), f"{where}.enforcement", _ENFORCEMENT)
    interval = _interval(body.pop("timeSlicing", None), f"{where}.timeSlicing")
    _nothing_left(body, where, "apiVersion, kind, enforcement, timeSlicing")
    return Settings(enforcement, interval)


def merge(layers: Iterable[Settings]) -> Settings:
    """Later layers override earlier ones, field by field."""
    merged = Settings()
    for layer in layers:
        given = {f.name: getattr(layer, f.name) for f in fields(layer) if getattr(layer, f.name) is not None}
        merged = replace(merged, **given)
    return merged


def check(settings: Settings, offer: Offer, device: object, kept: Set[Setting] = frozenset()) -> None:
    """Refuse a setting without effect on this device, a setting that the policy keeps, and a demand that the device cannot
    meet."""
    match offer.sharing:
        case Exclusive():  # an exclusive card or partition: the hardware enforces the limit, so it meets every demand
            if settings.interval is not None and not isinstance(offer.slice_, WholeGpu):
                raise ClaimError(f"timeSlicing.interval has no effect on partition {device}; remove the setting")
            if settings.interval not in (None, "default") and Setting.TIME_SLICE in kept:
                raise ClaimError(
                    f"{device} cannot have the time-slice interval {settings.interval!r}, because this node's policy keeps "
                    "that of the card (keep: [timeSlice]); ask for 'default', or remove the setting"
                )
        case TimeSlicing() | Mps():
            if settings.interval is not None:
                raise ClaimError(
                    f"timeSlicing.interval cannot be set for {device}, whose card other claims share: the node's policy "
                    "fixes it; remove the setting, or select by the attribute timeSliceInterval"
                )
            if settings.enforcement == "required":
                raise ClaimError(
                    f"enforcement: required asks for a memory limit by hardware, which {device} does not have; ask for a MIG "
                    "partition or a whole card, or write enforcement: preferred"
                )
        case Monitor():
            if settings != Settings():
                raise ClaimError(
                    f"opaque config has no effect on {device}, because admin access only shows its GPU and limits nothing; "
                    "remove the config, or the adminAccess"
                )
        case _:
            assert_never(offer.sharing)


def _interval(body: object, where: str) -> str | None:
    if body is None:
        return None
    if not isinstance(body, Mapping):
        raise ClaimError(f"{where} must be an object with the key interval, not {type(body).__name__}")
    rest = dict(body)
    interval = _one_of(rest.pop("interval", None), f"{where}.interval", INTERVALS)
    _nothing_left(rest, where, "interval")
    if interval is None:
        raise ClaimError(
            f"{where} has no interval, so it has no effect; write one of {', '.join(INTERVALS)}, or remove it"
        )
    return interval


def _one_of(value: object, where: str, known: tuple[str, ...]) -> str | None:
    if value is None:
        return None
    if value not in known:
        raise ClaimError(f"{where} is {_shown(value)} and must be one of: {', '.join(known)}")
    return str(value)


def _nothing_left(body: Mapping[object, object], where: str, known: str) -> None:
    if body:
        keys = ", ".join(sorted(map(str, body)))
        raise ClaimError(f"{where} has the unknown key {keys[:_LONGEST]}; known keys: {known}")


def _shown(value: object) -> str:
    """A plain value as the user wrote it. For a nested value, only its type, because it may be thousands of levels deep."""
    return repr(value)[:_LONGEST] if isinstance(value, str | int | float) else f"of type {type(value).__name__}"
