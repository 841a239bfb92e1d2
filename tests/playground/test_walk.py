"""`gpuslice playground` from a terminal: start, claim, look, release, end; and what goes wrong on the way."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.nvml.sim.node import SimNode
from gpuslice.playground.folder import MARK
from gpuslice.system.folder_watch import FolderWatch

from tests.kit import processes

GPUSLICE = (sys.executable, "-m", "gpuslice")


class Terminal:
    """Types commands; its TMPDIR is a folder of the test, so that the usual playground is the test's own."""

    def __init__(self, tmp: Path) -> None:
        self.tmp = tmp
        self.folder = tmp / f"gpuslice-playground-{os.getuid()}"
        self.environment = {**os.environ, "TMPDIR": str(tmp)}

    def type(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*GPUSLICE, *words], env=self.environment, capture_output=True, text=True, timeout=50, check=False
        )

    def begin(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*GPUSLICE, *words], env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def done(self, *words: str) -> str:
        typed = self.type(*words)
        assert (typed.returncode, typed.stderr) == (0, ""), typed.stderr
        assert max(map(len, typed.stdout.replace(str(self.tmp), "/tmp").splitlines())) <= 80
        return typed.stdout

    def refused(self, *words: str, code: int = 1) -> str:
        typed = self.type(*words)
        assert (typed.returncode, typed.stdout, typed.stderr.count("\n")) == (code, "", 1), typed.stderr
        return typed.stderr

    def up(self, *words: str) -> str:
        return self.done("playground", "up", "--simulate-latency", "zero", *words)


@pytest.fixture
def terminal(short: Path) -> Iterator[Terminal]:
    terminal = Terminal(short)
    yield terminal
    terminal.type("playground", "down")
    assert processes.with_environment(MARK, short) == []


def test_one_walk_from_up_to_down_leaves_nothing(terminal: Terminal) -> None:
    said = terminal.up()
    assert f"A playground with h100x2 runs in {terminal.folder}" in said
    terminal.environment["KUBELET_PLUGINS_DIRECTORY_PATH"] = str(terminal.folder / "plugins")

    part = terminal.done("playground", "claim", "slice.gpuslice.dev", "--memory", "9Gi", "--name", "mine")
    share = terminal.done("playground", "claim", "mps", "--memory", "10Gi", "--sm-percent", "25")
    listed = terminal.type("claims").stdout
    released = terminal.done("playground", "release", "mine")
    after = terminal.type("claims").stdout
    ended = terminal.done("playground", "down")

    assert "claim mine: class slice.gpuslice.dev, memory 9Gi\n  has node-1/0000-0a-00-0/mig-1g-19-6, 9984Mi" in part
    assert "[1g.10gb]" in part
    assert "has node-1/0000-18-00-0/mps, 10240 MiB, 25 % of the SMs" in share
    assert "default/mine" in listed
    assert "default/mps-1" in listed
    assert "claim mine is released" in released
    assert "[1g.10gb]" not in released
    assert "default/mine" not in after
    assert ended == f"The playground in {terminal.folder} has ended.\nNothing of it is left.\n"
    assert list(terminal.tmp.iterdir()) == []
    assert processes.with_environment(MARK, terminal.tmp) == []


def test_what_a_playground_cannot_give_is_said_in_one_sentence(terminal: Terminal) -> None:
    terminal.up("--simulate", "l4")
    terminal.done("playground", "claim", "gpu")

    assert "no card of l4 can ever give class mig.gpuslice.dev" in terminal.refused("playground", "claim", "mig")
    busy = terminal.refused("playground", "claim", "timeslice")
    assert "so a pod would stay Pending; release one of gpu-1" in busy
    twice = terminal.refused("playground", "claim", "gpu", "--name", "gpu-1")
    assert "claim gpu-1 exists already" in twice
    assert "there is no claim gpu-2; the claims are: gpu-1" in terminal.refused("playground", "release", "gpu-2")
    large = terminal.refused("playground", "claim", "mps", "--memory", "1E1000000")
    assert "can ever give class mps.gpuslice.dev, memory 1E1000000" in large
    assert "is not a Kubernetes quantity" in terminal.refused("playground", "claim", "mps", "--memory", "1GB", code=2)


def test_a_second_start_says_what_to_do_and_another_folder_holds_another_one(terminal: Terminal) -> None:
    terminal.up("--simulate", "l4")
    other = str(terminal.tmp / "my other one")

    second = terminal.refused("playground", "up")
    beside = terminal.up("--simulate", "t4", "--folder", other)
    claimed = terminal.done("playground", "claim", "gpu", "--folder", other)
    terminal.done("playground", "down", "--folder", other)

    assert "a playground runs already in" in second
    assert "or start another one with --folder" in second
    assert "A playground with t4 runs in" in beside
    assert "has node-1/0000-0a-00-0/gpu" in claimed
    assert terminal.folder.is_dir()
    assert not Path(other).exists()


def test_without_a_playground_the_remedy_is_up(terminal: Terminal) -> None:
    for words in (("claim", "gpu"), ("release", "one"), ("down",)):
        said = terminal.refused("playground", *words)
        assert f"no playground runs in {terminal.folder}; `gpuslice playground up` starts one" in said


def test_after_a_sigkill_down_removes_processes_and_files(terminal: Terminal) -> None:
    pid = processes.named_in(terminal.up("--simulate", "l4"))
    terminal.done("playground", "claim", "mps")  # so that a daemon runs too
    kill(pid)

    said = terminal.refused("playground", "claim", "gpu")
    assert "was killed; `gpuslice playground down` removes its files and processes" in said
    ended = terminal.done("playground", "down")

    assert re.search(r"was killed.\nIts files and [1-9]\d* processes are removed", ended)
    assert list(terminal.tmp.iterdir()) == []
    assert processes.with_environment(MARK, terminal.tmp) == []


def test_after_a_sigkill_up_begins_anew(terminal: Terminal) -> None:
    kill(processes.named_in(terminal.up("--simulate", "l4")))

    said = terminal.up("--simulate", "l4")

    assert said.startswith("A killed playground was there. Its files and 2 processes are removed.\n")
    assert "has node-1" in terminal.done("playground", "claim", "gpu")


def kill(pid: int) -> None:
    """SIGKILL, and return when it has ended."""
    descriptor = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    processes.wait_end(descriptor)


def test_a_driver_that_has_ended_is_named_with_its_log(terminal: Terminal) -> None:
    terminal.up("--simulate", "l4")
    (driver,) = (
        int(path.name)
        for path in Path("/proc").glob("[0-9]*")
        if b"run\0--simulate\0l4" in read(path / "cmdline") and str(terminal.tmp).encode() in read(path / "cmdline")
    )
    kill(driver)

    said = terminal.refused("playground", "claim", "gpu")

    assert f"the driver of the playground has ended ({terminal.folder}/driver-0.log says why)" in said


def read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""


@pytest.mark.parametrize("moment", ["lock", "supervisor-0.log", "driver-0.log"])
def test_ctrl_c_while_it_starts_leaves_nothing(terminal: Terminal, moment: str) -> None:
    terminal.folder.mkdir(mode=0o700)
    watch = FolderWatch(terminal.folder, arrivals=True)
    starting = terminal.begin("playground", "up", "--simulate", "l4")
    seen: list[str] = []
    while moment not in seen:
        select.select([watch.fileno()], [], [], 20)
        seen += watch.read()

    starting.send_signal(signal.SIGINT)
    said = starting.communicate(timeout=30)
    watch.close()

    assert (starting.returncode, *said) == (130, "", "")
    assert list(terminal.tmp.iterdir()) == []
    assert processes.with_environment(MARK, terminal.tmp) == []


def test_ctrl_c_in_a_claim_says_that_the_playground_goes_on(terminal: Terminal) -> None:
    terminal.up("--simulate", "h100")
    node = SimNode(terminal.folder / "plugins/gpuslice.dev/simulated")
    cue = node.cue("hang", "create_compute_instance")
    asking = terminal.begin("playground", "claim", "mig", "--name", "slow")
    assert node.wait_hung(cue, 20)

    asking.send_signal(signal.SIGINT)
    _, said = asking.communicate(timeout=30)
    node.withdraw()
    node.close()

    assert asking.returncode == 1
    assert said.count("\n") == 1
    assert "interrupted, but the playground continues with it" in said
    assert "claim slow is released" in terminal.done("playground", "release", "slow")
