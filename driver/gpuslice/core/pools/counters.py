"""The smallest number of counters with which the scheduler allows exactly the sets that the hardware accepts.

The counters must refuse a set of devices of one card if the hardware refuses it (`layout`), if it contains the whole card
and another device, or if it contains two devices at one place. Every candidate counter is a relaxation of one hardware
rule (memory slices of an interval, the total of one engine, the instance count of one profile). So no candidate forbids a
legal set. The remaining task is to forbid every *minimal* illegal set with the cheapest choice of counters: a weighted
set cover. The cost is the number of counter entries over all devices, because the scheduler spends half of its time on
reading them again for each pod (measured, Kubernetes 1.37.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gpuslice.core import layout
from gpuslice.core.layout import ProfilePlacement
from gpuslice.core.model import MigProfile

_ENTRY = 1000  # one entry costs more than any number of counters; with equal numbers of entries, fewer counters win


@dataclass(frozen=True, slots=True)
class Counter:
    """A counter of a card. `taken` has the amount that a device at each published place consumes."""

    name: str  # DNS label
    capacity: int
    taken: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Counters:
    """The counters of one card. Empty if no published device excludes another one."""

    places: tuple[ProfilePlacement, ...]
    chosen: tuple[Counter, ...]

    def whole(self) -> dict[str, int]:
        """Consumption of a device that takes the whole card: everything."""
        return {counter.name: counter.capacity for counter in self.chosen}

    def at(self, place: ProfilePlacement) -> dict[str, int]:
        """Consumption of each device at this place. ValueError for an unknown place."""
        i = self.places.index(place)
        return {counter.name: counter.taken[i] for counter in self.chosen if counter.taken[i]}


@lru_cache(maxsize=128)
def minimal(
    profiles: tuple[MigProfile, ...], places: tuple[ProfilePlacement, ...], devices: tuple[int, ...], wholes: int
) -> Counters:
    """Counters for a card with these `profiles` (all that it has, because its totals come from them).

    `devices[i]` is the number of devices at `places[i]`, `wholes` the number of those that take the whole card.
    """
    card = layout.totals(profiles)
    pool = list(candidates(card, places))
    rows = {_biters(pool, illegal) for illegal in layout.conflicts(card, places)}
    for i, count in enumerate(devices):
        if count > 1:
            rows.add(_biters(pool, (i, i)))
        if wholes:  # together with the whole card, which consumes every counter fully
            rows.add(_mask(counter.taken[i] > 0 for counter in pool))
    if wholes > 1:
        rows.add(_mask(True for _ in pool))
    weights = [_ENTRY * (wholes + entries(counter, devices)) + 1 for counter in pool]
    cover = _cover(rows, weights)
    return Counters(places, tuple(counter for k, counter in enumerate(pool) if cover >> k & 1))


def entries(counter: Counter, devices: Sequence[int]) -> int:
    """The number of devices with an entry for this counter, whole cards not included."""
    return sum(count for count, amount in zip(devices, counter.taken, strict=True) if amount)


def _mask(bits: Iterable[bool]) -> int:
    return sum(1 << k for k, bit in enumerate(bits) if bit)


def _biters(pool: Sequence[Counter], illegal: tuple[int, ...]) -> int:
    """The candidates that forbid this set."""
    return _mask(sum(counter.taken[i] for i in illegal) > counter.capacity for counter in pool)


def candidates(card: Mapping[str, int], places: Sequence[ProfilePlacement]) -> Iterator[Counter]:
    """Every counter that is a relaxation of one hardware rule. Of equally cheap candidates, the earlier one wins."""
    yield Counter("card", 1, (0,) * len(places))
    width = max((place.placement.start + place.placement.size for place in places), default=0)
    for size in range(width, 0, -1):  # if two have the same effect, the wide counter is easier to read
        for start in range(width - size + 1):
            window = ((1 << size) - 1) << start
            name = f"memory-slice-{start}" if size == 1 else f"memory-slices-{start}-{start + size - 1}"
            yield Counter(name, size, tuple((place.memory_slices & window).bit_count() for place in places))
    for engine, total in card.items():
        if total:
            yield Counter(engine, total, tuple(place.profile.engines()[engine] for place in places))
    for profile in dict.fromkeys(place.profile for place in places):
        taken = tuple(int(place.profile == profile) for place in places)
        yield Counter(f"instances-{profile.id}", profile.max_instances, taken)


# ---------------------------------------------------------------- weighted set cover; rows and choices are bit masks


def _bits(mask: int) -> Iterator[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _cover(rows: Iterable[int], weights: Sequence[int]) -> int:
    """The cheapest choice of candidates that meets every row (a mask of candidates), by branch and bound."""
    todo = _worthwhile(_hardest(rows), weights)
    best = (sum(weights) + 1, 0)

    def search(todo: list[int], cost: int, chosen: int) -> None:
        nonlocal best
        if cost + _bound(todo, weights) >= best[0]:
            return
        if not todo:
            best = (cost, chosen)
            return
        tightest = min(todo, key=int.bit_count)
        banned = 0
        for k in sorted(_bits(tightest), key=lambda k: weights[k] / sum(row >> k & 1 for row in todo)):
            search([row & ~banned for row in todo if not row >> k & 1], cost + weights[k], chosen | 1 << k)
            banned |= 1 << k

    search(todo, 0, 0)
    return best[1]


def _hardest(rows: Iterable[int]) -> list[int]:
    """Rows that no other row implies. A choice that meets a row also meets every superset of the row."""
    hardest: list[int] = []
    for row in sorted(set(rows), key=lambda row: (row.bit_count(), row)):
        if not any(kept & row == kept for kept in hardest):
            hardest.append(row)
    return hardest


def _worthwhile(rows: list[int], weights: Sequence[int]) -> list[int]:
    """The rows without dominated candidates: another candidate costs no more and covers the same rows or more."""
    met = {k: _mask(bool(row >> k & 1) for row in rows) for k in range(len(weights))}
    order = sorted((k for k in met if met[k]), key=lambda k: (weights[k], -met[k].bit_count(), k))
    kept: list[int] = []
    for k in order:
        if not any(met[k] & met[other] == met[k] for other in kept):
            kept.append(k)
    useful = sum(1 << k for k in kept)
    return _hardest(row & useful for row in rows)


def _bound(todo: list[int], weights: Sequence[int]) -> int:
    """A lower bound for the cost of a cover: rows without a common candidate need one candidate each."""
    seen = cost = 0
    for row in sorted(todo, key=int.bit_count):
        if not row:
            return sum(weights) + 1
        if not row & seen:
            seen |= row
            cost += min(weights[k] for k in _bits(row))
    return cost
