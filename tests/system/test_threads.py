"""A thread that should live as long as the process does not end unnoticed."""

from __future__ import annotations

import queue
import threading

import pytest
from gpuslice.system.threads import ThreadWatch


def fails() -> None:
    raise ValueError("no such thing")


def leaves() -> None:
    raise SystemExit


def ends() -> None:
    return


@pytest.mark.parametrize(
    ("body", "why"), [(fails, "by ValueError: no such thing"), (leaves, "by SystemExit"), (ends, "without an error")]
)
def test_a_thread_that_ends_by_itself_is_told_and_remembered(body: object, why: str) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threads = ThreadWatch(told.put)

    threads.start("looker", body)  # type: ignore[arg-type]

    sentence = told.get(timeout=10)
    assert sentence.startswith(f"thread looker ended {why}")
    assert threads.problem() == sentence


def test_a_thread_that_is_to_end_is_no_trouble() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threads, end = ThreadWatch(told.put), threading.Event()

    def waits() -> None:
        end.wait()

    threads.start("looker", waits)
    assert threads.problem() is None

    threads.stopping()
    end.set()
    threads.join(10)

    assert threads.problem() is None
    assert told.empty()


def test_what_was_never_started_is_not_waited_for() -> None:
    ThreadWatch().join(10)
