"""Publishing when others delete, servers go away, answers get lost and fields disappear."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from gpuslice.core.pools import reconcile
from gpuslice.kube import Kube
from gpuslice.publishing.publisher import Publisher
from gpuslice.standin import resource_slices
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.publishing import (
    DRIVER,
    FAST,
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
    wipe,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path) as server:
        yield server


@pytest.mark.contract(59)
def test_slices_come_back_after_the_wipe_of_a_starting_kubelet_even_when_it_wipes_again(
    server: StandInApiServer,
) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))

        for _ in range(3):
            wipe(server)
            server.wait(lambda: len(server.all("resourceslices")) == 2)
        assert publisher.published.wait(10)

    assert {body["spec"]["pool"]["generation"] for body in server.all("resourceslices")} == {1}


@pytest.mark.contract(59)
def test_a_slice_that_somebody_deleted_or_edited_is_put_right(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))

        body = next(body for body in server.all("resourceslices") if "devices" in body["spec"])
        server.delete("resourceslices", body["metadata"]["name"])
        server.wait(lambda: len(server.all("resourceslices")) == 2)
        body = next(body for body in server.all("resourceslices") if "devices" in body["spec"])
        server.update("resourceslices", body | {"spec": body["spec"] | {"devices": []}})
        server.wait(lambda: shown(server) == ["n1/a/gpu"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("skipNodeOperations", ["*"]),  # the kubelet would start pods without calling prepare
        ("partitionTypeAttribute", "gpuslice.dev/type"),
        ("perDeviceNodeSelection", True),
        ("allNodes", True),
    ],
)
def test_a_field_that_somebody_adds_to_our_slice_is_taken_away(
    server: StandInApiServer, field: str, value: object
) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))

        for body in server.all("resourceslices"):
            server.update("resourceslices", body | {"spec": body["spec"] | {field: value}})

        server.wait(lambda: not any(field in body["spec"] for body in server.all("resourceslices")))


@pytest.mark.contract(60)
def test_a_watch_that_lags_causes_no_duplicates(server: StandInApiServer) -> None:
    server.hang(times=9, path="watch=true")
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))
        publish_and_wait(publisher, a_pool("gpu"), a_pool("gpu", pool="n1/b"))
        publish_and_wait(publisher, a_pool("mps"), a_pool("gpu", pool="n1/b"))

        assert server.writes["create resourceslices"] == 4
        assert server.writes["update resourceslices"] == 1
        server.release()
    assert server.writes["create resourceslices"] == 4


@pytest.mark.contract(60)
def test_a_conflict_that_the_watch_does_not_explain_is_looked_into(server: StandInApiServer) -> None:
    server.hang(times=9, path="watch=true")
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, plain("gpu"))
        (body,) = server.all("resourceslices")
        server.update("resourceslices", body | {"spec": body["spec"] | {"devices": []}})

        publish_and_wait(publisher, plain("mps"))

        assert shown(server) == ["n1/a/mps"]
        assert publisher.status.error == ""
        server.release()


@pytest.mark.contract(56)
def test_dropped_counters_are_told_and_no_device_is_published_without_them(tmp_path: Path) -> None:
    with an_api_server(tmp_path, "1.35") as server, a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu", "mig-1g-19-0"))
        look_again(server)

        assert publisher.status.dropped == {reconcile.PARTITIONABLE}
        assert shown(server) == []
        assert server.writes["create resourceslices"] == 1


@pytest.mark.contract(56)
def test_dropped_taints_are_told_and_not_fought_over(tmp_path: Path) -> None:
    with an_api_server(tmp_path, dropping=(resource_slices.TAINTS,)) as server, a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu", taints=[TAINT]))
        look_again(server)

        assert publisher.status.dropped == {reconcile.TAINTS}
        assert shown(server) == ["n1/a/gpu"]
        assert server.writes == {"create nodes": 1, "create resourceslices": 2}
        publish_and_wait(publisher, a_pool("mps"))
        assert shown(server) == ["n1/a/mps"]


@pytest.mark.contract(67)
def test_an_api_server_that_is_away_is_waited_for(server: StandInApiServer) -> None:
    server.away()
    told = threading.Event()
    kube = Kube(server.kubeconfig)
    publisher = Publisher(kube, DRIVER, NODE, backoff=FAST, changed=lambda status: told.set() if status.error else None)
    publisher.start()
    publisher.publish([a_pool("gpu")])

    assert told.wait(10)
    assert "no answer from the API server at 127.0.0.1" in publisher.status.error
    server.back()
    assert publisher.published.wait(10)
    publisher.stop()
    kube.close()
    assert publisher.status.error == ""


@pytest.mark.contract(59, 67)
def test_what_was_missed_while_the_api_server_was_away_is_made_up_for(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))
        server.away()
        wipe(server)
        server.store.compact()
        publisher.publish([a_pool("mps")])
        server.back()

        assert publisher.published.wait(10)
        assert shown(server) == ["n1/a/mps"]


@pytest.mark.parametrize("before", ["nothing", "an older pool"])
def test_slices_come_back_after_an_etcd_was_restored_whose_versions_go_back(
    server: StandInApiServer, before: str
) -> None:
    with a_publisher(server) as publisher:
        if before != "nothing":
            publish_and_wait(publisher, a_pool("mps"))
        backup = server.store.snapshot()
        publish_and_wait(publisher, a_pool("gpu"))
        for taint in ("1", "2", "3"):
            publish_and_wait(publisher, a_pool("gpu", taints=[TAINT | {"value": taint}]))
        server.away()
        server.store.restore(backup)
        server.back()

        server.wait(lambda: shown(server) == ["n1/a/gpu"])
        publish_and_wait(publisher, a_pool("other"))

        assert shown(server) == ["n1/a/other"]


def test_a_watch_whose_versions_go_back_is_followed_by_a_list(server: StandInApiServer) -> None:
    """The connection may end at a proxy. Then only the versions show that the server behind it is another one."""
    with a_publisher(server, replace(FAST, watch_s=1)) as publisher:
        backup = server.store.snapshot()
        publish_and_wait(publisher, a_pool("gpu"))

        server.store.restore(backup)

        server.wait(lambda: shown(server) == ["n1/a/gpu"])


def test_an_own_write_that_a_whole_watch_does_not_show_is_looked_for_in_a_list(server: StandInApiServer) -> None:
    """The etcd was restored before the first watch reached the server, so no version goes back for this watch."""
    server.hang(times=9, path="watch=true")
    with a_publisher(server, replace(FAST, watch_s=1)) as publisher:
        backup = server.store.snapshot()
        publish_and_wait(publisher, a_pool("gpu"))

        server.store.restore(backup)
        for number in range(5):  # the versions of others overtake ours
            server.add_node(f"other-{number}")
        server.release()

        server.wait(lambda: shown(server) == ["n1/a/gpu"])


def test_an_own_deletion_that_a_whole_watch_does_not_show_is_looked_for_in_a_list(server: StandInApiServer) -> None:
    with a_publisher(server, replace(FAST, watch_s=1)) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))
        server.wait(lambda: asked(server, "watch=true"))
        server.hang(times=9, path="watch=true")
        hung = asked(server, "watch=true")
        server.wait(lambda: asked(server, "watch=true") > hung)
        backup = server.store.snapshot()
        publish_and_wait(publisher)

        server.store.restore(backup)
        server.release()

        server.wait(lambda: shown(server) == [])


def test_own_writes_that_the_watch_shows_need_no_list(server: StandInApiServer) -> None:
    with a_publisher(server, replace(FAST, watch_s=1)) as publisher:
        for name in ("gpu", "mps", "gpu"):
            publish_and_wait(publisher, a_pool(name))
        publish_and_wait(publisher)
        ended = asked(server, "watch=true") + 2

        server.wait(lambda: asked(server, "watch=true") >= ended)

    assert asked(server, "limit=") == 1


@pytest.mark.contract(67)
@pytest.mark.parametrize("status", [403, 409, 429, 500])
def test_a_refused_write_is_told_and_tried_again(server: StandInApiServer, status: int) -> None:
    errors: list[str] = []
    server.fail(status, times=3, method="POST", path="resourceslices")
    kube = Kube(server.kubeconfig)
    publisher = Publisher(kube, DRIVER, NODE, backoff=FAST, changed=lambda status: errors.append(status.error))
    publisher.start()

    publish_and_wait(publisher, a_pool("gpu"))
    publisher.stop()
    kube.close()

    assert "create resourceslices" in errors[0]
    assert server.writes["create resourceslices"] == 2


@pytest.mark.contract(67)
def test_lost_answers_and_hung_up_watches_end_in_the_wanted_state(server: StandInApiServer) -> None:
    server.cut(times=2, method="POST", path="resourceslices")
    server.cut(times=3, path="watch=true")
    server.fail(410, times=2, path="watch=true")
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))
        wipe(server)
        server.wait(lambda: shown(server) == ["n1/a/gpu"])


@pytest.mark.contract(67)
@pytest.mark.parametrize(
    ("method", "path", "says"),
    [
        ("POST", "/resourceslices", "answered something else than the slice to create resourceslices"),
        ("GET", "limit=", "answered no list of resourceslices"),
    ],
)
def test_an_answer_that_makes_no_sense_is_logged_and_asked_for_again(
    server: StandInApiServer, caplog: pytest.LogCaptureFixture, method: str, path: str, says: str
) -> None:
    server.fail(200, method=method, path=path)
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))

        assert says in caplog.text
        assert shown(server) == ["n1/a/gpu"]
        assert publisher.status.error == ""


def test_an_api_server_that_breaks_each_watch_off_is_told_and_not_asked_without_a_pause(
    server: StandInApiServer,
) -> None:
    server.answer(200, b"", times=2, path="watch=true")  # an empty answer instead of a stream
    errors: list[str] = []
    kube = Kube(server.kubeconfig)
    publisher = Publisher(kube, DRIVER, NODE, backoff=FAST, changed=lambda status: errors.append(status.error))
    publisher.start()
    try:
        server.wait(lambda: asked(server, "watch=true") >= 3)
        publish_and_wait(publisher, a_pool("gpu"))
    finally:
        publisher.stop()
        kube.close()

    assert (
        f"the API server at {kube.server} ended a watch too early; check the API server and the proxies before it"
        in errors
    )


def test_a_watch_that_ends_in_time_is_followed_by_the_next_and_by_a_new_list(
    server: StandInApiServer, caplog: pytest.LogCaptureFixture
) -> None:
    with a_publisher(server, replace(FAST, relist_s=1.5, watch_s=1)) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))

        server.wait(lambda: asked(server, "watch=true") >= 2)
        server.wait(lambda: asked(server, "limit=") >= 2)

        assert (publisher.status.error, server.writes["create resourceslices"]) == ("", 2)


@pytest.mark.contract(57)
def test_slices_follow_a_node_that_is_registered_anew(server: StandInApiServer) -> None:
    with a_publisher(server) as publisher:
        publish_and_wait(publisher, a_pool("gpu"))

        server.delete("nodes", NODE)
        uid = server.add_node(NODE)
        wipe(server)
        server.wait(lambda: len(server.all("resourceslices")) == 2)

    assert {b["metadata"]["ownerReferences"][0]["uid"] for b in server.all("resourceslices")} == {uid}


@pytest.mark.contract(69)
def test_two_instances_that_want_the_same_come_to_rest(server: StandInApiServer) -> None:
    pools = [a_pool("gpu", pool=f"n1/{n}") for n in range(4)]
    with a_publisher(server) as old, a_publisher(server) as new:
        for publisher in (old, new):
            publisher.publish(pools)

        assert old.published.wait(10)
        assert new.published.wait(10)
        once = [f"n1/{n}/gpu" for n in range(4)]
        server.wait(lambda: (len(server.all("resourceslices")), shown(server)) == (8, once))
    with a_publisher(server) as third:
        before = server.writes
        publish_and_wait(third, *pools)

    assert server.writes == before


@pytest.mark.contract(69)
def test_a_new_instance_beside_a_running_one_writes_nothing(server: StandInApiServer) -> None:
    with a_publisher(server) as old:
        publish_and_wait(old, a_pool("gpu"))
        before = server.writes
        with a_publisher(server) as new:
            publish_and_wait(new, a_pool("gpu"))

    assert server.writes == before
