"""Death at every point: before and after each effect on the hardware and on disk, then a new process on the same node.

The dying process is a thread that raises what nothing catches (`Died` is no `Exception`), so no clean-up code runs: the
effect is done or not done, and whatever would have followed is missing. File locks go with the process: `restarted`
builds everything anew from what lies on disk and on the node.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core.model import Claim
from gpuslice.nvml.api import Nvml
from gpuslice.system import files

from tests.kit.rig import Rig, a_claim

EFFECTS = {
    "set_mig_mode",
    "create_gpu_instance",
    "create_compute_instance",
    "destroy_compute_instance",
    "destroy_gpu_instance",
}


class Died(BaseException):
    """The process is gone at this point."""


class Fate:
    """Counts effects and kills at the n-th, before or after it takes place."""

    def __init__(self, at: int) -> None:
        self.at, self.seen = at, 0

    def effect(self, act: Callable[[], Any]) -> Any:
        self._point()
        result = act()
        self._point()
        return result

    def _point(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            raise Died

    @property
    def survived(self) -> bool:
        return self.seen < self.at


class MortalNvml:
    """The node's NVML as a process sees it that may die at any change."""

    def __init__(self, nvml: Nvml, fate: Fate) -> None:
        self._nvml, self._fate = nvml, fate

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._nvml, name)
        if name not in EFFECTS:
            return verb
        return lambda *arguments: self._fate.effect(lambda: verb(*arguments))


def doomed(node: Rig, fate: Fate, monkeypatch: pytest.MonkeyPatch, act: Callable[[Rig], object]) -> None:
    """Run `act` in a process that dies at its point of fate, or lives through it."""
    write, append, remove = files.write_atomic, files.append, files.remove
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", lambda *a, **named: fate.effect(lambda: write(*a, **named)))
        patch.setattr(files, "append", lambda *a: fate.effect(lambda: append(*a)))
        patch.setattr(files, "remove", lambda path: fate.effect(lambda: remove(path)))
        node.build(MortalNvml(node.nvml, fate))
        try:
            act(node)
        except Died:
            pass


def a_mixed_claim(node: Rig) -> Claim:
    return a_claim("one", node.device("mig-3g-9-4"), node.device("gpu", 1), node.device("mig-1g-19-0"))


def every_point(tmp_path: Path, act: Callable[[Rig, Fate], None]) -> int:
    """Kill at the first point, the second, … until the act survives; how many points there were."""
    at = 1
    while True:
        fate = Fate(at)
        act(Rig(tmp_path / str(at)), fate)
        if fate.survived:
            return at - 1
        at += 1


@pytest.mark.contract(33, 41)
def test_after_a_death_anywhere_in_prepare_a_restart_leaves_node_records_and_cdi_in_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(node: Rig, fate: Fate) -> None:
        claim = a_mixed_claim(node)
        doomed(node, fate, monkeypatch, lambda node: node.prepare(claim))
        again = node.restarted()
        again.recover()
        again.assert_agreed()
        again.prepare(claim)
        again.assert_agreed()
        again.unprepare(claim)
        again.assert_empty()

    assert every_point(tmp_path, act) >= 20


@pytest.mark.contract(29, 41)
def test_after_a_death_anywhere_in_prepare_a_retry_or_an_unprepare_converges_without_recovery(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(node: Rig, fate: Fate) -> None:
        claim = a_mixed_claim(node)
        doomed(node, fate, monkeypatch, lambda node: node.prepare(claim))
        again = node.restarted()
        if fate.at % 2:
            again.prepare(claim)
            again.assert_agreed()
        again.unprepare(claim)
        again.assert_empty()
        assert again.partitions() == ()

    assert every_point(tmp_path, act) >= 20


@pytest.mark.contract(45)
def test_after_a_death_anywhere_in_unprepare_a_retry_finishes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(node: Rig, fate: Fate) -> None:
        claim = a_mixed_claim(node)
        node.prepare(claim)
        doomed(node, fate, monkeypatch, lambda node: node.unprepare(claim))
        again = node.restarted()
        again.unprepare(claim)
        again.assert_empty()
        assert again.partitions() == ()

    assert every_point(tmp_path, act) >= 10


@pytest.mark.contract(27)
def test_after_a_death_anywhere_in_unprepare_a_prepare_serves_the_claim_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(node: Rig, fate: Fate) -> None:
        claim = a_mixed_claim(node)
        node.prepare(claim)
        doomed(node, fate, monkeypatch, lambda node: node.unprepare(claim))
        again = node.restarted()
        again.prepare(claim)
        again.assert_agreed()

    assert every_point(tmp_path, act) >= 10


def test_a_death_in_recovery_is_recovered_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(node: Rig, fate: Fate) -> None:
        claim = a_mixed_claim(node)
        doomed(node, Fate(17), monkeypatch, lambda node: node.prepare(claim))
        again = node.restarted()
        assert again.preparer.unfinished()
        doomed(again, fate, monkeypatch, lambda node: node.recover())
        last = again.restarted()
        last.recover()
        last.assert_empty()

    assert every_point(tmp_path, act) >= 5


def test_a_death_never_touches_a_neighbour_on_the_same_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def act(node: Rig, fate: Fate) -> None:
        neighbour = a_claim("neighbour", node.device("mig-1g-19-1"))
        uuid = node.prepare(neighbour).devices[0].uuid
        doomed(node, fate, monkeypatch, lambda node: node.prepare(a_claim("one", node.device("mig-1g-19-0"))))
        again = node.restarted()
        again.recover()
        again.assert_agreed()
        assert uuid in {partition.uuid for partition in again.partitions()}
        assert again.prepare(neighbour).devices[0].uuid == uuid

    assert every_point(tmp_path, act) >= 8
