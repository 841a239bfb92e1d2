"""Decides which sets of GPU instances a card accepts. Pure. The simulator uses it, and tests check counters with it.

A card accepts a set if and only if every instance is at a place of its own profile, the memory slices do not overlap, no
profile has more than its `max_instances`, and no engine exceeds the card's total. On 7-slice products the first three rules
imply the fourth. On an A30 and an RTX PRO 6000 they do not (two media profiles of different width).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from gpuslice.core.model import MigProfile, Placement

Instance = tuple[MigProfile, Placement]


def legal(total_engines: Mapping[str, int], instances: Sequence[Instance]) -> bool:
    """Whether the card can have all these instances at once. `total_engines` has the names of `MigProfile.engines`."""
    return all(
        placement in profile.placements and refusal(total_engines, instances[:at], profile, placement) is None
        for at, (profile, placement) in enumerate(instances)
    )


def refusal(
    total_engines: Mapping[str, int], standing: Sequence[Instance], profile: MigProfile, placement: Placement
) -> str | None:
    """Why the existing instances leave no room for one more, as the end of a sentence. None if there is room."""
    for other, there in standing:
        if placement.overlaps(there):
            return f"memory slices {placement.start} to {placement.start + placement.size - 1} overlap a {other.name}"
    if sum(other.id == profile.id for other, _ in standing) >= profile.max_instances:
        return f"the card takes at most {profile.max_instances} of {profile.name}"
    for engine, wanted in profile.engines().items():
        taken = sum(other.engines()[engine] for other, _ in standing)
        if taken + wanted > total_engines.get(engine, 0):
            return f"{engine} would be {taken + wanted} of {total_engines.get(engine, 0)}"
    return None


def instance_id(memory_slices: int, placement: Placement, taken: Iterable[int]) -> int:
    """The id that NVML gives a new GPU instance. NVML reuses ids. They are not dense and do not give the place.

    On 8-slice cards an instance gets the smallest free id of its width: 8 slices 0, 4 slices 1 to 2, 2 slices 3 to 6,
    1 slice 7 to 14 (A100 listings of the MIG user guide). On other cards the simulator uses the smallest free id.
    """
    first = 8 // placement.size - 1 if memory_slices == 8 and 8 % placement.size == 0 else 0
    used = set(taken)
    return next(candidate for candidate in range(first, first + len(used) + 1) if candidate not in used)
