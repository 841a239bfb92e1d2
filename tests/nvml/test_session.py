"""The NVML of the process: it may be missing, hang while it starts, or hang while it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice import hardware, node
from gpuslice.config import Config
from gpuslice.core.model import GpuUuid
from gpuslice.errors import DeviceError, HungError
from gpuslice.nvml.listing import Attempt, Listing
from gpuslice.nvml.pulse import during
from gpuslice.nvml.session import Session
from gpuslice.nvml.sim.node import SimNode
from gpuslice.nvml.sim.nvml import SimNvml

SHORT_S = 0.2


class Slow:
    """A start of NVML that hangs until the test lets it go. Counts the starts."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.go, self.begun = folder, threading.Event(), 0
        self.threads: list[threading.Thread] = []

    def __call__(self) -> SimNvml:
        self.begun += 1
        self.threads.append(threading.current_thread())
        with during("nvmlInit"):
            self.go.wait()
        return SimNvml(self.folder, "l4x2", latency="zero")


@pytest.fixture
def slow(short: Path) -> Iterator[Slow]:
    slow = Slow(short)
    yield slow
    slow.go.set()
    for thread in slow.threads:
        thread.join(10)  # it makes the node, and the folder goes


def test_a_start_that_hangs_is_named_and_every_verb_refuses_with_it(slow: Slow) -> None:
    session = Session(slow, start_s=SHORT_S)

    assert "nvmlInit has not returned" in session.problem
    assert session.gpus() == ()
    with pytest.raises(DeviceError, match="nvmlInit has not returned"):
        session.look(GpuUuid("GPU-1"))


def test_a_start_that_hangs_is_not_begun_again_and_counts_when_it_comes_back(slow: Slow) -> None:
    session = Session(slow, start_s=SHORT_S)
    assert not session.comes()
    assert not session.comes()

    slow.go.set()

    while not session.comes():
        pass
    assert len(session.gpus()) == 2
    assert slow.begun == 1
    session.close()


def test_a_list_that_hangs_while_nvml_is_waited_for_is_named(short: Path) -> None:
    nvml = SimNvml(short, "l4x2", latency="zero")
    cue = nvml.cue("fail", "gpus", code=999)
    session = Session(lambda: nvml, start_s=SHORT_S)
    assert session.gpus() == ()
    hang = nvml.cue("hang", "gpus", times=None)

    assert not session.comes()
    assert "has not returned" in session.problem

    nvml.withdraw(hang)
    nvml.withdraw(cue)
    while not session.comes():
        pass
    session.close()


class Endless(SimNvml):
    """NVML whose end hangs, as with a dead driver."""

    go = threading.Event()

    def close(self) -> None:
        self.go.wait()


def test_an_end_that_hangs_holds_up_neither_a_new_session_nor_the_end_of_the_process(short: Path) -> None:
    opened = iter((Endless(short, "l4x2", latency="zero"), SimNvml(short, latency="zero")))
    session = Session(lambda: next(opened), start_s=SHORT_S, end_s=SHORT_S)

    assert session.renew()

    assert session.problem == ""
    assert session.hangs
    session.close()
    Endless.go.set()


def test_an_attempt_hands_on_what_its_call_raises() -> None:
    def refuses() -> None:
        raise DeviceError("no", 3)

    with pytest.raises(DeviceError, match="no"):
        Attempt("a call", refuses).result(SHORT_S)


def test_an_attempt_whose_answer_nobody_foresaw_is_one_sentence() -> None:
    def odd() -> int:
        return int("\xe9")

    with pytest.raises(DeviceError, match=r"^a call failed: ValueError\(.*this is a bug of gpuslice, report it$"):
        Attempt("a call", odd).result(SHORT_S)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def test_a_container_without_threads_has_no_session_and_says_why(slow: Slow, no_threads: None) -> None:
    session = Session(slow, start_s=SHORT_S)

    assert "can't start new thread; raise the limit of processes" in session.problem
    assert not session.comes()


def test_a_card_that_no_thread_can_ask_is_named(no_threads: None) -> None:
    found, lost = Listing[int](SHORT_S).read((0, 1), lambda index: index)

    assert found == ()
    assert [sentence.partition(";")[0] for sentence in lost] == [
        f"GPU {index} cannot be read: can't start new thread" for index in (0, 1)
    ]


# ---------------------------------------------------------------- one look of a command


@pytest.fixture
def config(short: Path) -> Iterator[Config]:
    config = Config(simulate="l4x2", simulate_folder=short / "node", kubelet_plugins_directory_path=short)
    there = SimNode(short / "node", config.simulate)
    yield config
    there.withdraw()
    there.close()


def test_a_look_at_a_node_whose_nvml_hangs_at_its_start_ends_with_a_sentence(config: Config) -> None:
    SimNode(config.simulated_node).cue("hang", "start", times=None)

    with pytest.raises(HungError, match="the start of NVML has not returned"), hardware.visit(config, SHORT_S):
        pass


def test_a_look_at_cards_whose_list_hangs_ends_with_a_sentence(config: Config) -> None:
    with hardware.visit(config) as (nvml, _):
        SimNode(config.simulated_node).cue("hang", "gpus", times=None)

        with pytest.raises(DeviceError, match="the list of this node's GPUs has not returned"):
            node.listed(nvml, SHORT_S)
