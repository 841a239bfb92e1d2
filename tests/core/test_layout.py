"""Which partitions can exist together, and where to place requested ones."""

from __future__ import annotations

import pytest
from gpuslice.core import layout
from gpuslice.core.layout import ProfilePlacement
from gpuslice.core.model import Gpu, MigProfile, MigSlot, Placement
from gpuslice.nvml.sim import geometry, models

from tests.kit.builders import a_gpu


def named(gpu: Gpu, *names: str) -> list[MigProfile]:
    return [next(profile for profile in gpu.profiles if profile.name == name) for name in names]


@pytest.mark.parametrize(
    "names",
    [
        ["3g.20gb", "3g.20gb"],
        ["2g.10gb", "2g.10gb", "2g.10gb", "1g.5gb"],
        ["3g.20gb", "2g.10gb", "2g.10gb"],
        ["1g.5gb"] * 7,
        ["2g.10gb"] + ["1g.5gb"] * 5,
        ["4g.20gb", "3g.20gb"],
        ["1g.10gb"] * 4,
        ["1g.5gb+me"] + ["1g.5gb"] * 6,
    ],
)
def test_a_layout_that_the_card_takes_is_found_whatever_its_order(names: list[str]) -> None:
    gpu = a_gpu("a100-40g")
    wanted = named(gpu, *names)

    for order in (wanted, wanted[::-1]):
        places = layout.arrange(layout.totals(gpu.profiles), order)

        assert places is not None
        assert sorted(place.profile.id for place in places) == sorted(profile.id for profile in wanted)
        assert geometry.legal(models.product("a100-40g").engines, [(p.profile, p.placement) for p in places])


@pytest.mark.parametrize(
    "names",
    [
        ["4g.20gb", "4g.20gb"],
        ["1g.5gb"] * 8,
        ["3g.20gb", "3g.20gb", "1g.5gb"],
        ["1g.5gb+me"] * 2,
        ["7g.40gb", "1g.5gb"],
    ],
)
def test_a_layout_that_the_card_cannot_take_is_not_found(names: list[str]) -> None:
    gpu = a_gpu("a100-40g")

    assert layout.arrange(layout.totals(gpu.profiles), named(gpu, *names)) is None


def test_media_profiles_of_different_width_exclude_each_other_on_an_a30() -> None:
    gpu = a_gpu("a30")
    small, wide = named(gpu, "1g.6gb+me", "2g.12gb+me")
    one, two = MigSlot(gpu.uuid, small.id, Placement(0, 1)), MigSlot(gpu.uuid, wide.id, Placement(2, 2))

    assert not layout.coexist(gpu, one, two)


def test_partitions_beside_each_other_coexist_and_a_slot_does_not_coexist_with_itself() -> None:
    gpu = a_gpu("h100")
    one, two = MigSlot(gpu.uuid, 19, Placement(0, 1)), MigSlot(gpu.uuid, 19, Placement(1, 1))

    assert layout.coexist(gpu, one, two)
    assert not layout.coexist(gpu, one, one)


def test_a_partition_of_an_unknown_profile_is_in_the_way_of_its_own_place_only() -> None:
    gpu = a_gpu("h100")
    unknown = MigSlot(gpu.uuid, 99, Placement(0, 1))

    assert not layout.coexist(gpu, unknown, MigSlot(gpu.uuid, 9, Placement(0, 4)))
    assert layout.coexist(gpu, unknown, MigSlot(gpu.uuid, 9, Placement(4, 4)))


def test_the_whole_cards_engines_are_those_of_its_plain_widest_profile() -> None:
    gpu = a_gpu("rtx-pro-6000")
    widest = layout.full(gpu.profiles)

    assert widest is not None
    assert (widest.name, layout.full(())) == ("4g.96gb", None)
    assert layout.totals(gpu.profiles) == widest.engines()
    assert layout.fits(layout.totals(gpu.profiles), [ProfilePlacement(widest, widest.placements[0])])
