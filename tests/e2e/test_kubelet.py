"""The kubelet's calls as upstream's node tests put a driver through them: late, failing, cut off, and not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.kit.cluster.live import Cluster
from tests.kit.cluster.trouble import until_logged, wait_cleared, wait_deleted, without

_FAILED = "FailedPrepareDynamicResources"


@contextlib.contextmanager
def failing(cluster: Cluster, call: str) -> Iterator[None]:
    """For as long as this lasts, NVML refuses the call."""
    cue = cluster.node.cue("fail", call, times=None)
    try:
        yield
    finally:
        cluster.node.withdraw(cue)


def _start(cluster: Cluster, example: str = "mig-profile") -> str:
    cluster.apply(example, name="one")
    return "one"


def test_a_prepare_that_fails_is_told_and_tried_again(cluster: Cluster) -> None:
    with failing(cluster, "create_compute_instance"):
        name = _start(cluster)
        assert "create_compute_instance" in cluster.event(name, _FAILED, "create_compute_instance")

    cluster.runs(name)
    assert len(cluster.partitions()) == 1


def test_an_unprepare_that_fails_is_tried_again_and_the_pod_goes_then(cluster: Cluster) -> None:
    cluster.runs(_start(cluster))

    with failing(cluster, "destroy_gpu_instance"), until_logged(cluster, "unprepare refused"):
        cluster.kubectl("delete", "pod", "one", "--grace-period=1", "--wait=false")

    wait_deleted(cluster, "one")
    wait_cleared(cluster)


def test_a_prepare_that_fails_is_tried_again_by_a_restarted_kubelet(cluster: Cluster) -> None:
    with failing(cluster, "create_gpu_instance"):
        name = _start(cluster)
        cluster.event(name, _FAILED, "create_gpu_instance")
        with without("kubelet"):
            pass

    cluster.runs(name)


def test_an_unprepare_that_fails_is_tried_again_by_a_restarted_kubelet(cluster: Cluster) -> None:
    cluster.runs(_start(cluster))

    with failing(cluster, "destroy_gpu_instance"):
        with until_logged(cluster, "unprepare refused"):
            cluster.kubectl("delete", "pod", "one", "--grace-period=1", "--wait=false")
        with without("kubelet"):
            pass

    wait_deleted(cluster, "one")
    wait_cleared(cluster)


@pytest.mark.parametrize("call", ["create_gpu_instance", "create_compute_instance"])
def test_a_prepare_that_is_under_way_when_the_kubelet_ends_is_found_done(cluster: Cluster, call: str) -> None:
    cue = cluster.node.cue("hang", call)
    name = _start(cluster)
    assert cluster.node.wait_hung(cue, 30.0)

    with without("kubelet"):
        cluster.node.withdraw(cue)

    cluster.runs(name)
    assert len(cluster.partitions()) == len(cluster.records()) == 1


def test_a_pod_that_is_made_while_the_kubelet_is_away_runs_when_it_is_back(cluster: Cluster) -> None:
    with without("kubelet"):
        name = _start(cluster)
        cluster.kubectl("wait", "--for=condition=PodScheduled", f"pod/{name}", "--timeout=30s")

    cluster.runs(name)


def test_nothing_is_prepared_for_a_pod_that_went_while_the_kubelet_was_away(cluster: Cluster) -> None:
    begin = (cluster.folder / "log" / "driver.log").stat().st_size
    with without("kubelet"):
        name = _start(cluster)
        cluster.kubectl("wait", "--for=condition=PodScheduled", f"pod/{name}", "--timeout=30s")
        cluster.kubectl("delete", "pod", name, "--force", "--grace-period=0")

    cluster.runs(cluster.apply("whole-gpu"))

    said = (cluster.folder / "log" / "driver.log").read_text(encoding="utf-8")[begin:]
    assert "default/whole-gpu-gpu" in said
    assert f"default/{name}-gpu" not in said


def test_a_pod_that_was_there_before_the_driver_runs_when_it_is_there(cluster: Cluster) -> None:
    with without("driver"):
        name = _start(cluster)
        cluster.event(name, _FAILED)  # the kubelet has asked for the driver, and nobody was there

    cluster.runs(name)


def test_a_driver_that_stays_away_offers_nothing_until_it_is_back(cluster: Cluster) -> None:
    slices = [f"resourceslice/{body['metadata']['name']}" for body in cluster.get("resourceslices")]

    with without("driver"):
        cluster.kubectl("wait", "--for=delete", *slices, "--timeout=90s")
        name = _start(cluster)
        cluster.has_to_wait(name)

    cluster.runs(name)
