"""The DeviceClasses of deploy/: each device is in its classes, and the names of NVIDIA's device plugin fit."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from gpuslice.core.inventory import Inventory
from gpuslice.core.pools.pool import Features

from tests.kit.builders import a_policy
from tests.kit.device_classes import classes, devices, is_in
from tests.kit.manifests import DEPLOY, DRIVER, Body, documents
from tests.kit.rig import NODE, Rig

CLASSES = {
    "gpu": {"gpu.gpuslice.dev"},
    "mig": {"mig.gpuslice.dev", "slice.gpuslice.dev"},
    "mps": {"mps.gpuslice.dev", "slice.gpuslice.dev"},
    "timeslice": {"timeslice.gpuslice.dev", "slice.gpuslice.dev"},
    "monitor": {"monitor.gpuslice.dev"},
}
PROFILES = {name for name in classes() if name.startswith("mig-")}  # one for each, for `limits` only


def assert_in_its_classes(found: Iterable[Body]) -> set[str]:
    """The types of these devices."""
    types = set()
    for device in found:
        type_ = device["attributes"]["type"]["string"]
        assert {name for name in classes().keys() - PROFILES if is_in(name, device)} == CLASSES[type_]
        profile = device["attributes"]["profile"]["string"] if type_ == "mig" else ""
        assert {name for name in PROFILES if is_in(name, device)} == {f"mig-{profile}.{DRIVER}"} & PROFILES
        types.add(type_)
    return types


@pytest.mark.parametrize("node", ["h100x2", "a30:mig+l4", "a100-40g:mig"])
def test_every_device_is_in_its_classes_and_breaks_no_selector(tmp_path: Path, node: str) -> None:
    assert assert_in_its_classes(devices(Rig(tmp_path, node).inventory)) == CLASSES.keys()


def test_shared_partitions_are_in_the_classes_of_shares_and_not_in_that_of_partitions(tmp_path: Path) -> None:
    policy = a_policy(modes=["mig"], sharedPartitions=["mps", "timeslice"])
    inventory = Inventory.of(Rig(tmp_path).gpus, policy, NODE)

    assert assert_in_its_classes(devices(inventory)) == {"mig", "mps", "timeslice", "monitor"}


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
def test_fixed_parts_of_a_card_are_in_the_classes_of_shares(tmp_path: Path, mode: str) -> None:
    older = Features(partitionable=False, consumable=False, taints=False)
    inventory = Inventory.of(Rig(tmp_path).gpus, a_policy(static={mode: 4}), NODE, static=True)

    assert assert_in_its_classes(devices(inventory, older)) == {mode, "monitor"}


def test_pods_written_for_nvidias_device_plugin_get_what_its_names_say() -> None:
    mapped = {
        body["spec"]["extendedResourceName"]: body["metadata"]["name"]
        for body in documents(DEPLOY / "deviceclasses.yaml")
        if "extendedResourceName" in body["spec"]
    }

    profiles = {name.removesuffix(f".{DRIVER}") for name in PROFILES}
    assert "mig-1g.10gb" in profiles
    assert mapped == {
        "nvidia.com/gpu": f"gpu.{DRIVER}",
        **{f"nvidia.com/{name}": f"{name}.{DRIVER}" for name in profiles},
    }


def test_every_class_of_a_profile_finds_partitions_of_an_h100(tmp_path: Path) -> None:
    partitions = list(devices(Rig(tmp_path, "h100").inventory))

    assert {name for name in PROFILES if not any(is_in(name, device) for device in partitions)} == set()
