"""The step of the story that shows the published devices, and explains how to read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpuslice.demo.screen import say
from gpuslice.demo.stage import Stage


@dataclass(frozen=True, slots=True)
class ShownPool:
    name: str
    devices: str  # "7 x 1g.10gb, gpu, …"
    counters: Mapping[str, str]
    takers: Mapping[str, Mapping[str, int]]  # counter → kind of device → the smallest amount that such a device takes

    @property
    def lines(self) -> tuple[str, str]:
        amounts = ", ".join(f"{name}={value}" for name, value in self.counters.items())
        return f"devices   {self.devices}", f"counters  {amounts or 'none'}"


async def published(stage: Stage) -> None:
    slices = [body["spec"] for body in stage.cluster.api.all("resourceslices")]
    names = sorted({one["pool"]["name"] for one in slices})
    pools = [_pool(name, [one for one in slices if one["pool"]["name"] == name]) for name in names]
    alike: dict[tuple[str, str], list[ShownPool]] = {}
    for pool in pools:
        alike.setdefault(pool.lines, []).append(pool)
    for lines, (first, *more) in alike.items():
        say(f"pool {first.name}" + (f", and {len(more)} more like it" if more else ""))
        for line in lines:
            say(line, 4)
    print()
    for first, *_ in alike.values():
        for sentence in _explained(first):
            say(sentence)


def _pool(name: str, slices: Sequence[Mapping[str, Any]]) -> ShownPool:
    devices = [device for one in slices for device in one.get("devices", [])]
    sets = [entry["counters"] for one in slices for entry in one.get("sharedCounters", [])]
    kinds = Counter(map(_kind, devices))
    return ShownPool(
        name=name,
        devices=", ".join(kind if n == 1 else f"{n} x {kind}" for kind, n in kinds.items()),
        counters={name: amount["value"] for one in sets for name, amount in one.items()},
        takers=_takers(devices),
    )


def _kind(device: Mapping[str, Any]) -> str:
    attributes = device["attributes"]
    return str(attributes["profile"]["string"] or attributes["type"]["string"])


def _takers(devices: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for device in devices:
        for entry in device.get("consumesCounters", []):
            for name, amount in entry["counters"].items():
                kinds, value = found.setdefault(name, {}), int(amount["value"])
                kinds[_kind(device)] = min(value, kinds.get(_kind(device), value))
    return found


def _explained(pool: ShownPool) -> list[str]:
    """The meaning of a counter, explained with the first counter of the pool."""
    if not pool.counters:
        return []
    name, value = next(iter(pool.counters.items()))
    takers = pool.takers[name]
    least = min(takers, key=lambda kind: takers[kind])
    takes = f"A {least} takes {takers[least]} of that" + (
        "." if least == "gpu" else f", and gpu takes {takers['gpu']}."
    )
    return [f"{name}={value} means: {_meaning(name, value)}. {takes}", _RULE]


_RULE = "The scheduler hands out a device while each counter has as much left as the device takes."


def _meaning(counter: str, value: str) -> str:
    match counter.split("-"):
        case ["memory", "slices", first, last]:
            return f"the card has {value} memory slices with the numbers {first} to {last}"
        case ["memory", "slice", number]:
            return f"the card has {value} memory slice with the number {number}"
        case ["card"]:
            return f"the card can be used in {value} way at a time"
        case _:
            return f"the card has {value} of {counter}"
