"""Several pods on one card, each with a part of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kit.cluster.bodies import attribute, exactly, inside, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.wanted import ROOT

INSTALLED = True


def on_the_first_card(cluster: Cluster) -> str:
    """CEL that only devices of the node's first card fulfil."""
    return f"{attribute('parentUUID')} == '{cluster.node.cards[0].uuid}'"


def card(device: str) -> str:
    """`node1/0000-0a-00-0/mig-1g-19-0` → its pool."""
    return device.rpartition("/")[0]


def sharers(cluster: Cluster, *pods: str) -> None:
    """Pods with a claim from template `share`, one after the other.

    The scheduler for a moment counts a share twice that it has just given away (seen with 1.36.3 and 1.37.1), so that of
    several at once the one that would fill the card may find no room, and is not tried again before something changes.
    """
    for name in pods:
        cluster.create(pod(name, made_from("share")))
        cluster.runs(name)


def test_seven_pods_have_the_seven_partitions_of_one_card(cluster: Cluster) -> None:
    pods = [f"part-{n}" for n in range(7)]
    cluster.create(template("part", exactly("mig", where=profile("1g.10gb"))))

    cluster.create(*(pod(name, made_from("part")) for name in pods))

    cluster.runs(*pods)
    told = [cluster.environment(name) for name in pods]
    assert len({said["GPUSLICE_GPU_UUID"] for said in told}) == 7
    assert len({said["GPUSLICE_GPU_DEVICE"] for said in told}) == 7
    assert len({card(said["GPUSLICE_GPU_DEVICE"]) for said in told}) == 1
    assert {said["GPUSLICE_GPU_UUID"] for said in told} == {partition.uuid for partition in cluster.partitions()}


def test_a_partition_is_there_only_while_its_pod_is(cluster: Cluster) -> None:
    assert cluster.partitions() == []
    pods = [cluster.apply("mig-profile", name=f"mig-{n}") for n in (1, 2)]
    cluster.runs(*pods)
    second = cluster.environment(pods[1])["GPUSLICE_GPU_UUID"]

    cluster.delete(pods[0])

    assert [partition.uuid for partition in cluster.partitions()] == [second]
    cluster.delete(pods[1])
    assert cluster.partitions() == []


@pytest.mark.parametrize(("command", "said"), [("devices", "held by default/"), ("claims", "prepared")])
def test_the_commands_of_the_driver_show_on_the_node_who_holds_what(cluster: Cluster, command: str, said: str) -> None:
    cluster.create(template("t", exactly("mig", where=profile("1g.10gb"))), pod("one", made_from("t")))
    cluster.runs("one")

    plugins = cluster.folder / "kubelet" / "plugins"
    flags = (f"--simulate={cluster.facts['gpus']}", "--node-name=node1", f"--kubelet-plugins-directory-path={plugins}")
    asked = [sys.executable, "-m", "gpuslice", command, *flags]
    shown = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    assert said in shown
    assert cluster.environment("one")["GPUSLICE_GPU_DEVICE"].rpartition("/")[2] in shown
    assert "one-gpu-" in shown


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
def test_pods_of_two_namespaces_share_a_card_and_one_may_leave(cluster: Cluster, mode: str) -> None:
    share = template("share", exactly(mode, capacity={"memory": "9Gi"}))
    namespaces = [cluster.namespace() for _ in range(2)]
    for namespace in namespaces:
        cluster.create(*inside(namespace, share, pod("sharer", made_from("share"))))
        cluster.runs("sharer", namespace=namespace)
    first, second = (cluster.environment("sharer", namespace=namespace) for namespace in namespaces)

    cluster.delete("sharer", namespace=namespaces[0])

    assert first["GPUSLICE_GPU_UUID"] == second["GPUSLICE_GPU_UUID"]
    assert cluster.environment("sharer", namespace=namespaces[1]) == second
    assert len(cluster.records()) == len(cluster.cdi_files()) == 1
    assert len(cluster.daemons()) == (mode == "mps")


def test_the_mps_daemon_goes_with_the_last_share(cluster: Cluster) -> None:
    pods = [cluster.apply("mps-share", name=f"mps-{n}") for n in (1, 2)]
    cluster.runs(*pods)
    before = cluster.daemons()

    cluster.delete(pods[0])
    between = cluster.daemons()
    cluster.delete(pods[1])

    assert len(before) == 1
    assert between == before
    assert cluster.daemons() == ()


@pytest.mark.parametrize(
    ("mode", "capacity"),
    [("timeslice", {"memory": "1Gi"}), ("mps", {"memory": "1Gi", "smPercent": "25"}), ("mps", {})],
    ids=["by-turns", "by-multiprocessors", "by-memory"],
)
def test_the_fifth_sharer_of_a_card_waits_until_one_has_left(
    cluster: Cluster, mode: str, capacity: dict[str, str]
) -> None:
    cluster.create(template("share", exactly(mode, where=on_the_first_card(cluster), capacity=capacity)))
    sharers(cluster, *(f"sharer-{n}" for n in range(1, 5)))
    cluster.create(pod("fifth", made_from("share")))
    assert "cannot allocate all claims" in cluster.has_to_wait("fifth")

    cluster.delete("sharer-3")

    cluster.runs("fifth")
    assert {card(device) for devices in cluster.allocated().values() for device in devices} == {"node1/0000-0a-00-0"}


def test_two_cards_hold_eight_sharers_by_time_and_the_ninth_waits(cluster: Cluster) -> None:
    cluster.create(template("share", exactly("timeslice", capacity={"memory": "1Gi"})))
    sharers(cluster, *(f"sharer-{n}" for n in range(8)))

    cluster.create(pod("ninth", made_from("share")))

    assert "cannot allocate all claims" in cluster.has_to_wait("ninth")
    cards = [card(device) for (device,) in cluster.allocated().values()]
    assert sorted(cards.count(name) for name in set(cards)) == [4, 4]


def test_shares_that_ask_for_more_memory_than_is_left_go_to_the_next_card(cluster: Cluster) -> None:
    for name, memory in (("large", "60Gi"), ("small", "10Gi"), ("next", "30Gi")):
        cluster.create(template(name, exactly("mps", capacity={"memory": memory})), pod(name, made_from(name)))
        cluster.runs(name)

    large, small, next_ = (cluster.environment(name) for name in ("large", "small", "next"))

    assert large["GPUSLICE_GPU_UUID"] == small["GPUSLICE_GPU_UUID"] != next_["GPUSLICE_GPU_UUID"]
    assert [said["GPUSLICE_GPU_MEMORY_MIB"] for said in (large, small, next_)] == ["61440", "10240", "30720"]


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
def test_a_share_may_be_asked_for_with_any_number_of_decimals(cluster: Cluster, mode: str) -> None:
    """With DRAFractionalCapacityRange a step in the policy would end the scheduler's attempt for such a request."""
    for name, memory in (("many", "7.7777Gi"), ("more", "1.123456789Gi")):
        cluster.create(template(name, exactly(mode, capacity={"memory": memory})), pod(name, made_from(name)))

    cluster.runs("many", "more")

    assert [cluster.environment(name)["GPUSLICE_GPU_MEMORY_MIB"] for name in ("many", "more")] == ["7965", "1151"]


def test_a_percent_with_decimals_is_rounded_up(cluster: Cluster) -> None:
    """As docs/policy.md says: 1.37 has DRAFractionalCapacityRange on only with another minimum compatibility version."""
    cluster.create(template("t", exactly("mps", capacity={"smPercent": "12.3456"})), pod("one", made_from("t")))

    cluster.runs("one")

    assert cluster.environment("one")["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "13"
