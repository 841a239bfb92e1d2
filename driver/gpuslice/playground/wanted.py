"""The claim of `gpuslice playground claim` as a request to the stand-in scheduler. Pure.

The scheduler has no CEL. So this module has the meaning of the selectors in deploy/deviceclasses.yaml. A test compares
both over all devices of a node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from gpuslice.core.json import ReadOnlyBody
from gpuslice.errors import ConfigError
from gpuslice.standin import resource_slices
from gpuslice.standin.scheduler import Request

DRIVER = "gpuslice.dev"
_MOST = 32  # devices of one claim (resource.k8s.io/v1)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TYPES: Mapping[str, tuple[str, ...]] = {
    "gpu": ("gpu",),
    "mig": ("mig",),
    "mps": ("mps",),
    "timeslice": ("timeslice",),
    "slice": ("mig", "mps", "timeslice"),
    "monitor": ("monitor",),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The typed texts, "" for a missing one. ConfigError from `request` says what is wrong with them."""

    device_class: str
    name: str = ""
    profile: str = ""
    memory: str = ""
    sm_percent: str = ""
    shares: str = ""
    count: int = 1

    @property
    def short(self) -> str:
        """The class without our domain: "mig", "mig-1g.10gb"."""
        return self.device_class.removesuffix(f".{DRIVER}")

    @property
    def words(self) -> str:
        """The claim in the words of a sentence: "class mig.gpuslice.dev, memory 9Gi"."""
        parts = {"profile": self.profile, "memory": self.memory, "smPercent": self.sm_percent, "shares": self.shares}
        count = f"{self.count} x " if self.count > 1 else ""
        return ", ".join(
            [f"{count}class {self.short}.{DRIVER}", *(f"{name} {text}" for name, text in parts.items() if text)]
        )

    def request(self) -> Request:
        if self.name and not _NAME.fullmatch(self.name):
            raise ConfigError(f"claim name {self.name!r} is not a DNS label; use lower-case letters, digits and -")
        if not 1 <= self.count <= _MOST:
            raise ConfigError(f"a claim has 1 to {_MOST} devices, not {self.count}; change --count")
        types, profile = _selected(self.short)
        capacity = {"memory": self.memory, "smPercent": self.sm_percent, "shares": self.shares}
        given = {name: text for name, text in capacity.items() if text}
        for name, text in given.items():
            value = resource_slices.amount(text)
            if value is None or value <= 0:
                raise ConfigError(
                    f"{name} {text!r} is not a Kubernetes quantity above 0; write 9Gi for memory, else 25"
                )
        profiles = {text for text in (profile, self.profile) if text}

        def where(device: ReadOnlyBody) -> bool:
            attributes = device["attributes"]
            mine = attributes["profile"]["string"]
            return attributes["type"]["string"] in types and all(mine == text for text in profiles)

        return Request(
            name="gpu", driver=DRIVER, where=where, count=self.count, capacity=given, admin=types == ("monitor",)
        )


def _selected(short: str) -> tuple[tuple[str, ...], str]:
    """The types of device that a class selects, and the profile ("" for any)."""
    if short in _TYPES:
        return _TYPES[short], ""
    kind, _, profile = short.partition("-")
    if kind == "mig" and profile:
        return ("mig",), profile
    known = ", ".join(f"{name}.{DRIVER}" for name in _TYPES)
    raise ConfigError(f"there is no DeviceClass {short!r}; use one of {known}, or mig-PROFILE.{DRIVER}")
