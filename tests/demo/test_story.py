"""`gpuslice demo`, the first thing that a newcomer runs: the whole story, and what it leaves behind."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.kit import processes

MINUTES = pytest.mark.timeout(240)  # several demos at once on a busy machine


@dataclass(frozen=True, slots=True)
class Told:
    returncode: int
    stdout: str
    stderr: str
    left: list[str]  # the names of the files that it leaves

    @classmethod
    def by(cls, *arguments: str) -> Told:
        """Run the demo as a user does, with a folder for all that it writes."""
        with tempfile.TemporaryDirectory(prefix="gs-") as folder:
            environment = os.environ | {"TMPDIR": folder}
            command = [sys.executable, "-m", "gpuslice", "demo", *arguments]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
            return cls(done.returncode, done.stdout, done.stderr, [p.name for p in Path(folder).iterdir()])


@pytest.fixture
def story(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Told]:
    """What the demo tells of a node. Each node is told once, also if the tests are in several processes."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stories"
    folder.mkdir(exist_ok=True)

    def of(node: str) -> Told:
        with (folder / f"{node}.json").open("a+", encoding="utf-8") as kept:
            fcntl.flock(kept, fcntl.LOCK_EX)
            kept.seek(0)
            if text := kept.read():
                return Told(**json.loads(text))
            told = Told.by("--simulate", node)
            kept.write(json.dumps(asdict(told)))
            return told

    return of


@MINUTES
def test_the_demo_tells_its_story_on_two_simulated_cards_and_leaves_nothing_behind() -> None:
    told = Told.by()

    assert (told.returncode, told.stderr, told.left) == (0, "", [])
    assert "small has node-1/0000-0a-00-0/mig-1g-19-6" in told.stdout
    assert "min-30gi has node-1/0000-0a-00-0/mig-3g-9-0" in told.stdout
    assert "train has node-1/0000-18-00-0/gpu" in told.stdout
    assert "the pod stays Pending" in told.stdout
    assert "this is a double allocation" in told.stdout
    assert "3g.40gb (incomplete)" in told.stdout
    assert "infer has node-1/0000-18-00-0/mps, 20480 MiB, 25 % of the SMs" in told.stdout
    assert "notebook has node-1/0000-18-00-0/timeslice, 16384 MiB, 1 of 4 turns" in told.stdout
    assert "[                        mps 40960 of 81152 MiB                        ]" in told.stdout
    assert "checked: 3 partitions, each with a record" in told.stdout
    assert told.stdout.rstrip().endswith("Nothing is left on this machine.")


def test_two_ctrl_c_end_it_as_one_does_and_leave_nothing(short: Path) -> None:
    environment = os.environ | {"TMPDIR": str(short), "OF_THIS_TEST": str(short)}
    with subprocess.Popen(
        [sys.executable, "-m", "gpuslice", "demo"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as telling:
        assert telling.stdout is not None
        driver = os.pidfd_open(processes.named_in(next(line for line in telling.stdout if "gpuslice run" in line)))
        next(line for line in telling.stdout if line.startswith("Step 5"))
        telling.send_signal(signal.SIGINT)
        processes.wait_end(driver)  # the clean-up has begun
        telling.send_signal(signal.SIGINT)
        _, said = telling.communicate(timeout=30)

    assert (telling.returncode, said) == (130, "")
    assert list(short.iterdir()) == []
    assert processes.with_environment("OF_THIS_TEST", short) == []


NODES = {
    "few": ("h100", "h200", "h100x2:mig", "rtx-pro-6000x2"),
    "many": ("h100x3", "h100x8", "h100x16", "h100+l4x3"),
    "ampere": ("a30", "a30:mig+l4", "a100-40gx2+l4", "a100-40gx2:mig"),
    "no-mig": ("l4", "l4x2", "t4"),
}


@MINUTES
@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_the_story_follows_the_node_within_80_columns(story: Callable[[str], Told], nodes: tuple[str, ...]) -> None:
    with ThreadPoolExecutor(4) as several:  # a demo mostly waits
        told = [*several.map(story, nodes)]

    for node, one in zip(nodes, told, strict=True):
        assert (one.returncode, one.stderr, one.left) == (0, "", []), f"{node}: {one.stderr}"
        assert max(map(len, one.stdout.splitlines())) <= 80, node
        assert "checked: no CDI file is left" in one.stdout, node


@MINUTES
def test_all_that_has_to_wait_is_what_the_story_says(story: Callable[[str], Told]) -> None:
    told = story("h100x3")

    waits = [before for before, line in pairwise(told.stdout.splitlines()) if "Pending" in line]
    assert waits == ["  claim late: one more whole card", "  claim notebook: a time-slicing share: 16Gi"]


@MINUTES
def test_numbers_maps_and_counters_are_explained_where_they_appear_first(story: Callable[[str], Told]) -> None:
    told = story("h100")
    text = " ".join(told.stdout.split())

    assert "Step 1 of 14. The driver and the MPS supervisor start" in text
    assert "memory-slices-0-1=2 means: the card has 2 memory slices with the numbers 0 to 1" in text
    assert "A 1g.10gb takes 1 of that, and gpu takes 2." in text
    assert text.index("The map of the cards: one column") < text.index("GPU 0 0 1 2 3 4 5 6 7")
    assert re.search(r"The demo took \d+ s, \d+ of them before the first step", text)


def test_the_demo_refuses_a_node_that_nobody_can_simulate_in_one_sentence() -> None:
    told = Told.by("--simulate", "h101")

    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert "h101" in told.stderr
