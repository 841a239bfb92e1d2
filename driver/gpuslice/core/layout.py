"""Which partitions can exist together on one card: the hardware's rules, from figures that NVML reports.

A set of partitions is legal when their memory slices do not overlap, no profile has more than its instance count, and
the sum of each engine stays within the card's total. The first two rules are from nvml.h. The third rule is inferred
from the engine totals: no other rule forbids a second `+me.all` on an RTX PRO 6000. This file has no product table, and
it does not assume 8 memory slices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gpuslice.core.model import Gpu, MigProfile, MigSlot, Placement


@dataclass(frozen=True, order=True)
class ProfilePlacement:
    """A profile at one of its places."""

    profile: MigProfile
    placement: Placement

    @cached_property
    def memory_slices(self) -> int:
        """Bit i is memory slice i."""
        return ((1 << self.placement.size) - 1) << self.placement.start

    @cached_property
    def engines(self) -> tuple[tuple[str, int], ...]:
        return tuple(self.profile.engines().items())


def totals(profiles: Iterable[MigProfile]) -> dict[str, int]:
    """The number of each engine on the whole card: the figures of the profile that spans the card.

    An engine is left out if a smaller profile has more of it than the whole card. Such a figure is a gap in the NVIDIA
    driver's answer, so it gives no limit.
    """
    profiles = tuple(profile for profile in profiles if profile.placements)
    if not profiles:
        return {}
    most = {name: max(profile.engines()[name] for profile in profiles) for name in profiles[0].engines()}
    widest = max(map(_width, profiles))
    wide = [profile for profile in profiles if _width(profile) == widest]
    have = {name: max(profile.engines()[name] for profile in wide) for name in most}
    return {name: count for name, count in have.items() if count >= most[name]}


def full(profiles: Iterable[MigProfile]) -> MigProfile | None:
    """The plain profile that spans the whole card: its figures are the card's."""
    return max(profiles, key=lambda p: (_width(p), not p.suffix, p.multiprocessors), default=None)


def _width(profile: MigProfile) -> int:
    return max((placement.size for placement in profile.placements), default=0)


def fits(card: Mapping[str, int], places: Sequence[ProfilePlacement]) -> bool:
    """Whether these partitions may exist together on a card with these `totals`."""
    taken = 0
    for place in places:
        if taken & place.memory_slices:
            return False
        taken |= place.memory_slices
    return within(card, places)


def within(card: Mapping[str, int], places: Sequence[ProfilePlacement]) -> bool:
    """The rules without the overlap: instance counts and engine sums."""
    count: dict[int, int] = {}
    engines = dict.fromkeys(card, 0)
    for place in places:
        count[place.profile.id] = count.get(place.profile.id, 0) + 1
        if count[place.profile.id] > place.profile.max_instances:
            return False
        for name, amount in place.engines:
            if name in engines:
                engines[name] += amount
                if engines[name] > card[name]:
                    return False
    return True


def coexist(gpu: Gpu, one: MigSlot, two: MigSlot) -> bool:
    """Whether partitions in these two slots of the card can exist together. For an unknown slot, only the place counts."""
    if one.placement.overlaps(two.placement):
        return False
    profiles = gpu.profile(one.profile), gpu.profile(two.profile)
    if profiles[0] is None or profiles[1] is None:
        return True
    if one.placement not in profiles[0].placements or two.placement not in profiles[1].placements:
        return True  # an unlisted place may be any number, so its bit mask could have any length
    return fits(
        totals(gpu.profiles),
        (ProfilePlacement(profiles[0], one.placement), ProfilePlacement(profiles[1], two.placement)),
    )


def conflicts(card: Mapping[str, int], places: Sequence[ProfilePlacement]) -> Iterator[tuple[int, ...]]:
    """Every minimal illegal set, by index: pairs first, then larger sets. All proper subsets of such a set are legal."""
    for i, one in enumerate(places):
        for j in range(i + 1, len(places)):
            if one.memory_slices & places[j].memory_slices:
                yield (i, j)
    yield from _excesses(card, places, (), 0, 0)


def _excesses(
    card: Mapping[str, int], places: Sequence[ProfilePlacement], chosen: tuple[int, ...], taken: int, start: int
) -> Iterator[tuple[int, ...]]:
    """Sets without overlap that break a count or a sum. They grow from legal sets."""
    for i in range(start, len(places)):
        if taken & places[i].memory_slices:
            continue
        grown = (*chosen, i)
        if within(card, [places[k] for k in grown]):
            yield from _excesses(card, places, grown, taken | places[i].memory_slices, i + 1)
        elif all(within(card, [places[k] for k in grown if k != left]) for left in chosen):
            yield grown


def arrange(card: Mapping[str, int], wanted: Sequence[MigProfile]) -> tuple[ProfilePlacement, ...] | None:
    """A legal place for each wanted partition, or None if they do not fit. The widest first, the highest start first.

    Partitions of equal profiles take places in falling order, so that the search does not try their permutations.
    """
    order = sorted(wanted, key=lambda p: (-_width(p), p.id))
    return _arrange(card, order, ())


def _arrange(
    card: Mapping[str, int], wanted: Sequence[MigProfile], placed: tuple[ProfilePlacement, ...]
) -> tuple[ProfilePlacement, ...] | None:
    if not wanted:
        return placed
    profile = wanted[0]
    same = [place.placement.start for place in placed if place.profile == profile]
    for placement in sorted(profile.placements, reverse=True):
        grown = (*placed, ProfilePlacement(profile, placement))
        if (not same or placement.start < same[-1]) and fits(card, grown):
            found = _arrange(card, wanted[1:], grown)
            if found is not None:
                return found
    return None
