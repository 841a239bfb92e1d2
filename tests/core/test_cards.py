"""Which cards a node has, from what NVML lists now and what was there before."""

from __future__ import annotations

from dataclasses import replace

import pytest
from gpuslice.core import cards
from gpuslice.core.model import Gpu, GpuUuid

from tests.kit.builders import a_gpu

ONE, TWO, THREE = (a_gpu("h100", index) for index in range(3))


def test_cards_that_are_as_they_were_need_no_word() -> None:
    assert cards.known((TWO, ONE), (ONE, TWO), keep_missing=True) == ((ONE, TWO), ())


@pytest.mark.parametrize("keep", [True, False])
def test_a_card_that_is_missing_is_named_whether_it_stays_or_goes(keep: bool) -> None:
    gpus, (sentence,) = cards.known((ONE,), (ONE, TWO), keep_missing=keep)

    assert gpus == ((ONE, TWO) if keep else (ONE,))
    assert TWO.bus_id in sentence and ("with taints" if keep else "removed") in sentence


def test_a_card_that_lists_no_profiles_now_has_those_of_last_time() -> None:
    assert cards.known((replace(ONE, profiles=()),), (ONE,), keep_missing=True)[0] == (ONE,)


@pytest.mark.parametrize("twin", [replace(TWO, uuid=ONE.uuid), replace(TWO, bus_id=ONE.bus_id)])
def test_cards_that_share_a_uuid_or_a_place_are_told_apart_by_what_was_seen_before_or_not_at_all(
    twin: Gpu,
) -> None:
    assert cards.known((ONE, twin, THREE), (), keep_missing=True)[0] == (THREE,)
    gpus, sentences = cards.known((ONE, twin, THREE), (ONE, THREE), keep_missing=True)
    assert gpus == (ONE, THREE) and sentences


def test_a_card_without_a_uuid_is_none() -> None:
    gpus, (sentence,) = cards.known((ONE, replace(TWO, uuid=GpuUuid(""))), (), keep_missing=True)

    assert gpus == (ONE,) and TWO.bus_id in sentence


def test_only_a_card_that_is_not_served_is_new() -> None:
    assert cards.new((ONE, TWO), (ONE,)) == (TWO,)
    assert cards.new((ONE,), (ONE, TWO)) == ()
    assert cards.new((ONE, replace(TWO, uuid=ONE.uuid)), (ONE,)) == ()


def test_a_node_without_a_card_says_so() -> None:
    assert [*cards.none_of(())] and not [*cards.none_of((ONE,))]
