"""The cards of a node over the life of its driver: lost, hung, gone, back, new."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice import node
from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.system import files
from gpuslice.system.host import SimHost


class Machine:
    def __init__(self, folder: Path) -> None:
        self.nvml = SimNvml(folder / "node", "h100x2+l4", latency="zero", hang_limit_s=1.0)
        self.host = SimHost(folder / "node")
        self.plugin = files.ensure_folder(folder / "plugin")
        self.odd, *self.good = self.nvml.cards

    def start(self) -> node.Cards:
        return node.Cards(self.nvml, self.host, self.plugin, limit_s=2.0)

    def has_run(self) -> None:
        """As a driver of this boot leaves the node."""
        assert len(self.start().remember()) == 3
        files.ensure_folder(self.plugin / "claims" / self.host.boot_id())


@pytest.fixture
def machine(short: Path) -> Iterator[Machine]:
    there = Machine(short)
    yield there
    there.nvml.withdraw()
    there.nvml.close()


def test_a_card_that_is_lost_at_the_first_start_is_news_when_it_is_back(machine: Machine) -> None:
    machine.nvml.lose(machine.odd.uuid)
    cards = machine.start()
    served = cards.remember()
    assert [gpu.uuid for gpu in served] == [gpu.uuid for gpu in machine.good]
    assert cards.news(served) == ""

    machine.nvml.reset(machine.odd.uuid)

    assert machine.odd.uuid in cards.news(served)
    assert cards.news(machine.start().remember()) == ""


@pytest.mark.parametrize("effect", ["lose", "hang", "fail"])
def test_a_card_that_cannot_be_listed_keeps_its_pool_and_the_others_are_listed(
    machine: Machine, effect: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine.has_run()
    machine.nvml.cue(effect, "gpus", machine.odd.uuid, times=None)  # type: ignore[arg-type]

    with caplog.at_level(logging.WARNING):
        served = machine.start().remember()

    assert len(served) == 3
    assert any("GPU 0" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("effect", ["hang", "fail"])
def test_a_node_whose_list_is_refused_or_hangs_keeps_all_cards(machine: Machine, effect: str) -> None:
    machine.has_run()
    machine.nvml.cue(effect, "gpus", code=Code.UNKNOWN, times=None)  # type: ignore[arg-type]

    gpus, sentences = machine.start().known()

    assert len(gpus) == 3 and sentences


def test_a_node_without_a_readable_card_says_so_and_is_asked_again(machine: Machine) -> None:
    for gpu in machine.nvml.cards:
        machine.nvml.lose(gpu.uuid)
    cards = machine.start()
    served, sentences = cards.known()
    assert served == () and any("no GPU can be read on this node" in sentence for sentence in sentences)

    machine.nvml.reset(machine.odd.uuid)

    assert machine.odd.uuid in cards.news(served)


def test_a_card_that_is_not_there_after_a_reboot_goes_with_a_word(machine: Machine) -> None:
    machine.has_run()
    smaller = SimNvml(machine.plugin.parent / "smaller", "h100", latency="zero")

    gpus, sentences = node.Cards(smaller, SimHost(machine.plugin.parent / "smaller"), machine.plugin).known()

    assert [gpu.uuid for gpu in gpus] == [smaller.cards[0].uuid]
    assert sum("its pool is removed" in sentence for sentence in sentences) == 2
    smaller.close()
