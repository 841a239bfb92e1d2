"""The simulated daemon reads the files of the simulated node by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpuslice.mps.sim.devices import VisibleError, visible
from gpuslice.nvml.sim.node import SimNode


def test_it_sees_the_cards_that_nvml_lists(tmp_path: Path) -> None:
    node = SimNode(tmp_path, "h100x2+h100:mig+l4")
    whole = [card.uuid for card in node.cards if card.index != 2]

    assert list(visible(str(tmp_path), None)) == whole
    assert visible(str(tmp_path), f"{whole[1]},0") == (whole[1], whole[0])
    with pytest.raises(VisibleError, match="is no usable card or partition here"):
        visible(str(tmp_path), node.cards[2].uuid)


@pytest.mark.parametrize(
    "text",
    ["", " ", "[]", "null", "{", '{"node": ', "{}", "{}}", "{} {}", "\xa0{}", '{"seed": 1, "node": {"gpus": [1]}}'],
)
@pytest.mark.parametrize("name", ["node.json", "gpu0.json"])
def test_a_file_that_is_not_as_it_was_is_one_sentence(tmp_path: Path, name: str, text: str) -> None:
    SimNode(tmp_path, "h100x2").close()
    (tmp_path / name).write_text(f"{text}\n", encoding="utf-8")

    with pytest.raises(VisibleError, match="No simulated node in "):
        visible(str(tmp_path), "0")
