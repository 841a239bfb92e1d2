"""What occupies the memory slices of a card. The map of `gpuslice devices` and the map of the page at `/` both use it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpuslice.core import plan
from gpuslice.core.model import Gpu, LiveGpu, MigSlot, Monitor
from gpuslice.core.record import Grant, Record


@dataclass(frozen=True, slots=True)
class Block:
    """Some memory slices of a card in a row. `name` has a mark if the partition is foreign or incomplete (`marked`)."""

    start: int
    size: int
    name: str
    marked: bool
    grants: tuple[Grant, ...]


def width(gpu: Gpu) -> int:
    """Number of memory slices; 1 for a card without MIG."""
    return max((place.start + place.size for profile in gpu.profiles for place in profile.placements), default=1)


def whole(grants: Iterable[Grant]) -> list[Grant]:
    """The grants that take the whole card."""
    return [grant for grant in grants if grant.slot is None and not isinstance(grant.sharing, Monitor)]


def blocks(gpu: Gpu, live: LiveGpu, grants: Sequence[Grant], records: Iterable[Record]) -> tuple[Block, ...]:
    """The partitions of the card in this look."""
    foreign = plan.foreign_partitions(gpu.uuid, live, records)
    marks = ((p, " (foreign)" if p in foreign else "" if p.uuid else " (incomplete)") for p in live.partitions)
    return tuple(_block(gpu, MigSlot(gpu.uuid, p.profile, p.placement), mark, grants) for p, mark in marks)


def recorded_blocks(gpu: Gpu, grants: Sequence[Grant]) -> tuple[Block, ...]:
    """The partitions of the card by our records, for an unreadable card."""
    slots = dict.fromkeys(grant.slot for grant in grants if grant.slot is not None)
    return tuple(_block(gpu, slot, "", grants) for slot in slots)


def _block(gpu: Gpu, slot: MigSlot, mark: str, grants: Sequence[Grant]) -> Block:
    profile = gpu.profile(slot.profile)
    name = profile.name if profile is not None else f"profile {slot.profile}"
    holders = tuple(grant for grant in grants if grant.slot == slot)
    return Block(slot.placement.start, slot.placement.size, name + mark, bool(mark), holders)
