"""`gpuslice demo`, the first thing that a newcomer runs: the whole story, and what it leaves behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def demo(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it as a user does; `folder` takes what it writes."""
    environment = os.environ | {"TMPDIR": str(folder)}
    command = [sys.executable, "-m", "gpuslice", "demo", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)


def test_the_demo_tells_its_story_on_two_simulated_cards_and_leaves_nothing_behind(short: Path) -> None:
    told = demo(short)

    assert (told.returncode, told.stderr) == (0, "")
    assert "small has node-1/0000-0a-00-0/mig-1g-19-6" in told.stdout
    assert "thirty has node-1/0000-0a-00-0/mig-3g-9-0" in told.stdout
    assert "train has node-1/0000-18-00-0/gpu" in told.stdout
    assert "the pod stays Pending" in told.stdout
    assert "this is a double allocation" in told.stdout
    assert "3g.40gb (incomplete)" in told.stdout
    assert "infer has node-1/0000-18-00-0/mps, 20480 MiB, 25 % of the SMs" in told.stdout
    assert "notebook has node-1/0000-18-00-0/timeslice, 16384 MiB, 1 of 4 turns" in told.stdout
    assert "[                        mps 40960 of 81152 MiB                        ]" in told.stdout
    assert "checked: 3 partitions, and each of them has a record" in told.stdout
    assert told.stdout.rstrip().endswith("nothing is left on this machine.")
    assert list(short.iterdir()) == []


@pytest.mark.parametrize("node", ["l4", "a30:mig+l4"])
def test_the_demo_goes_on_where_a_node_has_no_room_for_a_part_of_it(short: Path, node: str) -> None:
    told = demo(short, "--simulate", node)

    assert (told.returncode, told.stderr) == (0, "")
    assert "checked: no CDI file is left" in told.stdout


def test_the_demo_refuses_a_node_that_nobody_can_simulate_in_one_sentence(short: Path) -> None:
    told = demo(short, "--simulate", "h101")

    assert told.returncode == 2
    assert told.stderr.count("\n") == 1
    assert "h101" in told.stderr
