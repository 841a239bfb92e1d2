"""A thread that should live as long as the process does not end unnoticed."""

from __future__ import annotations

import ast
import queue
import threading
from pathlib import Path

import gpuslice
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


def test_a_thread_whose_work_is_over_may_end_and_is_forgotten() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threads, over = ThreadWatch(told.put), threading.Event()

    def works() -> None:
        over.set()

    threads.start("worker", works, over=over.is_set)
    over.wait()
    threads.join(10)

    assert threads.problem() is None
    assert threads.alive() == ()


# Each place that starts threads without a ThreadWatch, and the reason. A new place must give its reason here.
UNWATCHED = {
    "app.py": "a pool: what a fetch raises is the answer that its claim waits for",
    "mps/supervisor.py": "a thread for each client, which has a time limit; threads that are joined at once",
    "nvml/listing.py": "the caller waits for the answer, with a limit",
    "plugin/workers.py": "the watchdog of each job looks at it; a thread between two jobs only waits",
    "publishing/node_health.py": "the caller waits for the answer, with a limit",
    "publishing/writer.py": "a pool: what a write raises is the answer that the writing thread waits for",
    "system/threads.py": "the watch itself",
}
SIMULATED = ("demo", "playground", "standin", "mps/sim", "nvml/sim")  # they run on no real node


def test_each_thread_of_the_driver_and_the_supervisor_is_watched_or_has_its_reason() -> None:
    package = Path(gpuslice.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        named = {ast.unparse(call).rpartition(".")[2] for call in calls}
        if named & {"Thread", "Timer", "ThreadPoolExecutor", "start_new_thread"} and not name.startswith(SIMULATED):
            found.add(name)

    assert found == set(UNWATCHED)


def test_what_was_never_started_is_not_waited_for() -> None:
    ThreadWatch().join(10)
