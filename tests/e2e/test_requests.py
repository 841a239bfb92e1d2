"""What a user may write in a claim and a pod, and what the containers then find."""

from __future__ import annotations

import pytest

from tests.kit.cluster.bodies import (
    STAY,
    Body,
    attribute,
    claim,
    config,
    container,
    exactly,
    first_of,
    inside,
    made_from,
    named,
    pod,
    profile,
    template,
    wanted,
)
from tests.kit.cluster.live import Cluster

INSTALLED = True

WHOLE = exactly("gpu")
PART = exactly("mig", where=profile("1g.10gb"))


def keys(told: dict[str, str], name: str) -> list[str]:
    """What the container is told under this name, of all its devices."""
    return [value for key, value in sorted(told.items()) if key.startswith("GPUSLICE_") and key.endswith(f"_{name}")]


# ---------------------------------------------------------------- containers and pods of a claim


def test_all_containers_of_a_pod_find_the_device_of_the_claim_and_so_do_init_containers(cluster: Cluster) -> None:
    first = container("first", "gpu", command=("env",))
    two = (container("one", "gpu"), container("two", "gpu"))

    cluster.create(template("t", PART), pod("several", made_from("t"), containers=two, initContainers=[first]))

    cluster.runs("several")
    seen = [cluster.environment("several", name) for name in ("one", "two")]
    assert f"GPUSLICE_GPU_UUID={seen[0]['GPUSLICE_GPU_UUID']}" in cluster.kubectl("logs", "several", "-c", "first")
    assert seen[0] == seen[1]
    assert len(cluster.partitions()) == 1


def test_a_container_that_uses_no_claim_finds_nothing(cluster: Cluster) -> None:
    two = (container("with", "gpu"), container("without"))

    cluster.create(template("t", PART), pod("mixed", made_from("t"), containers=two))

    cluster.runs("mixed")
    assert cluster.environment("mixed", "with")
    assert cluster.environment("mixed", "without") == {}


def test_a_container_finds_only_the_request_that_it_names(cluster: Cluster) -> None:
    large = exactly("mig", "large", where=profile("3g.40gb"))
    small = exactly("mig", "small", where=profile("1g.10gb"))
    two = tuple(container(name) for name in ("large", "small"))
    for body in two:
        body["resources"] = {"claims": [{"name": "gpu", "request": body["name"]}]}

    cluster.create(template("t", large, small), pod("divided", made_from("t"), containers=two))

    cluster.runs("divided")
    assert [keys(cluster.environment("divided", name), "PROFILE") for name in ("large", "small")] == [
        ["3g.40gb"],
        ["1g.10gb"],
    ]


def test_a_claim_is_prepared_for_a_pod_whose_containers_do_not_use_it(cluster: Cluster) -> None:
    cluster.create(template("t", PART), pod("idle", made_from("t"), containers=(container("main"),)))

    cluster.runs("idle")

    assert len(cluster.partitions()) == len(cluster.records()) == 1


def test_pods_of_one_claim_have_the_same_partition_until_the_last_has_gone(cluster: Cluster) -> None:
    cluster.create(claim("ours", PART), *(pod(name, named("ours")) for name in ("one", "two", "three")))
    cluster.runs("one", "two", "three")
    told = [cluster.environment(name) for name in ("one", "two", "three")]

    cluster.delete("one", "three")
    held = cluster.partitions()
    cluster.delete("two")

    assert told[0] == told[1] == told[2]
    assert [partition.uuid for partition in held] == [told[0]["GPUSLICE_GPU_UUID"]]
    assert (cluster.partitions(), cluster.records(), cluster.cdi_files()) == ([], [], [])


def test_pods_of_one_claim_may_come_one_after_the_other(cluster: Cluster) -> None:
    cluster.create(claim("ours", PART), pod("one", named("ours")))
    cluster.runs("one")
    cluster.create(pod("two", named("ours")))
    cluster.runs("two")
    cluster.delete("one")

    cluster.create(pod("three", named("ours")))

    cluster.runs("three")
    assert cluster.environment("three") == cluster.environment("two")
    assert len(cluster.partitions()) == 1


# ---------------------------------------------------------------- several devices


def test_two_whole_cards_of_one_claim_are_two_cards(cluster: Cluster) -> None:
    both = exactly("gpu", "gpus")
    both["exactly"] |= {"allocationMode": "ExactCount", "count": 2}

    cluster.create(template("t", both), pod("pair", made_from("t")))

    cluster.runs("pair")
    uuids = keys(cluster.environment("pair"), "UUID")
    assert sorted(uuids) == sorted(card.uuid for card in cluster.node.cards)


def test_a_pod_may_have_a_card_and_a_partition_of_another(cluster: Cluster) -> None:
    cluster.create(template("whole", WHOLE), template("part", PART))

    cluster.create(pod("both", made_from("whole", "large"), made_from("part", "small")))

    cluster.runs("both")
    assert len(cluster.records()) == 2
    assert {device.rpartition("/")[2] for device in cluster.allocated()["both"]} == {"gpu", "mig-1g-19-6"}


@pytest.mark.parametrize(("constraint", "cards"), [("matchAttribute", 1), ("distinctAttribute", 2)])
def test_two_partitions_are_on_one_card_or_on_two_as_the_claim_says(
    cluster: Cluster, constraint: str, cards: int
) -> None:
    two = [exactly("mig", name, where=profile("3g.40gb")) for name in ("a", "b")]
    said = [{"requests": ["a", "b"], constraint: "gpuslice.dev/parentUUID"}]

    cluster.create(template("t", *two, constraints=said), pod("pair", made_from("t")))

    cluster.runs("pair")
    devices = cluster.allocated()["pair"]
    assert len({device.rpartition("/")[0] for device in devices}) == cards


# ---------------------------------------------------------------- the first that can be had


def h100_else_a100_else_share() -> Body:
    return first_of(
        {"name": "h100", **wanted("mig", where=f"{attribute('architecture')} == 'Hopper' && {profile('3g.40gb')}")},
        {"name": "a100", **wanted("mig", where=f"{attribute('architecture')} == 'Ampere' && {profile('3g.20gb')}")},
        {"name": "share", **wanted("mps", capacity={"memory": "20Gi"})},
    )


def test_of_a_prioritised_list_the_first_is_taken_that_can_be_had(cluster: Cluster) -> None:
    cluster.create(template("t", h100_else_a100_else_share()), template("others", exactly("mps")))
    cluster.create(pod("first", made_from("t")))
    cluster.runs("first")
    assert keys(cluster.environment("first"), "PROFILE") == ["3g.40gb"]

    # On the second card is a share, and on the first no further 3g.40gb after this: only the list's last is left.
    cluster.create(pod("filler", made_from("t")))
    cluster.runs("filler")
    cluster.create(pod("sharer", made_from("others")))
    cluster.runs("sharer")
    cluster.create(pod("last", made_from("t")))

    cluster.runs("last")
    assert keys(cluster.environment("last"), "MEMORY_MIB") == ["20480"]
    assert keys(cluster.environment("last"), "MEMORY_ENFORCEMENT") == ["mps"]


# ---------------------------------------------------------------- opaque config


def test_config_of_a_request_is_for_its_card_and_config_of_the_claim_for_all(cluster: Cluster) -> None:
    cards = [card.uuid for card in cluster.node.cards]
    requests = [
        exactly("gpu", name, where=f"{attribute('uuid')} == '{card}'")
        for name, card in zip(("a", "b"), cards, strict=True)
    ]
    said = [config(timeSlicing={"interval": "short"}), config("b", timeSlicing={"interval": "long"})]

    cluster.create(template("t", *requests, config=said), pod("tuned", made_from("t")))

    cluster.runs("tuned")
    assert [cluster.node.time_slice(card) for card in cards] == [1, 3]  # short and long
    cluster.delete("tuned")
    assert [cluster.node.time_slice(card) for card in cards] == [0, 0]


# ---------------------------------------------------------------- monitoring


def test_a_daemonset_with_admin_access_sees_all_cards_whoever_uses_them(cluster: Cluster) -> None:
    namespace = cluster.namespace(**{"resource.kubernetes.io/admin-access": "true"})
    cluster.create(template("t", WHOLE), pod("user", made_from("t")))
    cluster.runs("user")
    all_cards = exactly("monitor", "gpus")
    all_cards["exactly"] |= {"allocationMode": "All", "adminAccess": True}
    watching = pod("", made_from("all"), restartPolicy="Always")["spec"]
    labels = {"app": "monitor"}
    daemonset = {
        "apiVersion": "apps/v1",
        "kind": "DaemonSet",
        "metadata": {"name": "monitor"},
        "spec": {"selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels}, "spec": watching}},
    }

    cluster.create(*inside(namespace, template("all", all_cards), daemonset))

    try:
        cluster.kubectl("rollout", "status", "daemonset/monitor", f"--namespace={namespace}", "--timeout=30s")
        told = cluster.environment("daemonset/monitor", namespace=namespace)
        assert sorted(keys(told, "UUID")) == sorted(card.uuid for card in cluster.node.cards)
        assert cluster.environment("user")["GPUSLICE_GPU_UUID"] in keys(told, "UUID")
    finally:
        cluster.kubectl("delete", "daemonset/monitor", f"--namespace={namespace}", "--timeout=30s")


def test_admin_access_is_refused_in_a_namespace_that_has_no_label_for_it(cluster: Cluster) -> None:
    all_cards = exactly("monitor", "gpus")
    all_cards["exactly"] |= {"allocationMode": "All", "adminAccess": True}

    with pytest.raises(AssertionError, match="admin access to devices requires the"):
        cluster.create(template("all", all_cards))


# ---------------------------------------------------------------- pods as they were written for a device plugin


@pytest.mark.parametrize(("resource", "found"), [("nvidia.com/gpu", ""), ("nvidia.com/mig-1g.10gb", "1g.10gb")])
def test_a_pod_with_a_limit_and_no_claim_gets_what_the_name_says(cluster: Cluster, resource: str, found: str) -> None:
    main = {**container("main"), "resources": {"limits": {resource: 1}}}

    cluster.create(pod("old", containers=(main,)))

    cluster.runs("old")
    assert "".join(keys(cluster.environment("old"), "PROFILE")) == found
    assert keys(cluster.environment("old"), "MEMORY_ENFORCEMENT") == ["hardware"]


def test_each_container_has_its_own_of_what_its_limits_say(cluster: Cluster) -> None:
    resource = "nvidia.com/mig-1g.10gb"
    two = tuple({**container(name, command=STAY), "resources": {"limits": {resource: 1}}} for name in ("one", "two"))

    cluster.create(pod("old", containers=two))

    cluster.runs("old")
    uuids = [keys(cluster.environment("old", name), "UUID") for name in ("one", "two")]
    assert [len(found) for found in uuids] == [1, 1]
    assert uuids[0] != uuids[1]
    assert len(cluster.partitions()) == 2
