"""Pods of the stand-in API server: deletion, eviction, selectors, and what discovery says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpuslice.answers import Call
from gpuslice.api import Api
from gpuslice.core import json as bodies
from gpuslice.errors import ApiError, ConflictError, DisruptionError, NotFoundError
from gpuslice.standin.apiserver import StandInApiServer

PODS = "/api/v1/namespaces/ns/pods"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with StandInApiServer(tmp_path) as server:
        yield server


@pytest.fixture
def api(server: StandInApiServer) -> Iterator[Api]:
    api = Api(server.kubeconfig)
    yield api
    api.close()


def a_pod(server: StandInApiServer, name: str = "p", node: str = "n1", **labels: str) -> str:
    """A pod on a node; its UID."""
    body = {"metadata": {"name": name, "labels": labels}, "spec": {"nodeName": node} if node else {}}
    return str(server.create("pods", body, "ns")["metadata"]["uid"])


def a_budget(server: StandInApiServer, name: str, allowed: int) -> None:
    body = {
        "metadata": {"name": name},
        "spec": {"selector": {"matchLabels": {"app": "a"}}},
        "status": {"disruptionsAllowed": allowed, "desiredHealthy": 1, "currentHealthy": 1},
    }
    server.create("poddisruptionbudgets", body, "ns")


def evict(api: Api, name: str = "p", uid: str = "") -> dict[str, Any]:
    options = {"preconditions": {"uid": uid}} if uid else {}
    body = {"metadata": {"name": name, "namespace": "ns"}, "deleteOptions": options}
    return api.ask(Call("create", "pods/eviction", f"{PODS}/{name}/eviction", name), None, body)


def test_a_pod_on_a_node_stays_until_its_kubelet_has_ended_it(server: StandInApiServer, api: Api) -> None:
    a_pod(server)
    a_pod(server, "unscheduled", node="")

    for name in ("p", "unscheduled"):
        api.ask(Call("delete", "pods", f"{PODS}/{name}", name))

    (left,) = server.all("pods")
    assert left["metadata"]["name"] == "p"
    assert "deletionTimestamp" in left["metadata"]


def test_without_grace_it_goes_at_once(server: StandInApiServer, api: Api) -> None:
    uid = a_pod(server)
    call = Call("delete", "pods", f"{PODS}/p", "p")

    with pytest.raises(ConflictError):
        api.ask(call, None, {"gracePeriodSeconds": 0, "preconditions": {"uid": "another"}})
    api.ask(call, None, {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})

    assert server.all("pods") == []


def test_an_eviction_is_a_deletion_that_a_budget_may_refuse(server: StandInApiServer, api: Api) -> None:
    a_pod(server, app="a")
    a_pod(server, "q", app="b")
    a_budget(server, "keep", 0)

    with pytest.raises(DisruptionError) as refused:
        evict(api)
    evict(api, "q")

    assert str(refused.value) == "The disruption budget keep needs 1 healthy pods and has 1 currently"
    marked = {pod["metadata"]["name"] for pod in server.all("pods") if "deletionTimestamp" in pod["metadata"]}
    assert marked == {"q"}


def test_a_pod_of_two_budgets_cannot_be_evicted(server: StandInApiServer, api: Api) -> None:
    a_pod(server, app="a")
    for name in ("a", "b"):
        a_budget(server, name, 1)

    with pytest.raises(ApiError, match="more than one PodDisruptionBudget") as refused:
        evict(api)
    assert refused.value.status == 500


def test_another_pod_of_the_name_is_not_evicted(server: StandInApiServer, api: Api) -> None:
    a_pod(server)

    with pytest.raises(ConflictError):
        evict(api, uid="another")
    with pytest.raises(NotFoundError):
        evict(api, "q")
    assert "deletionTimestamp" not in server.get("pods", "p", "ns")["metadata"]


def test_pods_are_selected_by_their_labels(server: StandInApiServer, api: Api) -> None:
    a_pod(server, app="a", tier="x")
    a_pod(server, "q", app="a")

    found, _ = api.whole(Call("list", "pods", PODS), "PodList", bodies.is_object, {"labelSelector": "app=a,tier=x"})

    assert [pod["metadata"]["name"] for pod in found] == ["p"]


@pytest.mark.parametrize(("version", "served"), [("1.34", False), ("1.36", False), ("1.37", True)])
def test_discovery_says_from_when_on_there_are_taint_rules(
    server: StandInApiServer, api: Api, version: str, served: bool
) -> None:
    server.become(version)
    rules = Call("list", "devicetaintrules", "/apis/resource.k8s.io/v1/devicetaintrules")

    listed = api.ask(Call("list", "APIResourceList", "/apis/resource.k8s.io/v1"))

    assert ("devicetaintrules" in [one["name"] for one in listed["resources"]]) == served
    if served:
        assert api.whole(rules, "DeviceTaintRuleList", bodies.is_object)[0] == []
        return
    with pytest.raises(ApiError):
        api.whole(rules, "DeviceTaintRuleList", bodies.is_object)
