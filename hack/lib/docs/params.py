"""`SliceConfig`: the effect of each setting on each kind of device, found by calling the code."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from gpuslice.core import params
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import API_VERSION, INTERVALS, Offer, Settings
from gpuslice.core.policy.rules import Policy
from gpuslice.core.share import MODES
from gpuslice.errors import ClaimError

from hack.lib.docs import devices
from hack.lib.docs.text import code, codes, paired, table


class SettingText(NamedTuple):
    path: str
    values: tuple[str, ...]
    meaning: str


KEYS = {
    "enforcement": SettingText(
        "enforcement",
        ("required", "preferred"),
        "`required`: the claim must have a memory limit that hardware enforces. `preferred`: the claim accepts any "
        "enforcement, even none. This is the default",
    ),
    "interval": SettingText(
        "timeSlicing.interval",
        INTERVALS,
        "how long each of the claim's own containers computes before the next one does. NVIDIA publishes no "
        "milliseconds",
    ),
}


def body(path: str, value: str) -> dict[str, object]:
    """A `SliceConfig` with this one setting."""
    first, _, rest = path.partition(".")
    return {"apiVersion": API_VERSION, "kind": params.KIND, first: {rest: value} if rest else value}


def keys() -> str:
    rows = []
    for _, key in paired("settings", (field.name for field in fields(Settings)), KEYS):
        for value in key.values:
            params.parse(body(key.path, value), "parameters")  # ClaimError: the page names a wrong value
        rows.append([code(key.path), codes(key.values), key.meaning])
    return table(["setting", "values", "meaning"], rows)


def devices_that_take() -> str:
    """Each setting and value, with the result on each kind of device."""
    offers = _offers()
    rows = []
    for key in KEYS.values():
        for value in key.values:
            settings = params.parse(body(key.path, value), "parameters")
            rows.append([code(f"{key.path}: {value}"), *(_answer(settings, offer) for offer in offers.values())])
    return table(["", *map(code, offers)], rows)


def _answer(settings: Settings, offer: Offer) -> str:
    try:
        params.check(settings, offer, "the device")
    except ClaimError:
        return "refused"
    return "yes"


def _offers() -> dict[str, Offer]:
    """One device of each kind, from a card that supports everything."""
    policy = Policy.parse({"apiVersion": API_VERSION, "kind": "Policy"})
    (pool,) = Inventory.of([devices.a_card()], policy, "node-1").pools
    found = {device.ref.device.partition("-")[0]: device.offer for device in pool.devices}
    return {mode: found[mode] for mode in MODES}
