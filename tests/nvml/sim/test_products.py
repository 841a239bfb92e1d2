"""The simulated products compared with raw answers of NVML on real cards (tests/golden/nvml, made by `hack/gpu run`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core.model import MIB, MigProfile, Placement
from gpuslice.nvml.sim.models import product

GOLDEN = Path(__file__).parents[2] / "golden" / "nvml"
SEEN = {"h200": "h200-580.159.04"}  # product: the file of its answers, MIG mode off


def answers(key: str) -> dict[str, Any]:
    return dict(json.loads((GOLDEN / f"{SEEN[key]}.json").read_text(encoding="utf-8")))


def profiles(found: dict[str, Any]) -> dict[int, MigProfile]:
    """As `nvml/mig.py` makes them of these answers."""
    there = {}
    for name, info in found.items():
        if name.startswith("0.profile."):
            places = found[name.replace("profile", "placements")]
            there[info["id"]] = MigProfile(
                id=info["id"],
                name=info["name"].removeprefix("MIG "),
                memory_mib=info["memorySizeMB"],
                compute_slices=info["sliceCount"],
                multiprocessors=info["multiprocessorCount"],
                copy_engines=info["copyEngineCount"],
                decoders=info["decoderCount"],
                encoders=info["encoderCount"],
                jpegs=info["jpegCount"],
                ofas=info["ofaCount"],
                max_instances=info["instanceCount"],
                placements=tuple(Placement(start, size) for start, size in places),
                suffix=info["name"].partition("gb")[2],
            )
    return there


@pytest.mark.parametrize("key", SEEN)
def test_a_simulated_product_has_the_profiles_of_the_real_one(key: str) -> None:
    assert {profile.id: profile for profile in product(key).profiles} == profiles(answers(key))


@pytest.mark.parametrize("key", SEEN)
def test_a_simulated_product_is_the_card_that_the_real_one_is(key: str) -> None:
    found, model = answers(key), product(key)

    assert model.name == found["0.nvmlDeviceGetName"]
    assert model.compute_capability == ".".join(map(str, found["0.nvmlDeviceGetCudaComputeCapability"]))
    assert model.memory_mib * MIB == found["0.memory_v2"]["total"]
    assert model.reserved_mib == found["0.memory_v2"]["reserved"] // MIB  # whole MiB; the real one has 64 KiB more
    assert int(model.pci_device_id, 16) == found["0.nvmlDeviceGetPciInfo"]["pciDeviceId"]
    assert model.resetless == (found["0.fields"][0] == [184, 0, 1])  # NVML_FI_DEV_IS_RESETLESS_MIG_SUPPORTED
    assert model.inferred == ()
