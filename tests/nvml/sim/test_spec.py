"""What `--simulate` accepts, and the errors for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpuslice.errors import ConfigError
from gpuslice.nvml.sim.models import catalogue, known, product
from gpuslice.nvml.sim.spec import Card, NodeSpec, parse


def test_cards_are_counted_and_joined() -> None:
    node = parse("h100x2+a100-40g:mig+rtx-pro-6000x1+l4")
    assert [(card.product, card.mig) for card in node.cards] == [
        ("h100", False),
        ("h100", False),
        ("a100-40g", True),
        ("rtx-pro-6000", False),
        ("l4", False),
    ]


@pytest.mark.parametrize("text", ["", "h100x0", "h100x", "H100", "h100x99", "h100 + l4", "+h100", "h100x9+h100x9"])
def test_what_is_no_node_is_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(text)
    assert "\n" not in str(refused.value)


def test_a_product_that_nobody_knows_fully_is_refused_with_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"b300 cannot be simulated.*memory_mib.*1g\.34gb"):
        parse("b300x8")


def test_every_product_is_either_complete_or_says_what_it_lacks() -> None:
    for key, body in catalogue().items():
        if key in known():
            model = product(key)
            # Not less what is reserved: a real H200 says 143360 MiB of 7g.141gb, and 143156 MiB beside its reserve.
            assert all(model.memory_mib >= p.memory_mib for p in model.profiles)
        else:
            assert body["missing"]


def test_an_ambiguous_name_is_answered_with_the_ones_that_exist() -> None:
    with pytest.raises(ConfigError, match="a100-40g, a100-80g"):
        parse("a100")


def test_mig_on_a_card_without_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="t4, which has no MIG"):
        parse("t4:mig")


def test_a_file_describes_a_node(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(
        "driverVersion: '575.1'\ngpus:\n- {product: h100, count: 2, mig: true, numaNode: 1}\n- {product: t4}\n"
    )
    assert parse(file) == parse(str(file))
    assert parse(file) == NodeSpec(
        driver_version="575.1",
        cards=(*(Card(product="h100", mig=True, numa_node=1),) * 2, Card(product="t4")),
    )


def test_a_file_can_bring_a_product_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(
        """
gpus: [{product: tiny}]
products:
  tiny:
    {name: Tiny, architecture: Hopper, compute_capability: "9.0", memory_mib: 1000, reserved_mib: 0,
     pci_device_id: "0x1", resetless: true, profiles: [
       {name: 1g.1gb, id: 3, memory_mib: 500, compute_slices: 1, multiprocessors: 2, copy_engines: 1, decoders: 0,
        encoders: 0, jpegs: 0, ofas: 0, max_instances: 2, starts: [0, 1], size: 1}]}
"""
    )
    (model,) = parse(file).models()
    assert (model.name, model.memory_slices, model.profiles[0].id) == ("Tiny", 2, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gpus: []", "no list gpus"),
        ("gpu: [{product: h100}]", "unknown keys gpu"),
        ("gpus: [{product: h100, mig: 'yes'}]", "mig is 'yes'"),
        ("gpus: [{product: h100, count: 0}]", "count is 0"),
        ("gpus: [{count: 1}]", "names no product"),
        ("gpus: [h100", "is not YAML"),
        ("gpus: [{product: x}]\nproducts: {x: {name: X}}", "lacks architecture"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        parse(file)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/node\.yaml"):
        parse("/nowhere/node.yaml")
