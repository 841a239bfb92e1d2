"""The client of hack/, against the stand-in API server."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gpuslice.standin.apiserver import StandInApiServer

from hack.lib.api import CLAIMS, NODES, TEMPLATES, ApiServer, RequestError, fetch

BODY = {"spec": {"spec": {"devices": {"requests": [{"name": "gpu", "exactly": {"deviceClassName": "a"}}]}}}}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with StandInApiServer(tmp_path) as server:
        yield server


@pytest.fixture
def api(server: StandInApiServer) -> Iterator[ApiServer]:
    with contextlib.closing(connected(server)) as api:
        yield api


def connected(server: StandInApiServer) -> ApiServer:
    found: dict[str, Any] = yaml.safe_load(server.kubeconfig.read_text())
    cluster, user = found["clusters"][0]["cluster"], found["users"][0]["user"]
    return ApiServer(cluster["server"], user["token"], Path(cluster["certificate-authority"]), timeout_s=5)


def a_template(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default"}, **BODY}


def test_many_bodies_are_created_at_once_and_answered_in_their_order(api: ApiServer) -> None:
    made = api.create(TEMPLATES, [a_template(f"t-{number}") for number in range(20)])

    assert [body["metadata"]["name"] for body in made] == [f"t-{number}" for number in range(20)]
    assert len(api.ask("GET", TEMPLATES)["items"]) == 20


def test_a_refusal_is_one_sentence_with_the_server_s_own_and_its_status(api: ApiServer) -> None:
    with pytest.raises(RequestError, match=f"^GET {NODES}/nobody was answered 404: .*nobody") as refused:
        api.ask("GET", f"{NODES}/nobody")

    assert refused.value.status == 404


def test_a_watch_shows_what_happens_after_a_version_and_is_ended_from_another_thread(api: ApiServer) -> None:
    version = api.ask("GET", TEMPLATES)["metadata"]["resourceVersion"]
    watch = api.watch(TEMPLATES, version, 30)
    events = iter(watch)

    api.ask("POST", TEMPLATES, a_template("late"))

    event = next(events)
    assert (event["type"], event["object"]["metadata"]["name"]) == ("ADDED", "late")
    threading.Timer(0.05, watch.close).start()
    with contextlib.suppress(RequestError):
        assert list(events) == []


def test_an_empty_collection_is_not_waited_for_and_a_full_one_only_so_long(api: ApiServer) -> None:
    api.wait_gone(CLAIMS, 30)
    api.ask("POST", TEMPLATES, a_template("stays"))

    with pytest.raises(RequestError, match=f"^stays stayed longer than 1 s in {TEMPLATES}$"):
        api.wait_gone(TEMPLATES, 1)


def test_a_collection_is_waited_for_until_the_last_is_gone(api: ApiServer) -> None:
    api.ask("POST", TEMPLATES, a_template("goes"))
    threading.Timer(0.05, lambda: api.ask("DELETE", f"{TEMPLATES}/goes")).start()

    api.wait_gone(TEMPLATES, 30)

    assert api.ask("GET", TEMPLATES)["items"] == []


def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again(server: StandInApiServer) -> None:
    with contextlib.closing(connected(server)) as api:
        api.ask("GET", "/version")
        server.away()
        server.back()

        assert api.ask("GET", "/version")["gitVersion"].startswith("v1.37")


def test_no_answer_is_one_sentence_without_a_status(server: StandInApiServer) -> None:
    with contextlib.closing(connected(server)) as api:
        server.away()

        with pytest.raises(RequestError, match=r"^no answer from https://127.0.0.1:\d+ to GET /version: ") as refused:
            api.ask("GET", "/version")
        server.back()

    assert refused.value.status == 0


def test_another_server_is_asked_whoever_signed_its_certificate(server: StandInApiServer, api: ApiServer) -> None:
    url = f"https://127.0.0.1:{server.port}/version"

    assert b"gitVersion" in fetch(url, api.token)
    with pytest.raises(RequestError, match="was answered 401"):
        fetch(url)
