"""Decisions of the removal, on bodies of every shape."""

from __future__ import annotations

from typing import Any

import pytest
from gpuslice.core import removal
from gpuslice.core.removal import Helm, Holder, PodRef

RESULT = {"driver": "gpuslice.dev", "pool": "n1/1", "device": "gpu", "request": "gpu"}
TERM = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}


def a_claim(results: object = (RESULT,), users: object = None, selector: object = None) -> dict[str, Any]:
    devices = {"results": list(results) if isinstance(results, tuple) else results}
    allocation = {"devices": devices, "nodeSelector": selector}
    return {
        "metadata": {"namespace": "ns", "name": "c", "uid": "u"},
        "status": {"allocation": allocation, "reservedFor": users},
    }


@pytest.mark.parametrize(
    "body",
    [
        {"metadata": {"namespace": "ns", "name": "c"}},
        {"metadata": {"namespace": "ns", "name": "c"}, "status": {}},
        {"metadata": {"namespace": "ns", "name": "c"}, "status": {"allocation": None}},
        a_claim(results=()),
        a_claim(results=None),
        a_claim(results="gpuslice.dev"),
        a_claim(results=({**RESULT, "driver": "other.example"},)),
    ],
)
def test_a_claim_without_a_device_of_ours_holds_nothing(body: dict[str, Any]) -> None:
    assert removal.holders([body], "gpuslice.dev") == []


def test_a_claim_with_devices_of_several_drivers_holds_ours() -> None:
    body = a_claim(results=({**RESULT, "driver": "other.example"}, RESULT))

    assert removal.holders([body], "gpuslice.dev") == [Holder("ns/c", (), "")]


def test_its_pods_and_its_node_are_those_of_the_allocation() -> None:
    users = [
        {"resource": "pods", "name": "q", "uid": "2"},
        {"resource": "pods", "name": "p", "uid": "1"},
        {"resource": "podgroups", "name": "g", "uid": "3"},
    ]
    (found,) = removal.holders([a_claim(users=users, selector={"nodeSelectorTerms": [TERM]})], "gpuslice.dev")

    assert found == Holder("ns/c", (PodRef("ns", "p", "1"), PodRef("ns", "q", "2")), "n1")
    assert str(found) == "pod ns/p, pod ns/q"


@pytest.mark.parametrize("selector", [None, {}, {"nodeSelectorTerms": None}, {"nodeSelectorTerms": [{}]}, "n1"])
def test_an_allocation_that_names_no_node_counts_on_every_node(selector: object) -> None:
    (found,) = removal.holders([a_claim(selector=selector)], "gpuslice.dev")

    assert found.node == ""
    assert str(found) == "claim ns/c"


@pytest.mark.parametrize(
    ("names", "text"),
    [([], ""), (["a"], "a"), (["a", "b", "a", "c"], "a, b, c"), (["a", "b", "c", "d", "e"], "a, b, c and 2 more")],
)
def test_a_sentence_has_the_first_names_and_the_number_of_the_others(names: list[str], text: str) -> None:
    assert removal.some(names) == text


def test_without_helm_the_objects_are_applied_again() -> None:
    assert Helm().again("gpus") == "kubectl apply -f deploy/"
    assert Helm("mine", "4").again("gpus") == "helm rollback mine 4 --namespace gpus"


@pytest.mark.parametrize(
    ("condition", "ready"),
    [
        ([{"type": "Ready", "status": "True"}], {"n1"}),
        ([{"type": "Ready", "status": "Unknown"}], set()),
        ([{"type": "MemoryPressure", "status": "True"}], set()),
        (None, set()),
    ],
)
def test_a_node_is_ready_if_it_says_so(condition: object, ready: set[str]) -> None:
    node = {"metadata": {"name": "n1"}, "status": {"conditions": condition}}

    assert removal.ready([node]) == ready


def a_pod(*statuses: dict[str, Any], **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "p"}, "status": {"containerStatuses": list(statuses), **status}}


ENDED = {"terminated": {"exitCode": 0}}
REFUSED = {"terminated": {"exitCode": 3, "message": "removed a\ngpuslice: prepared on this node: ns/c\n"}}
BACK_OFF = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}


@pytest.mark.parametrize(
    ("pod", "done", "failed", "waits"),
    [
        (a_pod(), False, "", "its pod has not ended"),
        (a_pod({"state": {"running": {}}}), False, "", "its pod has not ended"),
        (a_pod({"state": ENDED}), True, "", ""),
        (a_pod({"state": BACK_OFF, "lastState": ENDED}), True, "", ""),
        (a_pod({"state": {"running": {}}, "lastState": ENDED}), True, "", ""),
        (a_pod({"state": REFUSED}), False, "prepared on this node: ns/c", "prepared on this node: ns/c"),
        (
            a_pod({"state": BACK_OFF, "lastState": REFUSED}),
            False,
            "prepared on this node: ns/c",
            "prepared on this node: ns/c",
        ),
        (
            a_pod({"state": {"terminated": {"exitCode": 137}}}),
            False,
            "its clean-up ended with exit code 137",
            "its clean-up ended with exit code 137",
        ),
        (
            a_pod({"state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}),
            False,
            "",
            "no such image",
        ),
        (a_pod(conditions=[{"type": "PodScheduled", "message": "too many pods"}]), False, "", "too many pods"),
    ],
)
def test_what_a_clean_up_pod_says(pod: dict[str, Any], done: bool, failed: str, waits: str) -> None:
    assert removal.done(pod) == done
    assert removal.failed(pod) == failed
    if not done:
        assert removal.waits(pod) == waits


def test_a_pod_that_is_not_scheduled_yet_is_of_the_node_of_its_affinity() -> None:
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [TERM]}}

    assert removal.node_of({"spec": {"affinity": {"nodeAffinity": required}}}) == "n1"
    assert removal.node_of({"spec": {"nodeName": "n2", "affinity": {"nodeAffinity": required}}}) == "n2"
    assert removal.node_of({}) == ""


@pytest.mark.parametrize(
    ("status", "number"),
    [
        ({"desiredNumberScheduled": 3, "observedGeneration": 1}, 3),
        ({"desiredNumberScheduled": 0, "observedGeneration": 1}, 0),
        ({"desiredNumberScheduled": 3, "observedGeneration": 0}, None),
        ({}, None),
        (None, None),
    ],
)
def test_the_number_of_pods_counts_when_the_controller_has_counted(status: object, number: int | None) -> None:
    assert removal.desired({"metadata": {"generation": 1}, "status": status}) == number
