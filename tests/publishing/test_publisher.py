"""What is published and what is written for it, against the stand-in API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.publishing import (
    DRIVER,
    NODE,
    TAINT,
    a_pool,
    a_publisher,
    an_api_server,
    asked,
    look_again,
    plain,
    publish_and_wait,
    shown,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path) as server:
        yield server


@pytest.mark.contract(48, 49, 50, 57)
def test_the_first_publish_creates_each_slice_once(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, *[a_pool("gpu", pool=f"n1/{n}") for n in range(8)])

    bodies = server.all("resourceslices")
    assert server.writes == {"create nodes": 1, "create resourceslices": 16}
    assert {b["spec"]["pool"]["generation"] for b in bodies} == {1}
    assert {b["spec"]["pool"]["resourceSliceCount"] for b in bodies} == {2}
    assert {b["spec"]["nodeName"] for b in bodies} == {NODE}
    assert {b["metadata"]["ownerReferences"][0]["uid"] for b in bodies} == {
        server.get("nodes", NODE)["metadata"]["uid"]
    }
    assert {b["metadata"]["name"][:22] for b in bodies} == {"00000-gpuslice.dev-n1-", "00001-gpuslice.dev-n1-"}


def test_nothing_is_written_before_the_first_publish(server: StandInApiServer) -> None:
    with a_publisher(server):
        server.wait(lambda: asked(server, "watch=true"))

    assert "create resourceslices" not in server.writes


@pytest.mark.contract(52)
def test_at_rest_nothing_is_written_however_often_it_looks(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu", capacity={"memory": {"value": "2048Mi"}}, taints=[TAINT]))
        before = server.writes
        publisher.publish([a_pool("gpu", capacity={"memory": {"value": "2048Mi"}}, taints=[TAINT])])

        look_again(server)

    assert server.writes == before


@pytest.mark.contract(52)
def test_a_restart_writes_nothing_and_a_stop_deletes_nothing(server: StandInApiServer) -> None:
    for _ in range(2):
        with a_publisher(server) as publisher:
            publish_and_wait(publisher, a_pool("gpu"))

    assert server.writes == {"create nodes": 1, "create resourceslices": 2}


@pytest.mark.contract(53, 48)
def test_a_new_order_is_one_update_in_the_same_generation(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("a", "b"))
        publish_and_wait(publisher, a_pool("b", "a"))

    assert server.writes["update resourceslices"] == 1
    assert {body["spec"]["pool"]["generation"] for body in server.all("resourceslices")} == {1}


@pytest.mark.contract(54)
def test_the_time_of_a_taint_stays_when_another_device_changes(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, plain("gpu", taints=[TAINT]))
        (body,) = server.all("resourceslices")
        body["spec"]["devices"][0]["taints"][0]["timeAdded"] = "2026-01-01T00:00:00Z"
        server.update("resourceslices", body)

        publish_and_wait(publisher, plain("gpu", "mps", taints=[TAINT]))

    (body,) = server.all("resourceslices")
    assert body["spec"]["devices"][0]["taints"][0]["timeAdded"] == "2026-01-01T00:00:00Z"
    assert body["spec"]["devices"][1]["taints"][0]["timeAdded"] > "2026-01-01T00:00:00Z"


@pytest.mark.contract(51)
def test_slices_named_by_an_older_scheme_are_replaced(server: StandInApiServer) -> None:
    pool = {"name": "n1/a", "generation": 7, "resourceSliceCount": 1}
    spec = {"driver": DRIVER, "nodeName": NODE, "pool": pool, "devices": [{"name": "gpu"}]}
    server.create("resourceslices", {"metadata": {"generateName": "n1-gpuslice.dev-"}, "spec": spec})

    with a_publisher(server) as publisher:
        publish_and_wait(publisher, plain("gpu"))

    (body,) = server.all("resourceslices")
    assert body["metadata"]["name"].startswith("00000-")
    assert body["spec"]["pool"]["generation"] == 8


@pytest.mark.contract(55, 61)
def test_a_faulty_pool_is_told_and_never_sent_and_harms_no_other(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu", "gpu", pool="n1/bad"), a_pool("gpu", pool="n1/good"))
        look_again(server)

        assert shown(server) == ["n1/good/gpu"]
        assert "n1/bad" in publisher.status.rejected[0]
        assert server.writes["create resourceslices"] == 2


@pytest.mark.contract(55)
def test_a_pool_that_becomes_faulty_keeps_what_it_has_published(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))
        publish_and_wait(publisher, a_pool("gpu", "gpu"))

    assert shown(server) == ["n1/a/gpu"]


@pytest.mark.contract(58)
def test_pools_no_longer_wanted_go_and_those_of_others_stay(server: StandInApiServer) -> None:
    spec = {"driver": DRIVER, "nodeName": "n2", "pool": {"name": "n2/a", "generation": 1, "resourceSliceCount": 1}}
    server.create("resourceslices", {"metadata": {"name": "00000-of-n2"}, "spec": spec})
    server.create(
        "resourceslices",
        {"metadata": {"name": "00000-of-other"}, "spec": spec | {"driver": "other.dev", "nodeName": NODE}},
    )

    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu", pool="n1/a"), a_pool("gpu", pool="n1/b"))
        publish_and_wait(publisher, a_pool("gpu", pool="n1/b"))

    assert shown(server) == ["n1/b/gpu"]
    assert len(server.all("resourceslices")) == 4
