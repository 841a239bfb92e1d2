"""The requests of a node to an API server that was away: few, and not together with all other nodes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from gpuslice.core.pools.backoff import BackoffConfig
from gpuslice.kube import Kube
from gpuslice.publishing.publisher import Publisher
from gpuslice.publishing.status import Status
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.publishing import (
    DRIVER,
    FAST,
    NODE,
    TAINT,
    a_line,
    a_publisher,
    an_api_server,
    asked,
    plain,
    publish_and_wait,
    shown,
    wipe,
)

EXPIRED = "lists the ResourceSlices of this node again"
LATE = replace(FAST, spread_s=1e6)  # a list that waits for its turn never comes in a test


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path) as server:
        yield server


@contextmanager
def publishing(server: StandInApiServer, backoff: BackoffConfig) -> Iterator[Publisher]:
    """A publisher that has published a pool and watches."""
    with a_publisher(server, backoff) as publisher:
        server.wait(lambda: asked(server, "watch=true"))
        publish_and_wait(publisher, plain("gpu"))
        yield publisher


def wipe_unseen(server: StandInApiServer, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Delete the slices while the API server is away, so that only a list shows that they are gone."""
    server.away()
    wipe(server)
    server.store.compact()
    meanwhile()
    server.requests.clear()
    server.back()


def break_watches(server: StandInApiServer, *, restarted: bool = False) -> None:
    """`restarted`: the API server knows no former version, as a real server after its start."""
    server.away()
    if restarted:
        server.add_node("another")  # something changes all the time
        server.store.compact()
    server.requests.clear()
    server.back()


def test_a_broken_watch_goes_on_from_the_version_it_had_and_lists_nothing(server: StandInApiServer) -> None:
    with publishing(server, LATE) as publisher:
        for round_ in range(3):
            break_watches(server)
            server.wait(lambda: asked(server, "watch=true"))
            (body,) = server.all("resourceslices")
            server.update("resourceslices", body | {"spec": body["spec"] | {"devices": [{"name": f"odd-{round_}"}]}})
            server.wait(lambda: shown(server) == ["n1/a/gpu"])
            assert publisher.published.wait(10)

            assert asked(server, "limit=") == 0, "it listed"


def test_what_was_missed_comes_with_the_watch_that_goes_on(server: StandInApiServer) -> None:
    with publishing(server, LATE):
        server.away()
        wipe(server)
        server.requests.clear()
        server.back()

        server.wait(lambda: shown(server) == ["n1/a/gpu"])

        assert asked(server, "limit=") == 0


def test_an_error_is_over_once_the_watch_goes_on(server: StandInApiServer) -> None:
    errors: list[str] = []
    broken, over = threading.Event(), threading.Event()

    def note(status: Status) -> None:
        errors.append(status.error)
        (broken if status.error else over).set()

    kube = Kube(server.kubeconfig)
    publisher = Publisher(kube, DRIVER, NODE, backoff=LATE, changed=note)
    publisher.start()
    try:
        publish_and_wait(publisher, plain("gpu"))
        server.wait(lambda: asked(server, "watch=true"))
        over.clear()
        server.away()
        assert broken.wait(10)
        server.back()

        assert over.wait(10)
        assert publisher.published.wait(10)
        assert asked(server, "limit=") == 1
    finally:
        publisher.stop()
        kube.close()


def test_the_lists_of_a_fleet_after_a_restart_of_the_api_server_are_spread(server: StandInApiServer) -> None:
    """Without the spread, every node would list within half a second."""
    with publishing(server, LATE), a_line(EXPIRED) as expired:
        break_watches(server, restarted=True)
        assert expired.wait(10)

    assert asked(server, "watch=true") == 1
    assert asked(server, "limit=") == 0


def test_a_list_comes_when_its_turn_has_come(server: StandInApiServer) -> None:
    with publishing(server, FAST):
        server.away()
        wipe(server)
        server.store.compact()
        server.back()

        server.wait(lambda: shown(server) == ["n1/a/gpu"])


def test_new_pools_do_not_wait_for_the_turn_of_the_list(server: StandInApiServer) -> None:
    with publishing(server, LATE) as publisher, a_line(EXPIRED) as expired:
        break_watches(server, restarted=True)
        assert expired.wait(10)

        publish_and_wait(publisher, plain("gpu", taints=[TAINT]))

        assert asked(server, "limit=") == 0


def test_a_conflict_of_new_pools_lists_at_once_and_the_watch_goes_on_from_there(server: StandInApiServer) -> None:
    with publishing(server, LATE) as publisher, a_line(EXPIRED) as expired:
        server.away()
        (body,) = server.all("resourceslices")
        server.update("resourceslices", body | {"spec": body["spec"] | {"devices": []}})
        server.store.compact()
        server.requests.clear()
        server.back()
        assert expired.wait(10)

        publish_and_wait(publisher, plain("mps"))
        server.wait(lambda: asked(server, "watch=true") == 2)
        wipe(server)
        server.wait(lambda: shown(server) == ["n1/a/mps"])

        assert asked(server, "limit=") == 1


@pytest.mark.contract(59)
def test_a_kubelet_that_registers_while_there_is_no_watch_makes_the_node_list_at_once(
    server: StandInApiServer,
) -> None:
    with publishing(server, LATE) as publisher, a_line(EXPIRED) as expired:
        wipe_unseen(server)
        assert expired.wait(10)
        assert shown(server) == []

        publisher.catch_up()

        server.wait(lambda: shown(server) == ["n1/a/gpu"])
        server.wait(lambda: asked(server, "watch=true") == 2)
        wipe(server)  # the kubelet may be late
        server.wait(lambda: shown(server) == ["n1/a/gpu"])


def test_a_kubelet_that_registers_while_the_api_server_is_away_is_not_forgotten(server: StandInApiServer) -> None:
    with publishing(server, LATE) as publisher:
        wipe_unseen(server, meanwhile=publisher.catch_up)

        server.wait(lambda: shown(server) == ["n1/a/gpu"])

        assert asked(server, "limit=") == 1


@pytest.mark.contract(59)
def test_a_kubelet_that_registers_just_before_the_watch_breaks_is_not_forgotten(server: StandInApiServer) -> None:
    """The publisher notices only later that the watch is dead, and a list in its turn would come a minute later."""
    with publishing(server, LATE) as publisher:
        publisher.catch_up()
        wipe_unseen(server)

        server.wait(lambda: shown(server) == ["n1/a/gpu"])

        assert asked(server, "limit=") == 1


@pytest.mark.contract(59)
def test_a_kubelet_that_registers_before_the_first_list_is_not_forgotten(server: StandInApiServer) -> None:
    """The first slices wait for the kubelet, so this is the usual start. The kubelet may delete the slices only later."""
    with a_publisher(server, LATE, registered=True) as publisher:
        publish_and_wait(publisher, plain("gpu"))
        server.wait(lambda: asked(server, "watch=true"))
        wipe_unseen(server)

        server.wait(lambda: shown(server) == ["n1/a/gpu"])

        assert asked(server, "limit=") == 1


def test_a_kubelet_that_registers_while_the_watch_is_alive_costs_nothing(server: StandInApiServer) -> None:
    with publishing(server, LATE) as publisher:
        (body,) = server.all("resourceslices")
        server.update("resourceslices", body | {"spec": body["spec"] | {"devices": []}})
        server.wait(lambda: shown(server) == ["n1/a/gpu"])  # so the watch is alive
        publisher.catch_up()
        wipe(server)
        server.wait(lambda: shown(server) == ["n1/a/gpu"])

    assert asked(server, "limit=") == 1


def test_a_watch_that_goes_on_without_any_sign_is_followed_by_a_list(server: StandInApiServer) -> None:
    """After the restore of an etcd, the API server has not reached our version yet. A real server then sends nothing."""
    with publishing(server, replace(LATE, watch_s=1)):
        server.bookmarks = False
        break_watches(server)

        server.wait(lambda: asked(server, "limit=") == 1)

    assert asked(server, "watch=true") >= 1


def test_watches_that_only_bring_something_odd_are_followed_by_a_list(server: StandInApiServer) -> None:
    """A watch from the same version would bring the same events for ever."""
    with publishing(server, FAST):
        server.away()
        server.requests.clear()
        server.answer(200, b'{"type": "ADDED", "object": {}}\n', times=1000, path="watch=true")
        server.back()

        server.wait(lambda: asked(server, "limit=") >= 1)

        assert asked(server, "watch=true") >= 3
        server.release()


def test_an_api_server_that_refuses_watches_is_not_asked_for_lists_instead(server: StandInApiServer) -> None:
    with publishing(server, FAST):
        server.away()
        server.requests.clear()
        server.fail(503, times=1000, path="watch=true")
        server.back()

        server.wait(lambda: asked(server, "watch=true") >= 10)

        assert asked(server, "limit=") == 0
        server.release()


def test_a_quiet_watch_alone_asks_for_no_list(server: StandInApiServer) -> None:
    with publishing(server, replace(LATE, watch_s=1)):
        server.bookmarks = False

        server.wait(lambda: asked(server, "watch=true") >= 4)

        assert asked(server, "limit=") == 1


def test_a_stop_ends_a_pause_that_is_as_long_as_a_spread(server: StandInApiServer) -> None:
    with publishing(server, LATE), a_line(EXPIRED) as expired:
        break_watches(server, restarted=True)
        assert expired.wait(10)

    assert not [thread for thread in threading.enumerate() if thread.name == "publisher-watching"]
