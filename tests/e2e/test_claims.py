"""The life of a claim: when it comes, when it goes, and what holds it up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.faults import Effect

from tests.kit.cluster.bodies import attribute, claim, exactly, made_from, named, pod, profile, template
from tests.kit.cluster.live import Cluster

INSTALLED = True

PART = exactly("mig", where=profile("1g.10gb"))
_MAKING, _REMOVING = "create_gpu_instance", "destroy_gpu_instance"
_WAIT = "--timeout=30s"


@contextlib.contextmanager
def hanging(cluster: Cluster, call: str) -> Iterator[str]:
    """The next such call to the first card does not come back while this lasts."""
    cue = cluster.node.cue("hang", call, cluster.node.cards[0].uuid)
    try:
        yield cue
    finally:
        cluster.node.withdraw(cue)


def faulty(cluster: Cluster, call: str, effect: Effect = "fail") -> None:
    """The next such call to the first card comes to nothing."""
    cluster.node.cue(effect, call, cluster.node.cards[0].uuid, code=Code.UNKNOWN)


# ---------------------------------------------------------------- with its pod


def test_a_claim_from_a_template_goes_with_its_pod(cluster: Cluster) -> None:
    cluster.create(template("t", PART), pod("one", made_from("t")))
    cluster.runs("one")
    (body,) = cluster.get("resourceclaims")

    cluster.delete("one")

    cluster.kubectl("wait", "--for=delete", f"resourceclaim/{body['metadata']['name']}", _WAIT)
    assert len(cluster.get("resourceclaimtemplates")) == 1


def test_a_pod_that_has_ended_holds_nothing(cluster: Cluster) -> None:
    cluster.create(template("t", exactly("gpu")))
    for name in ("one", "two"):
        ended = pod(name, made_from("t"))
        ended["spec"]["containers"][0]["command"] = ["true"]
        cluster.create(ended)
        cluster.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{name}", _WAIT)

    cluster.create(pod("three", made_from("t")), pod("four", made_from("t")))

    cluster.runs("three", "four")
    assert {body["metadata"]["name"] for body in cluster.get("pods")} == {"one", "two", "three", "four"}


def test_a_claim_of_its_own_outlives_its_pods_and_is_free_for_the_next(cluster: Cluster) -> None:
    cluster.create(claim("ours", PART), pod("one", named("ours")))
    cluster.runs("one")
    first = cluster.environment("one")
    cluster.delete("one")
    assert cluster.partitions() == []

    cluster.create(pod("two", named("ours")))

    cluster.runs("two")
    second = cluster.environment("two")
    assert first["GPUSLICE_GPU_UUID"] != second["GPUSLICE_GPU_UUID"]  # it was made again


def test_a_claim_that_is_deleted_stays_while_a_pod_uses_it(cluster: Cluster) -> None:
    cluster.create(claim("ours", PART), pod("one", named("ours")))
    cluster.runs("one")

    cluster.kubectl("delete", "resourceclaim", "ours", "--wait=false")

    assert len(cluster.partitions()) == 1
    assert cluster.environment("one")
    cluster.delete("one")
    cluster.kubectl("wait", "--for=delete", "resourceclaim/ours", _WAIT)
    assert cluster.partitions() == []


# ---------------------------------------------------------------- what holds it up


def test_a_new_claim_of_the_same_name_waits_until_the_old_one_is_given_back(cluster: Cluster) -> None:
    cluster.create(claim("ours", PART), pod("old", named("ours")))
    cluster.runs("old")
    second_card = exactly("mig", where=f"{attribute('index')} == 1 && {profile('1g.10gb')}")

    with hanging(cluster, _REMOVING) as cue:
        cluster.kubectl("delete", "pod", "old", "--force", "--grace-period=0")
        cluster.kubectl("delete", "resourceclaim", "ours", _WAIT)
        assert cluster.node.wait_hung(cue, 30)
        cluster.create(claim("ours", second_card), pod("new", named("ours")))
        cluster.event("new", "FailedPrepareDynamicResources", "still exists")

    cluster.runs("new")
    assert cluster.environment("new")["GPUSLICE_GPU_DEVICE"].startswith("node1/0000-18-00-0/")


def test_a_pod_that_is_deleted_while_its_partition_is_made_leaves_nothing(cluster: Cluster) -> None:
    with hanging(cluster, _MAKING) as cue:
        cluster.create(template("t", PART), pod("one", made_from("t")))
        assert cluster.node.wait_hung(cue, 30)
        cluster.kubectl("delete", "pod", "one", "--wait=false")

    cluster.kubectl("wait", "--for=delete", "pod/one", _WAIT)
    cluster.nothing_stays()


def test_a_card_that_hangs_holds_up_no_pod_of_another_card(cluster: Cluster) -> None:
    cluster.create(template("t", PART), template("whole", exactly("gpu")))

    with hanging(cluster, _MAKING) as cue:
        cluster.create(pod("one", made_from("t")))
        assert cluster.node.wait_hung(cue, 30)
        cluster.create(pod("two", made_from("whole")))
        cluster.runs("two")

    cluster.runs("one")


def test_a_prepare_that_fails_is_told_to_the_user_and_tried_again(cluster: Cluster) -> None:
    faulty(cluster, _MAKING)

    cluster.create(template("t", PART), pod("one", made_from("t")))

    assert "one-gpu-" in cluster.event("one", "FailedPrepareDynamicResources")
    cluster.runs("one")
    assert len(cluster.partitions()) == len(cluster.records()) == 1


def test_an_unprepare_that_fails_is_tried_again_until_all_is_given_back(cluster: Cluster) -> None:
    cluster.create(template("t", PART), pod("one", made_from("t")))
    cluster.runs("one")
    faulty(cluster, _REMOVING)

    cluster.delete("one")

    assert (cluster.records(), cluster.cdi_files(), cluster.partitions()) == ([], [], [])
