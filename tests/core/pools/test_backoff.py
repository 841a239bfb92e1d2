"""Waiting grows with trouble and shrinks with calm."""

from __future__ import annotations

from gpuslice.core.pools.backoff import CALM_S, Backoff, BackoffConfig, Debounce, Hopelessness, Repeats

CONFIG = BackoffConfig(quiet_s=1.0, quiet_most_s=4.0, retry_s=1.0, retry_most_s=5.0)


def test_each_further_try_may_wait_twice_as_long_up_to_the_most() -> None:
    retry = Backoff(CONFIG)

    assert [retry.delay_s(1.0) for _ in range(5)] == [1.0, 2.0, 4.0, 5.0, 5.0]
    assert retry.delay_s(0.0) == 0.0


def test_an_answer_waits_for_a_moment_of_quiet_but_not_for_ever() -> None:
    debounce = Debounce(CONFIG)

    assert [debounce.due(now) for now in (0.0, 0.5, 3.9, 4.5, 9.0)] == [1.0, 1.5, 4.9, 5.0, 5.0]


def test_the_quiet_doubles_while_our_answers_do_not_last() -> None:
    debounce, waits = Debounce(CONFIG), []
    for now in (0.0, 10.0, 20.0, 30.0):
        waits.append(debounce.due(now) - now)
        debounce.record_answer(now, wrote=True)

    assert waits == [1.0, 2.0, 4.0, 4.0]
    assert debounce.due(1000.0) == 1001.0


def test_a_change_that_needed_no_answer_costs_no_patience() -> None:
    debounce = Debounce(CONFIG)
    for now in (0.0, 10.0, 20.0):
        assert debounce.due(now) == now + 1.0
        debounce.record_answer(now, wrote=False)


def test_trouble_that_alternates_is_told_once_and_again_after_a_calm_minute() -> None:
    repeats = Repeats()

    told = [(at, text) for at in range(0, 300, 20) for text in ("no answer", "refused") if repeats.is_news(text, at)]

    assert told == [(0, "no answer"), (0, "refused")]
    assert repeats.is_news("no answer", 280 + CALM_S)


def test_waiting_ends_when_nothing_but_lasting_answers_came_for_long_enough() -> None:
    hopelessness = Hopelessness(BackoffConfig(hopeless_s=10))
    answers = [(0, True), (9, True), (10, False), (11, True), (20, True), (21, True)]

    reached = [at for at, lasting in answers if hopelessness.reached(at, lasting=lasting)]

    assert reached == [21]


def test_no_wait_sleeps_over_the_end_of_waiting() -> None:
    hopelessness = Hopelessness(BackoffConfig(hopeless_s=10))

    assert hopelessness.shorten(30, 0) == 30, "nothing is hopeless yet"
    hopelessness.reached(5, lasting=True)
    assert [hopelessness.shorten(8, now) for now in (6, 8, 16)] == [8, 7, 8]
