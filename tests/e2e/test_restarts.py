"""Every part of a node and of the control plane ends once, while pods run and while they start."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from tests.kit.cluster.live import Cluster
from tests.kit.cluster.trouble import (
    Instances,
    hack_cluster,
    runs_on,
    until_logged,
    versions,
    wait_cleared,
    wait_deleted,
    wait_logged,
    wait_restarted,
    warnings,
    without,
)

_AWAY_S = 30.0


@pytest.fixture
def instances(cluster: Cluster) -> Iterator[Instances]:
    """Whatever a test starts and stops, the playground's own driver runs alone afterwards."""
    instances = Instances(cluster)
    with contextlib.ExitStack() as stack:
        stack.callback(instances.end)
        stack.callback(hack_cluster, "start", "driver")
        yield instances


def _start(cluster: Cluster, *examples: str, restart: str = "Never") -> list[str]:
    for example in examples:
        cluster.apply(example, name=f"{example}-pod", restart=restart)
    return [f"{example}-pod" for example in examples]


def _run(cluster: Cluster, *examples: str, restart: str = "Never") -> list[str]:
    names = _start(cluster, *examples, restart=restart)
    for name in names:
        cluster.runs(name)
    return names


@pytest.mark.parametrize("call", ["create_gpu_instance", "create_compute_instance"])
def test_a_driver_that_is_killed_in_the_middle_of_a_prepare_finishes_what_it_began(cluster: Cluster, call: str) -> None:
    held = cluster.node.cue("hang", call, done=True)  # it is made, and the driver has not heard of it
    names = _start(cluster, "mig-profile")
    assert cluster.node.wait_hung(held, 30.0)

    os.kill(cluster.process("driver"), signal.SIGKILL)
    cluster.node.withdraw(held)

    for name in names:
        cluster.runs(name)
    assert len(cluster.records()) == len(cluster.cdi_files()) == len(cluster.partitions()) == 1
    hack_cluster("start", "driver")
    cluster.delete(*names)
    wait_cleared(cluster)


def test_a_driver_that_is_killed_while_pods_of_all_kinds_start_is_not_noticed(cluster: Cluster) -> None:
    for examples in (("mig-profile", "mps-share"), ("whole-gpu", "time-slice-share")):
        names = _start(cluster, *examples)
        os.kill(cluster.process("driver"), signal.SIGKILL)

        for name in names:
            cluster.runs(name)
        hack_cluster("start", "driver")
        cluster.delete(*names)
        wait_cleared(cluster)


def test_what_is_deleted_while_the_driver_is_away_is_given_back_when_it_is_there(cluster: Cluster) -> None:
    names = _run(cluster, "mig-profile", "mps-share")

    with without("driver"):
        cluster.kubectl("delete", "pod", *names, "--grace-period=1", "--wait=false")

    wait_deleted(cluster, *names)
    wait_cleared(cluster)


def test_a_rolling_update_writes_no_slice_and_fails_no_pod(cluster: Cluster, instances: Instances) -> None:
    before = versions(cluster)
    (old,) = _run(cluster, "mig-profile")

    wait_logged(instances.start(), "registered with the kubelet")

    hack_cluster("stop", "driver", "--gently")
    (new,) = _run(cluster, "mps-share")

    assert versions(cluster) == before
    assert warnings(cluster, new) == []
    cluster.delete(old, new)
    wait_cleared(cluster)


@pytest.mark.parametrize("late", [False, True], ids=["at its start", "after it was registered"])
def test_an_update_that_fails_leaves_the_old_one_at_work(cluster: Cluster, instances: Instances, late: bool) -> None:
    before = versions(cluster)

    if late:
        wait_logged(instances.start(), "registered with the kubelet")
        instances.kill()
    else:
        instances.start("--policy", "/nowhere/policy.yaml")
        assert instances.code() != 0

    _run(cluster, "mig-profile")
    assert versions(cluster) == before


def test_an_update_one_after_the_other_leaves_the_slices_as_they_are(cluster: Cluster) -> None:
    before = versions(cluster)

    hack_cluster("stop", "driver", "--gently")
    hack_cluster("start", "driver")

    _run(cluster, "mig-profile")
    assert versions(cluster) == before


def test_a_restarted_kubelet_wipes_the_slices_and_gets_them_back(cluster: Cluster) -> None:
    before = versions(cluster)
    names = _run(cluster, "mig-profile")

    with until_logged(cluster, "published"), without("kubelet"):
        pass

    names += _run(cluster, "mps-share")
    after = versions(cluster)
    assert len(after) == len(before)
    assert not {uid for uid, _ in before.values()} & {uid for uid, _ in after.values()}
    assert cluster.environment(names[0])["GPUSLICE_GPU_PROFILE"] == "1g.10gb"
    cluster.delete(*names)
    wait_cleared(cluster)


def test_a_pod_that_is_deleted_while_the_kubelet_is_away_is_given_back(cluster: Cluster) -> None:
    names = _run(cluster, "mig-profile")

    with until_logged(cluster, "unprepare done"), without("kubelet"):
        cluster.kubectl("delete", "pod", *names, "--force", "--grace-period=0", "--wait=false")

    wait_cleared(cluster)


@pytest.mark.timeout(300, func_only=True)
def test_without_the_api_server_for_half_a_minute_the_driver_keeps_all_and_goes_on(cluster: Cluster) -> None:
    before, driver = versions(cluster), cluster.process("driver")
    names = _run(cluster, "mig-profile")

    with without("kube-apiserver"):
        assert runs_on(driver, _AWAY_S)

    assert cluster.process("driver") == driver
    for part in ("kube-scheduler", "kube-controller-manager"):  # they would look again after up to two minutes
        with without(part):
            pass
    names += _start(cluster, "mps-share")
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{names[-1]}", "--timeout=180s")  # nor does the kubelet hurry
    assert versions(cluster) == before
    cluster.delete(*names)
    wait_cleared(cluster)


def test_a_restarted_etcd_is_not_noticed(cluster: Cluster) -> None:
    before, driver = versions(cluster), cluster.process("driver")

    with without("etcd"):
        pass

    names = _run(cluster, "mig-profile", "mps-share")
    assert (versions(cluster), cluster.process("driver")) == (before, driver)
    cluster.delete(*names)
    wait_cleared(cluster)


def test_after_a_reboot_pods_that_start_again_have_what_they_had(cluster: Cluster) -> None:
    names = _run(cluster, "mig-profile", "mps-share", restart="Always")
    before = {name: cluster.environment(name) for name in names}

    hack_cluster("reboot")

    for name in names:
        wait_restarted(cluster, name)
        told = cluster.environment(name)
        assert told["GPUSLICE_GPU_DEVICE"] == before[name]["GPUSLICE_GPU_DEVICE"]
    assert len(cluster.records()) == len(cluster.cdi_files()) == 2
    cluster.delete(*names)
    wait_cleared(cluster)


def test_a_killed_mps_supervisor_is_replaced_and_the_pod_after_it_runs(cluster: Cluster) -> None:
    (held,) = _run(cluster, "mps-share")

    with without("mps-supervisor"):
        pass

    cluster.apply("mps-share", name="after")
    cluster.runs("after")
    cluster.delete(held, "after")
    wait_cleared(cluster)
