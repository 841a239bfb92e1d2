"""What the counters allow is what the hardware accepts, no more, no less, and in as few entries as that takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from gpuslice.core import layout
from gpuslice.core.layout import ProfilePlacement
from gpuslice.core.model import MigProfile, Placement
from gpuslice.core.pools import counters
from gpuslice.core.pools.counters import Counters
from gpuslice.nvml.sim import geometry, models
from hypothesis import given, settings
from hypothesis import strategies as st

PRODUCTS = [key for key in models.known() if models.product(key).profiles]


def places_of(profiles: Sequence[MigProfile]) -> tuple[ProfilePlacement, ...]:
    return tuple(ProfilePlacement(profile, placement) for profile in profiles for placement in profile.placements)


def plain(product: str) -> tuple[MigProfile, ...]:
    return tuple(profile for profile in models.product(product).profiles if not profile.suffix)


def cost(found: Counters, devices: Sequence[int], wholes: int) -> int:
    return sum(counters.entries(counter, devices) + wholes for counter in found.chosen)


def disagreement(found: Counters, engines: dict[str, int], wholes: int) -> tuple[ProfilePlacement, ...] | None:
    """A set on which counters and hardware differ; None if there is none.

    Both families are closed under taking away, so it is enough to grow every legal set by each further place; sets with
    two overlapping places are settled by the pair.
    """
    places = found.places
    taken = [[counter.taken[i] for counter in found.chosen] for i in range(len(places))]
    capacities = [counter.capacity for counter in found.chosen]
    for i, j in itertools.combinations(range(len(places)), 2):
        if places[i].placement.overlaps(places[j].placement) and admits(taken[i], taken[j], capacities):
            return places[i], places[j]
    if wholes and not all(map(any, taken)):
        return (places[[any(row) for row in taken].index(False)],)

    def grow(chosen: tuple[int, ...], used: list[int], start: int) -> tuple[ProfilePlacement, ...] | None:
        standing = [(places[k].profile, places[k].placement) for k in chosen]
        for i in range(start, len(places)):
            profile, placement = places[i].profile, places[i].placement
            if any(placement.overlaps(there) for _, there in standing):
                continue
            legal = geometry.refusal(engines, standing, profile, placement) is None
            if legal != admits(used, taken[i], capacities):
                return (*(places[k] for k in chosen), places[i])
            if legal:
                wrong = grow((*chosen, i), [a + b for a, b in zip(used, taken[i], strict=True)], i + 1)
                if wrong is not None:
                    return wrong
        return None

    return grow((), [0] * len(capacities), 0)


def admits(used: Sequence[int], more: Sequence[int], capacities: Sequence[int]) -> bool:
    return all(a + b <= capacity for a, b, capacity in zip(used, more, capacities, strict=True))


@pytest.mark.parametrize("wholes", [0, 1])
@pytest.mark.parametrize("product", PRODUCTS)
def test_counters_admit_exactly_the_legal_layouts_of_every_product_with_all_its_suffixes(
    product: str, wholes: int
) -> None:
    card = models.product(product)
    places = places_of(card.profiles)

    found = counters.minimal(card.profiles, places, (1,) * len(places), wholes)

    assert disagreement(found, card.engines, wholes) is None
    assert len(found.chosen) <= 32


@pytest.mark.parametrize("product", ["a30", "a100-80g", "rtx-pro-6000"])
def test_counters_stay_exact_for_every_choice_of_offered_profiles(product: str) -> None:
    card = models.product(product)
    for count in range(1, 4):
        for offered in itertools.combinations(card.profiles, count):
            places = places_of(offered)
            found = counters.minimal(card.profiles, places, (1,) * len(places), 1)
            assert disagreement(found, card.engines, 1) is None, [profile.name for profile in offered]


@pytest.mark.parametrize("product", [key for key in PRODUCTS if key[:4] in ("a100", "h100", "h200")])
@pytest.mark.parametrize(("wholes", "entries"), [(1, 28), (3, 36)])
def test_a_seven_slice_card_needs_four_counters_of_two_memory_slices(product: str, wholes: int, entries: int) -> None:
    places = places_of(plain(product))

    found = counters.minimal(models.product(product).profiles, places, (1,) * len(places), wholes)

    assert {counter.name: counter.capacity for counter in found.chosen} == {
        "memory-slices-0-1": 2,
        "memory-slices-2-3": 2,
        "memory-slices-4-5": 2,
        "memory-slices-6-7": 2,
    }
    assert cost(found, (1,) * len(places), wholes) == entries


@pytest.mark.parametrize("product", PRODUCTS)
def test_two_devices_at_one_place_exclude_each_other(product: str) -> None:
    card = models.product(product)
    places = places_of(card.profiles)

    found = counters.minimal(card.profiles, places, (2,) * len(places), 3)

    for place in places:
        taken = found.at(place)
        assert any(2 * amount > found.whole()[name] for name, amount in taken.items()), place
    assert disagreement(found, card.engines, 3) is None


def test_one_device_for_the_whole_card_needs_no_counter() -> None:
    assert counters.minimal((), (), (), 1).chosen == ()


def test_two_devices_for_the_whole_card_need_one_counter() -> None:
    assert counters.minimal((), (), (), 2).whole() == {"card": 1}


def test_partitions_that_may_all_stand_together_need_no_counter() -> None:
    profiles = models.product("h100").profiles
    places = layout.arrange(layout.totals(profiles), [profiles[0]] * 7)
    assert places is not None

    assert counters.minimal(profiles, places, (1,) * 7, 0).chosen == ()


def test_an_engine_that_the_whole_card_does_not_report_limits_nothing() -> None:
    small = MigProfile(
        id=1, name="1g.1gb", memory_mib=1024, compute_slices=1, multiprocessors=1, decoders=1, max_instances=2,
        placements=(Placement(0, 1), Placement(1, 1)),
    )  # fmt: skip
    whole = MigProfile(
        id=0, name="2g.2gb", memory_mib=2048, compute_slices=2, multiprocessors=2, max_instances=1,
        placements=(Placement(0, 2),),
    )  # fmt: skip

    assert "decoders" not in layout.totals((small, whole))
    assert layout.fits(layout.totals((small, whole)), places_of([small]))


# ---------------------------------------------------------------- cards that nobody has built yet


@st.composite
def cards(draw: st.DrawFn, width: int, kinds: int) -> tuple[MigProfile, ...]:
    """A card of `width` memory slices: the profile of the whole, and smaller ones with engines of their own."""
    total = draw(st.integers(1, 4)), draw(st.integers(0, 2))
    profiles = [a_profile(0, Placement(0, width).size, (0,), total, 1)]
    for number in range(1, draw(st.integers(1, kinds)) + 1):
        size = draw(st.integers(1, width - 1))
        starts = draw(st.sets(st.integers(0, width - size), min_size=1).map(sorted))
        engines = draw(st.integers(0, total[0])), draw(st.integers(0, total[1]))
        profiles.append(a_profile(number, size, starts, engines, draw(st.integers(1, 3))))
    return tuple(profiles)


def a_profile(number: int, size: int, starts: Sequence[int], engines: tuple[int, int], most: int) -> MigProfile:
    return MigProfile(
        id=number,
        name=f"{size}g.{size}gb",
        memory_mib=size * 1024,
        compute_slices=size,
        multiprocessors=engines[0],
        ofas=engines[1],
        max_instances=most,
        placements=tuple(Placement(start, size) for start in starts),
    )


@settings(max_examples=60, deadline=None)
@given(profiles=cards(width=6, kinds=4), wholes=st.integers(0, 3))
def test_counters_are_exact_on_any_card(profiles: tuple[MigProfile, ...], wholes: int) -> None:
    places = places_of(profiles)

    found = counters.minimal(profiles, places, (1,) * len(places), wholes)

    assert disagreement(found, layout.totals(profiles), wholes) is None


@settings(max_examples=25, deadline=None)
@given(profiles=cards(width=3, kinds=2), wholes=st.integers(0, 2), twins=st.integers(1, 2))
def test_no_choice_of_counters_is_exact_with_fewer_entries(
    profiles: tuple[MigProfile, ...], wholes: int, twins: int
) -> None:
    card, places = layout.totals(profiles), places_of(profiles)
    devices = (twins,) * len(places)

    found = counters.minimal(profiles, places, devices, wholes)

    cheaper = [
        choice
        for choice in choices(card, places)
        if cost(choice, devices, wholes) < cost(found, devices, wholes)
        and disagreement(choice, card, wholes) is None
        and keeps_twins_apart(choice, twins)
        and (wholes < 2 or choice.chosen)
    ]
    assert cheaper == []


def choices(card: dict[str, int], places: tuple[ProfilePlacement, ...]) -> Iterator[Counters]:
    every = list(counters.candidates(card, places))
    for count in range(len(every) + 1):
        for chosen in itertools.combinations(every, count):
            yield Counters(places, chosen)


def keeps_twins_apart(choice: Counters, twins: int) -> bool:
    apart = (any(2 * c.taken[i] > c.capacity for c in choice.chosen) for i in range(len(choice.places)))
    return twins == 1 or all(apart)


@pytest.mark.parametrize("product", PRODUCTS)
def test_no_chosen_counter_can_be_left_out(product: str) -> None:
    card = models.product(product)
    places = places_of(card.profiles)
    found = counters.minimal(card.profiles, places, (1,) * len(places), 1)

    for counter in found.chosen:
        rest = Counters(places, tuple(other for other in found.chosen if other != counter))
        assert disagreement(rest, card.engines, 1) is not None, counter.name
