"""Files that the driver reads at its start, and what `devices` and `claims` read of a running one: whole, torn, or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpuslice import node
from gpuslice.config import Config
from gpuslice.core.inventory import Inventory
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ConfigError, StateError
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.system.host import SimHost

from tests.kit.builders import a_gpu

# ---------------------------------------------------------------- the policy file


def test_without_a_policy_file_the_default_holds() -> None:
    offers = [Inventory.of([a_gpu()], policy, "n1").pools for policy in (node.read_policy(None), Policy.default())]

    assert offers[0] == offers[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there; check the path"),
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
    both = node.known_gpus(nvml, host, tmp_path / "gpus.json")
    node.save_gpus(both, tmp_path / "gpus.json")
    nvml.lose(both[0].uuid)

    assert node.known_gpus(nvml, host, tmp_path / "gpus.json") == both
    nvml.close()


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", "[1]", '["card"]', '[{"uuid": "GPU-1"}]', '[{"profiles": 1}]'])
def test_a_file_of_cards_that_tells_nothing_is_made_again(tmp_path: Path, text: str) -> None:
    nvml, host = SimNvml(tmp_path / "node", "h100x2", latency="zero"), SimHost(tmp_path / "node")
    path = tmp_path / "gpus.json"
    path.write_text(text)

    found = node.known_gpus(nvml, host, path)
    node.save_gpus(found, path)

    assert [gpu.index for gpu in found] == [0, 1]
    assert len(json.loads(path.read_text())) == 2
    nvml.close()


# ---------------------------------------------------------------- settings of a running driver


def settings(folder: Path, text: str) -> Config:
    """The configuration of a `gpuslice devices` beside a driver that has left this file."""
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
            match=r"running\.json is not .* \(.*\); start the driver again, or give --node-name, and --simulate",
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
