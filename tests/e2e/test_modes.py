"""Each way to have a card, from a pod's YAML to what its container finds, through the real scheduler and kubelet."""

from __future__ import annotations

import pytest

from tests.kit.cluster.live import EXAMPLES, Cluster, environment

INSTALLED = True


@pytest.mark.parametrize(
    ("example", "said"),
    [
        ("whole-gpu", {"MEMORY_ENFORCEMENT": "hardware", "MEMORY_MIB": "81152"}),
        ("mig-profile", {"MEMORY_ENFORCEMENT": "hardware", "PROFILE": "1g.10gb"}),
        ("time-slice-share", {"MEMORY_ENFORCEMENT": "none", "MEMORY_MIB": "9216"}),
        ("mps-share", {"MEMORY_ENFORCEMENT": "mps", "MEMORY_MIB": "9216", "SM_PERCENT": "25"}),
    ],
)
def test_a_pod_of_each_mode_runs_and_is_told_what_it_has(cluster: Cluster, example: str, said: dict[str, str]) -> None:
    pod = cluster.apply(example)

    cluster.runs(pod)

    told = cluster.environment(pod)
    assert {name: told.get(f"GPUSLICE_GPU_{name}") for name in said} == said


@pytest.mark.parametrize("example", sorted(path.stem for path in EXAMPLES.glob("*.yaml")))
def test_every_example_runs_as_it_is(cluster: Cluster, example: str) -> None:
    logs = cluster.run_as_it_is(example)

    assert logs
    assert all(environment(log)["GPUSLICE_SIMULATED"] == "true" for log in logs)


def test_the_mode_of_a_card_excludes_the_others(cluster: Cluster) -> None:
    for holder in ("time-slice-share", "whole-gpu"):
        cluster.runs(cluster.apply(holder))

    waiting = [cluster.apply(example) for example in ("mig-profile", "mps-share")]

    assert all("cannot allocate all claims" in cluster.has_to_wait(pod) for pod in waiting)
    assert len(cluster.records()) == 2


def test_a_share_joins_the_card_that_has_its_mode(cluster: Cluster) -> None:
    first, second = (cluster.apply("mps-share", name=f"mps-{n}") for n in (1, 2))

    for pod in (first, second):
        cluster.runs(pod)

    assert cluster.environment(first)["GPUSLICE_GPU_DEVICE"] == cluster.environment(second)["GPUSLICE_GPU_DEVICE"]


def test_after_its_pods_a_card_is_free_for_another_mode(cluster: Cluster) -> None:
    held = [cluster.apply("whole-gpu", name=f"whole-{n}") for n in (1, 2)]
    for pod in held:
        cluster.runs(pod)
    waiting = cluster.apply("mig-profile")
    cluster.has_to_wait(waiting)

    cluster.delete(*held)

    cluster.runs(waiting)


def test_nothing_is_left_after_the_pods(cluster: Cluster) -> None:
    pods = [cluster.apply(example) for example in ("mig-profile", "mps-share")]
    for pod in pods:
        cluster.runs(pod)
    assert len(cluster.records()) == len(cluster.cdi_files()) == 2

    cluster.delete(*pods)

    assert cluster.records() == cluster.cdi_files() == []
    assert cluster.get("resourceclaims") == []
