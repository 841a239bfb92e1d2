"""Requests that cannot be served, and who reports it: the scheduler in the pod's condition, or the driver in its events."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.cluster.bodies import (
    DRIVER,
    Body,
    attribute,
    claim,
    config,
    exactly,
    made_from,
    named,
    pod,
    profile,
    template,
)
from tests.kit.cluster.live import Cluster

_NO_PLACE = "cannot allocate all claims"
_CLASSES = ("gpu", "mig", "mps", "timeslice", "slice")


def everything(cluster: Cluster) -> list[Body]:
    """Every device that the node has published."""
    return [device for body in cluster.get("resourceslices") for device in body["spec"].get("devices", ())]


def never(device: Body) -> dict[str, str]:
    """For each key that a selector may name, CEL that looks at it and that no device fulfils."""
    other = {"string": "'no such value'", "int": "-1", "version": "semver('0.0.1')", "bool": "!true"}
    found = {}
    for name, value in device["attributes"].items():
        if "/" not in name:
            kind = next(iter(value))
            compared = f".compareTo({other[kind]}) < 0" if kind == "version" else f" == {other[kind]}"
            found[name] = attribute(name) + compared
    for name in device["capacity"]:
        found[name] = f"device.capacity['{DRIVER}'].{name}.compareTo(quantity('1000Ti')) > 0"
    return found


# ---------------------------------------------------------------- selectors


def test_whatever_key_a_selector_names_it_finds_or_does_not_but_is_no_error(cluster: Cluster) -> None:
    """A selector that names a key which one device lacks fails the pod again and again, with an error of CEL."""
    ours = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": f"careless.{DRIVER}"},
        "spec": {"selectors": [{"cel": {"expression": f"device.driver == '{DRIVER}'"}}]},
    }
    selectors = {key: cel for device in everything(cluster) for key, cel in never(device).items()}
    assert {"profile", "memoryEnforcement", "timeSliceInterval", "smPercent", "clients"} < selectors.keys()
    pods = [key.lower() for key in selectors]
    cluster.create(ours)
    try:
        for name, cel in zip(pods, selectors.values(), strict=True):
            cluster.create(template(name, exactly("careless", where=cel)), pod(name, made_from(name)))
        told = {name: cluster.has_to_wait(name) for name in pods}
    finally:
        cluster.kubectl("delete", "deviceclass", "careless.gpuslice.dev")
    assert {name: text for name, text in told.items() if _NO_PLACE not in text or "CEL" in text} == {}


@pytest.mark.parametrize("class_", _CLASSES)
def test_a_profile_asked_of_any_class_is_no_error(cluster: Cluster, class_: str) -> None:
    cluster.create(template("t", exactly(class_, where=profile("1g.10gb"))), pod("asks", made_from("t")))

    if class_ in ("mig", "slice"):
        cluster.runs("asks")
        assert cluster.environment("asks")["GPUSLICE_GPU_PROFILE"] == "1g.10gb"
    else:
        assert _NO_PLACE in cluster.has_to_wait("asks")


@pytest.mark.parametrize("means", ["hardware", "mps", "none"])
def test_any_part_of_a_card_by_what_keeps_it_within_its_memory(cluster: Cluster, means: str) -> None:
    chosen = f"{attribute('memoryEnforcement')} == '{means}'"

    cluster.create(template("t", exactly("slice", where=chosen)), pod("asks", made_from("t")))

    cluster.runs("asks")
    assert cluster.environment("asks")["GPUSLICE_GPU_MEMORY_ENFORCEMENT"] == means


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize(
    ("class_", "capacity"),
    [
        ("mps", {"memory": "100Gi"}),
        ("mps", {"memory": "9Gi", "smPercent": "101"}),
        ("mps", {"clients": "49"}),
        ("timeslice", {"shares": "5"}),
        ("timeslice", {"memory": "9Gi", "smPercent": "25"}),
        ("mig", {"memory": "80Gi"}),
        ("gpu", {"memory": "100Gi"}),
    ],
    ids=str,
)
def test_more_than_a_card_has_is_found_nowhere(cluster: Cluster, class_: str, capacity: dict[str, str]) -> None:
    cluster.create(template("t", exactly(class_, capacity=capacity)), pod("greedy", made_from("t")))

    assert _NO_PLACE in cluster.has_to_wait("greedy")
    assert cluster.records() == []


# ---------------------------------------------------------------- opaque config


@pytest.mark.parametrize(
    ("class_", "said", "sentence"),
    [
        ("gpu", {"timeslicing": {"interval": "long"}}, "has the unknown key timeslicing; known keys: "),
        (
            "gpu",
            {"timeSlicing": {"interval": "forever"}},
            "is 'forever' and must be one of: default, short, medium, long",
        ),
        ("mig", {"timeSlicing": {"interval": "long"}}, "remove the setting"),
        ("mps", {"enforcement": "required"}, "ask for a MIG partition or a whole card"),
        ("timeslice", {"timeSlicing": {"interval": "long"}}, "or select by the attribute timeSliceInterval"),
        ("gpu", {"kind": "GpuConfig"}, "must have apiVersion: gpuslice.dev/v1alpha1 and kind: SliceConfig"),
    ],
    ids=["unknown-key", "unknown-value", "on-a-partition", "unmet-demand", "on-a-share", "foreign-kind"],
)
def test_what_is_wrong_with_a_config_stands_in_the_events_of_the_pod(
    cluster: Cluster, class_: str, said: dict[str, Any], sentence: str
) -> None:
    cluster.create(template("t", exactly(class_), config=[config(**said)]), pod("wrong", made_from("t")))

    told = cluster.event("wrong", "FailedPrepareDynamicResources", sentence)

    assert "wrong-gpu-" in told  # which claim it is
    cluster.delete("wrong")
    assert (cluster.records(), cluster.cdi_files(), cluster.partitions()) == ([], [], [])


def test_config_for_another_driver_is_none_of_ours(cluster: Cluster) -> None:
    foreign = config(anything="goes")
    foreign["opaque"]["driver"] = "gpu.example.com"

    cluster.create(template("t", exactly("gpu"), config=[foreign]), pod("fine", made_from("t")))

    cluster.runs("fine")


# ---------------------------------------------------------------- claims that are not ready


def test_a_pod_waits_for_a_claim_that_is_not_there_yet(cluster: Cluster) -> None:
    cluster.create(pod("early", named("late")))

    cluster.create(claim("late", exactly("mig", where=profile("1g.10gb"))))

    cluster.runs("early")


def test_a_pod_waits_for_the_class_of_its_claim(cluster: Cluster) -> None:
    cluster.create(template("t", exactly("example.com")), pod("early", made_from("t")))
    assert "example.com" in cluster.has_to_wait("early")
    rule = f"device.driver == '{DRIVER}' && {attribute('type')} == 'gpu'"
    class_ = {"apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": "example.com"}}

    cluster.create({**class_, "spec": {"selectors": [{"cel": {"expression": rule}}]}})

    try:
        cluster.runs("early")
    finally:
        cluster.kubectl("delete", "deviceclass", "example.com")
