"""What an operator does in a year to a driver that our chart installed, while pods of every mode run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from hack.lib.cluster.installed import CHART, NAMESPACE
from tests.kit.cluster.bodies import made_from, pod, template
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.operators import (
    DRIVER,
    KEPT,
    REQUESTS,
    SUPERVISOR,
    Running,
    delete_own,
    helm,
    mps_client,
    own_pods,
    own_uid,
    rollback,
    run_helm,
    upgrade,
)
from tests.kit.cluster.trouble import hack_cluster, versions
from tests.kit.mps_node import StandInProgram

CARDS, INSTALLED, SINCE = "h100x8", True, (1, 37)
_PODS = {f"{mode}-{n}": mode for mode in REQUESTS for n in (1, 2)}


@pytest.fixture
def eight(cluster: Cluster) -> Running:
    """Two pods of each mode."""
    return _eight(cluster)


@pytest.fixture
def client(cluster: Cluster, eight: Running) -> Iterator[StandInProgram]:
    """A program that uses a share."""
    with mps_client(cluster, "mps-1") as program:
        yield program


def _eight(cluster: Cluster, restart: str = "Never") -> Running:
    cluster.create(*(template(mode, request) for mode, request in REQUESTS.items()))
    cluster.create(*(pod(name, made_from(mode), restartPolicy=restart) for name, mode in _PODS.items()))
    return Running.of(cluster, tuple(_PODS))


def _one_more(cluster: Cluster, name: str, mode: str = "mig") -> None:
    cluster.create(pod(name, made_from(mode)))
    cluster.runs(name)


def test_a_changed_value_replaces_the_driver_and_disturbs_no_pod_and_so_does_the_way_back(
    cluster: Cluster, eight: Running, client: StandInProgram
) -> None:
    before, slices, supervisor = own_uid(cluster, DRIVER), versions(cluster), own_uid(cluster, SUPERVISOR)

    upgrade(cluster, "--set", "logLevel=debug")

    changed = own_uid(cluster, DRIVER)
    assert changed != before
    assert eight.undisturbed()
    _one_more(cluster, "after-upgrade")

    rollback(cluster)

    assert own_uid(cluster, DRIVER) not in (before, changed)
    assert eight.undisturbed()
    assert client.quiet()
    assert own_uid(cluster, SUPERVISOR) == supervisor
    assert versions(cluster) == slices
    _one_more(cluster, "after-rollback", "mps")


def test_a_changed_policy_changes_the_offer_and_disturbs_no_pod(
    cluster: Cluster, eight: Running, client: StandInProgram, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault:\n  modes: [gpu, mps, timeslice]\n")

    upgrade(cluster, "--set-file", f"policy={policy}")

    free = [body for body in cluster.get("resourceslices") if body["spec"]["pool"]["name"] not in _held(cluster)]
    names = {device["name"] for body in free for device in body["spec"].get("devices", ())}
    assert names
    assert not {name for name in names if name.startswith("mig-")}
    assert eight.undisturbed()
    assert client.quiet()

    rollback(cluster)

    assert eight.undisturbed()
    _one_more(cluster, "after-rollback")


def test_a_wrong_policy_leaves_the_old_driver_at_work_and_the_way_back_mends_it(
    cluster: Cluster, eight: Running, tmp_path: Path
) -> None:
    before, policy = own_uid(cluster, DRIVER), tmp_path / "policy.yaml"
    policy.write_text("apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault:\n  modes: [whole]\n")

    with contextlib.suppress(AssertionError):  # it may be refused by the chart, or its pods never become ready
        helm("upgrade", "gpuslice", str(CHART), *KEPT, "--set-file", f"policy={policy}")

    reasons = cluster.until(
        "pods",
        f"--namespace={NAMESPACE}",
        f"--selector={DRIVER}",
        shows="{..terminated.message}",
        wanted=lambda text: "'whole', which is unknown; use gpu, mig, mps, timeslice" in text,
    )
    assert len(reasons.splitlines()) == 1
    _one_more(cluster, "served-by-the-old")
    assert before in [body["metadata"]["uid"] for body in own_pods(cluster, DRIVER)]
    rollback(cluster)
    assert own_uid(cluster, DRIVER) == before
    assert eight.undisturbed()


def _held(cluster: Cluster) -> set[str]:
    """The pools that have a claim."""
    return {device.rpartition("/")[0] for devices in cluster.allocated().values() for device in devices}


def test_on_the_host_network_an_upgrade_disturbs_no_pod_either(
    cluster: Cluster, eight: Running, client: StandInProgram
) -> None:
    upgrade(cluster, "--set", "hostNetwork=true")
    first = own_uid(cluster, DRIVER)
    assert own_pods(cluster, DRIVER)[0]["spec"]["hostNetwork"]

    upgrade(cluster, "--set", "logLevel=debug")  # both have the same port

    assert own_uid(cluster, DRIVER) != first
    assert eight.undisturbed()
    upgrade(cluster, "--set", "hostNetwork=false,logLevel=info")
    assert eight.undisturbed()
    assert client.quiet()
    _one_more(cluster, "after")


def test_a_deleted_pod_of_the_driver_is_replaced_and_nobody_notices(
    cluster: Cluster, eight: Running, client: StandInProgram
) -> None:
    slices = versions(cluster)

    delete_own(cluster, DRIVER)

    assert eight.undisturbed()
    assert client.quiet()
    assert versions(cluster) == slices
    _one_more(cluster, "after")


@pytest.mark.parametrize("labels", [(SUPERVISOR,), (DRIVER, SUPERVISOR)], ids=["alone", "with the driver"])
def test_a_deleted_pod_of_the_supervisor_ends_only_programs_of_mps(
    cluster: Cluster, eight: Running, client: StandInProgram, labels: tuple[str, ...]
) -> None:
    delete_own(cluster, *labels)

    assert client.wait() == 1  # its server has ended with the supervisor, in order
    assert eight.undisturbed()
    with mps_client(cluster, "mps-1"):  # a program of the same pod that starts again has the same share
        pass
    _one_more(cluster, "after", "mps")


def test_a_drained_node_has_no_claims_and_takes_pods_again_after_it(cluster: Cluster, eight: Running) -> None:
    cluster.kubectl("drain", "node1", "--ignore-daemonsets", "--force", "--timeout=120s")
    try:
        cluster.nothing_stays()
        assert len(own_pods(cluster, DRIVER)) == len(own_pods(cluster, SUPERVISOR)) == 1
        cluster.create(pod("waits", made_from("mig")))
        cluster.has_to_wait("waits")
    finally:
        cluster.kubectl("uncordon", "node1")

    cluster.runs("waits")


@pytest.mark.timeout(300, func_only=True)
def test_after_a_reboot_all_pods_have_what_they_had(cluster: Cluster) -> None:
    _eight(cluster, restart="Always")
    before = {name: cluster.environment(name)["GPUSLICE_GPU_DEVICE"] for name in _PODS}

    hack_cluster("reboot")

    for name in _PODS:
        cluster.kubectl(
            "wait", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", f"pod/{name}", "--timeout=120s"
        )
    cluster.runs(*_PODS)
    assert {name: cluster.environment(name)["GPUSLICE_GPU_DEVICE"] for name in _PODS} == before
    cluster.delete(*_PODS)
    cluster.nothing_stays()


def test_a_second_release_is_refused_by_a_sentence(cluster: Cluster) -> None:
    driver = own_uid(cluster, DRIVER)

    for name, namespace in (("another", NAMESPACE), ("gpuslice", "elsewhere")):
        refused = run_helm("install", name, str(CHART), "--create-namespace", namespace=namespace)
        assert refused.returncode != 0
        assert f"gpuslice is installed already, as release gpuslice in namespace {NAMESPACE}" in refused.stderr
        assert name not in [one["name"] for one in _releases() if one["namespace"] != NAMESPACE]

    assert own_uid(cluster, DRIVER) == driver


def test_without_the_label_of_a_gpu_node_the_notes_name_the_labels_and_the_command(cluster: Cluster) -> None:
    said = helm("upgrade", "gpuslice", str(CHART), *KEPT, "--set", "simulate=", "--dry-run=server")

    assert "none of the 1 nodes of this cluster has the labels that the chart expects" in said
    assert "feature.node.kubernetes.io/pci-10de.present=true  (affinity)" in said
    assert "kubectl label node NODE nvidia.com/gpu.present=true" in said


def _releases() -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads(helm("list", "--all-namespaces", "--output=json"))
    return found


def test_pods_that_came_before_the_driver_start_when_it_is_installed(cluster: Cluster) -> None:
    cluster.create(*(template(mode, request) for mode, request in REQUESTS.items()))
    values = cluster.folder / "values.json"
    helm("uninstall", "gpuslice", "--wait")
    cluster.create(pod("without"), pod("waits", made_from("mig")))
    cluster.runs("without")
    cluster.has_to_wait("waits")
    plain = Running.of(cluster, ("without",)).seen

    helm("install", "gpuslice", str(CHART), "--values", str(values), "--wait", "--timeout=120s")

    cluster.runs("waits")
    assert Running.of(cluster, ("without",)).seen == plain
    failed = "involvedObject.name=waits,reason=FailedPrepareDynamicResources"
    assert cluster.get("events", f"--field-selector={failed}") == [], "slices came before the kubelet knew the driver"
