"""The DeviceClasses of deploy/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from gpuslice.config import DRIVER_NAME

from hack.lib.docs.text import code, paired, table

_FILE = Path(__file__).parents[3] / "deploy/deviceclasses.yaml"
_PROFILE = re.compile(r"mig-\d+g\.\d+gb")
_ANY = "mig-PROFILE"

MEANINGS = {
    "gpu": "a whole card",
    "mig": "a MIG partition; a selector or `capacity.requests` says which",
    "mps": "a share of a card or of a partition, at the same time as the other shares (MPS)",
    "timeslice": "a share of a card or of a partition, by time-slicing",
    "slice": "a part of a card: a partition, or a share of either kind",
    "monitor": "a view of a card that other claims may use; only with `adminAccess: true`",
    _ANY: "a partition with this profile; one class for each profile in `deviceClasses.migProfiles` of the chart",
}


def classes() -> str:
    with _FILE.open(encoding="utf-8") as file:
        bodies = [*yaml.safe_load_all(file)]
    rows = {_name(body["metadata"]["name"]): _row(body["spec"]) for body in bodies}
    return table(
        ["class", "gives", "extended resource", "selects"],
        ([code(f"{name}.{DRIVER_NAME}"), text, *rows[name]] for name, text in paired("classes", rows, MEANINGS)),
    )


def _name(full: str) -> str:
    return _PROFILE.sub(_ANY, full.removesuffix(f".{DRIVER_NAME}"))


def _row(spec: dict[str, Any]) -> list[str]:
    """The selector without its common beginning: that the device is ours."""
    (selector,) = spec["selectors"]
    ours = f"device.driver == '{DRIVER_NAME}' && "
    expression = str(selector["cel"]["expression"]).removeprefix(ours)
    short = expression.replace(f"device.attributes['{DRIVER_NAME}'].", "")
    resource = _PROFILE.sub(_ANY, spec.get("extendedResourceName", ""))
    return [code(resource), code(re.sub(r"'\d+g\.\d+gb'", "'PROFILE'", short))]
