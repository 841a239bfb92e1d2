"""Legality against what NVIDIA's guide, KEP-4815 and listings say of whole boards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpuslice.core.model import MigProfile, Placement
from gpuslice.nvml.sim import geometry
from gpuslice.nvml.sim.geometry import Instance
from gpuslice.nvml.sim.models import Product, product


def instance(model: Product, name: str, start: int) -> Instance:
    (profile,) = (profile for profile in model.profiles if profile.name == name)
    (placement,) = (placement for placement in profile.placements if placement.start == start)
    return profile, placement


def boards(model: Product, profiles: list[MigProfile]) -> Iterator[frozenset[Instance]]:
    """Every legal board of these profiles, the empty one included."""
    everything = [(profile, placement) for profile in profiles for placement in profile.placements]

    def grow(board: list[Instance], rest: list[Instance]) -> Iterator[frozenset[Instance]]:
        yield frozenset(board)
        for at, more in enumerate(rest):
            if geometry.legal(model.engines, [*board, more]):
                yield from grow([*board, more], rest[at + 1 :])

    yield from grow([], everything)


@pytest.mark.parametrize("key", ["a100-40g", "a100-80g", "h100", "h100-nvl", "h200"])
def test_a_seven_slice_card_has_the_19_maximal_boards_of_the_known_diagram(key: str) -> None:
    model = product(key)
    plain = [p for p in model.profiles if not p.suffix and p.placements[0].size != 2 * p.compute_slices]
    found = set(boards(model, plain))
    maximal = [board for board in found if not any(board < other for other in found)]
    assert len(maximal) == 19
    assert len({tuple(sorted(profile.id for profile, _ in board)) for board in maximal}) == 14


def test_two_3g_and_three_2g_fit_an_a100() -> None:
    model = product("a100-40g")
    assert geometry.legal(model.engines, [instance(model, "3g.20gb", 0), instance(model, "3g.20gb", 4)])
    assert geometry.legal(model.engines, [instance(model, "2g.10gb", start) for start in (0, 2, 4)])


def test_media_engines_decide_on_an_a30_where_memory_slices_do_not() -> None:
    model = product("a30")
    wide, narrow = instance(model, "2g.12gb+me", 0), instance(model, "1g.6gb+me", 2)
    assert not wide[1].overlaps(narrow[1])
    assert not geometry.legal(model.engines, [wide, narrow])
    assert geometry.legal(model.engines, [wide, instance(model, "1g.6gb", 2)])


def test_all_media_engines_of_an_rtx_pro_6000_leave_room_only_for_partitions_without() -> None:
    model = product("rtx-pro-6000")
    all_media = instance(model, "1g.24gb+me.all", 0)
    assert not geometry.legal(model.engines, [all_media, instance(model, "1g.24gb", 3)])
    assert geometry.legal(model.engines, [all_media, *(instance(model, "1g.24gb-me", start) for start in (3, 6, 9))])


def test_at_most_one_partition_has_the_media_extensions() -> None:
    model = product("h100")
    assert not geometry.legal(model.engines, [instance(model, "1g.10gb+me", 0), instance(model, "1g.10gb+me", 1)])


def test_a_place_of_another_profile_is_illegal() -> None:
    model = product("h100")
    profile, _ = instance(model, "2g.20gb", 0)
    assert not geometry.legal(model.engines, [(profile, Placement(1, 2))])


def test_ids_on_an_eight_slice_card_follow_the_width() -> None:
    ids = [geometry.instance_id(8, placement, []) for placement in map(Placement, (0, 4, 4, 6), (8, 4, 2, 1))]
    assert ids == [0, 1, 3, 7]
    assert geometry.instance_id(8, Placement(2, 1), [7, 8, 1]) == 9
    assert geometry.instance_id(12, Placement(6, 3), [0, 2]) == 1
