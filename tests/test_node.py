"""Files that the driver reads at its start, and that `devices` and `claims` read of a running one: complete, incomplete, or
wrong. And the cards of a node while its driver runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice import node
from gpuslice.config import Config
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import Gpu
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ConfigError, StateError
from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.system import files
from gpuslice.system.host import SimHost

from tests.kit.builders import a_gpu

# ---------------------------------------------------------------- the policy file


def test_without_a_policy_file_the_default_holds() -> None:
    offers = [Inventory.of([a_gpu()], policy, "n1").pools for policy in (node.read_policy(None), Policy.default())]

    assert offers[0] == offers[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist; check the path"),
        (b"\xff\xfe\x00", "is not UTF-8 text (byte 0)"),
        (b"default: [", "is not YAML, line 1, column 11: "),
        (b"apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {modus: [gpu]}", "modus"),
        (b"- gpu", "policy file"),
        (b"# nothing yet", "write apiVersion: gpuslice.dev/v1alpha1"),
    ],
)
def test_a_policy_file_that_cannot_be_used_is_named_in_one_line(
    tmp_path: Path, content: bytes | None, says: str
) -> None:
    path = tmp_path / "policy.yaml"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(ConfigError) as refused:
        node.read_policy(path)

    assert str(refused.value).startswith(f"policy file {path}")
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


# ---------------------------------------------------------------- the cards as last seen


def test_a_lost_card_is_as_it_was_when_last_seen(tmp_path: Path) -> None:
    nvml, host = SimNvml(tmp_path / "node", "h100x2", latency="zero"), SimHost(tmp_path / "node")
    both = remembered(node.Cards(nvml, host, tmp_path))
    nvml.lose(both[0].uuid)

    assert remembered(node.Cards(nvml, host, tmp_path)) == both
    nvml.close()


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[1]", '["card"]', '[{"uuid": "GPU-1"}]', '[{"profiles": 1}]'])
def test_a_file_of_cards_that_tells_nothing_is_made_again(tmp_path: Path, text: str) -> None:
    nvml, host = SimNvml(tmp_path / "node", "h100x2", latency="zero"), SimHost(tmp_path / "node")
    path = tmp_path / "gpus.json"
    path.write_text(text)

    found = remembered(node.Cards(nvml, host, tmp_path))

    assert [gpu.index for gpu in found] == [0, 1]
    assert len(json.loads(path.read_text())) == 2
    nvml.close()


# ---------------------------------------------------------------- lost, hung, gone, back, new


def remembered(cards: node.Cards) -> tuple[Gpu, ...]:
    """Save the settings like a start that gets so far."""
    gpus, _ = cards.known()
    cards.save(gpus)
    return gpus


class Machine:
    def __init__(self, folder: Path) -> None:
        self.nvml = SimNvml(folder / "node", "h100x2+l4", latency="zero", hang_limit_s=1.0)
        self.host = SimHost(folder / "node")
        self.plugin = files.ensure_folder(folder / "plugin")
        self.odd, *self.good = self.nvml.cards

    def start(self) -> node.Cards:
        return node.Cards(self.nvml, self.host, self.plugin, limit_s=2.0)

    def has_run(self) -> None:
        """The node as a driver of this boot leaves it."""
        assert len(remembered(self.start())) == 3
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
    served = remembered(cards)
    assert [gpu.uuid for gpu in served] == [gpu.uuid for gpu in machine.good]
    assert cards.news(served) == ""

    machine.nvml.reset(machine.odd.uuid)

    assert machine.odd.uuid in cards.news(served)
    assert cards.news(remembered(machine.start())) == ""


@pytest.mark.parametrize("effect", ["lose", "hang", "fail"])
def test_a_card_that_cannot_be_listed_keeps_its_pool_and_the_others_are_listed(machine: Machine, effect: str) -> None:
    machine.has_run()
    machine.nvml.cue(effect, "gpus", machine.odd.uuid, times=None)  # type: ignore[arg-type]

    served, sentences = machine.start().known()

    assert len(served) == 3
    assert any("GPU 0" in sentence for sentence in sentences)


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


# ---------------------------------------------------------------- settings of a running driver


def settings(folder: Path, text: str) -> Config:
    """The configuration of a `gpuslice devices` next to a driver that has left this file."""
    config = Config(kubelet_plugins_directory_path=folder)
    config.plugin_folder.mkdir(parents=True)
    (config.plugin_folder / "running.json").write_text(text)
    return config


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"node_name": "n1", "policy": 7, "simulate": "h100"}'])
def test_settings_of_a_running_driver_that_cannot_be_read_name_the_flags_to_give_instead(
    tmp_path: Path, text: str
) -> None:
    config = settings(tmp_path, text)

    with (
        pytest.raises(
            StateError,
            match=r"running\.json is not .* \(.*\); start the driver again, or use --node-name, and --simulate",
        ),
        node.snapshot(config),
    ):
        pass


def test_settings_of_an_older_driver_are_enough_to_show_its_node(tmp_path: Path) -> None:
    older = {"node_name": "n1", "policy": "", "simulate": "h100x2", "simulate_folder": str(tmp_path / "sim")}
    config = settings(tmp_path, json.dumps(older))

    with node.snapshot(config) as found:
        assert [pool.name.startswith("n1/") for pool in found.inventory.pools] == [True, True]
        assert found.records == {}
