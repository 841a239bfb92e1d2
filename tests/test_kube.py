"""The API client, against the stand-in API server."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from gpuslice import connections
from gpuslice import kube as door
from gpuslice.errors import ApiError, ConfigError, ConflictError, ExpiredError, NotFoundError
from gpuslice.kube import Kube
from gpuslice.standin.apiserver import StandInApiServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with StandInApiServer(tmp_path) as server:
        yield server


@pytest.fixture
def kube(server: StandInApiServer) -> Iterator[Kube]:
    kube = Kube(server.kubeconfig)
    yield kube
    kube.close()


def a_claim(server: StandInApiServer, name: str = "c") -> None:
    server.create("resourceclaims", {"metadata": {"name": name}, "spec": {"devices": {}}}, "ns")


def test_a_claim_comes_back_as_the_api_has_it_unknown_fields_too(server: StandInApiServer, kube: Kube) -> None:
    server.create("resourceclaims", {"metadata": {"name": "c"}, "fieldOfTheFuture": {"a": [1]}}, "ns")

    assert kube.claim("ns", "c")["fieldOfTheFuture"] == {"a": [1]}
    with pytest.raises(NotFoundError, match=r'get resourceclaims: resourceclaims "d" not found'):
        kube.claim("ns", "d")


def test_all_claims_are_listed_page_by_page(
    server: StandInApiServer, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_PAGE", 2)
    for number in range(5):
        a_claim(server, f"c{number}")

    assert [claim["metadata"]["name"] for claim in kube.claims()] == ["c0", "c1", "c2", "c3", "c4"]
    assert len(server.requests) == 3


def test_the_version_and_the_uid_of_a_node(server: StandInApiServer, kube: Kube) -> None:
    uid = server.add_node("n1")

    assert kube.version() == "v1.37.0"
    assert kube.node_uid("n1") == uid


@pytest.mark.parametrize(
    ("more", "version"),
    [
        ({"emulationMajor": "1", "emulationMinor": "35"}, "v1.37.1 as 1.35"),
        ({"emulationMajor": "1", "emulationMinor": "37"}, "v1.37.1"),
        ({"emulationMajor": None}, "v1.37.1"),
    ],
)
def test_a_server_that_emulates_an_older_one_says_so(
    server: StandInApiServer, kube: Kube, more: dict[str, object], version: str
) -> None:
    """The upgrade has two steps, and only the second one brings the features."""
    server.answer(200, json.dumps({"gitVersion": "v1.37.1"} | more).encode())

    assert kube.version() == version


def test_a_node_that_is_not_there_is_named_with_what_to_do(kube: Kube) -> None:
    with pytest.raises(NotFoundError, match=r"there is no Node 'other' in the cluster of .*kubectl get nodes lists"):
        kube.node_uid("other")


@pytest.mark.contract(66)
def test_a_server_without_the_v1_group_is_told_with_its_version(tmp_path: Path) -> None:
    with StandInApiServer(tmp_path, "1.33") as server, pytest.raises(ApiError) as refused:
        Kube(server.kubeconfig).resource_slices("gpuslice.dev", "n1")

    assert str(refused.value) == (
        "API server v1.33.0 does not serve resource.k8s.io/v1; Kubernetes 1.34 or later is needed"
    )


@pytest.mark.parametrize(
    ("status", "error"),
    [(409, ConflictError), (410, ExpiredError), (429, ApiError), (500, ApiError)],
)
def test_each_status_has_its_error(server: StandInApiServer, kube: Kube, status: int, error: type[ApiError]) -> None:
    server.fail(status)

    with pytest.raises(error) as refused:
        kube.claim("ns", "c")

    assert refused.value.status == status


def a_status(**changes: object) -> bytes:
    """The API server's answer for a claim that is gone."""
    details = {"name": "c", "group": "resource.k8s.io", "kind": "resourceclaims"}
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
    return json.dumps(body | {"message": "not found", "details": details} | changes).encode()


NOT_GONE = {
    "page": b"<html>404 Not Found</html>",
    "old server": b"404 page not found\n",
    "nothing": b"",
    "no object": b"[]",
    "unknown resource": a_status(details={}),
    "details of a wrong type": a_status(details=["c"]),
    "another claim": a_status(details={"name": "d", "group": "resource.k8s.io", "kind": "resourceclaims"}),
    "another kind": a_status(details={"name": "c", "group": "", "kind": "namespaces"}),
    "another code": a_status(code=503, reason="ServiceUnavailable"),
    "no status": a_status(kind="ResourceClaim"),
    "cut off": a_status()[:-1],
}


def test_a_status_that_names_the_object_says_that_it_is_gone(server: StandInApiServer, kube: Kube) -> None:
    server.answer(404, a_status())

    with pytest.raises(NotFoundError):
        kube.claim("ns", "c")


@pytest.mark.parametrize("answer", NOT_GONE.values(), ids=list(NOT_GONE))
def test_no_other_404_says_so(server: StandInApiServer, kube: Kube, answer: bytes) -> None:
    server.answer(404, answer, times=9)

    for verb in (
        lambda: kube.claim("ns", "c"),
        lambda: kube.node_uid("c"),
        lambda: kube.update_resource_slice({"metadata": {"name": "c"}, "spec": {}}),
        lambda: kube.delete_resource_slice("c", uid="u", resource_version="1"),
    ):
        with pytest.raises(ApiError, match="check the API server and the proxies before it") as refused:
            verb()
        assert not isinstance(refused.value, NotFoundError)
        assert refused.value.status == 404


@pytest.mark.parametrize("status", [401, 403, 404, 409, 410, 500])
def test_a_page_of_a_proxy_is_no_answer_of_the_api_server(server: StandInApiServer, kube: Kube, status: int) -> None:
    """It is no conflict and no final refusal of a token. A rule in a ClusterRole does not help."""
    server.answer(status, b"<html>sign in</html>", times=9)

    for verb in (lambda: kube.claim("ns", "c"), lambda: kube.resource_slices("gpuslice.dev", "n1")):
        with pytest.raises(ApiError, match="check the API server and the proxies before it: <html>sign in</html>") as e:
            verb()
        assert type(e.value) is ApiError
        assert e.value.status == status


def test_a_claim_that_is_none_is_no_claim_that_was_deallocated(server: StandInApiServer, kube: Kube) -> None:
    a_claim(server)
    good = server.get("resourceclaims", "c", "ns")
    meta = good["metadata"]
    odds: list[dict[str, Any]] = [
        {},
        {"kind": "Status", "status": "Failure", "code": 500},
        {"kind": "ResourceClaimList", "metadata": {}, "items": []},
        good | {"metadata": meta | {"name": "d"}},
        good | {"metadata": meta | {"namespace": "other"}},
        good | {"metadata": meta | {"uid": None}},
        good | {"status": "gone"},
        good | {"status": {"allocation": []}},
        good | {"status": {"allocation": {"devices": {"results": {}}}}},
        good | {"status": {"allocation": {"devices": {"results": ["x"]}}}},
        good | {"status": {"allocation": {"devices": {"results": [{"driver": "gpuslice.dev", "pool": 1}]}}}},
    ]
    for odd in odds:
        server.answer(200, json.dumps(odd).encode())
        with pytest.raises(ApiError, match="something else than claim ns/c"):
            kube.claim("ns", "c")

        if odd.get("metadata", {}).get("uid") is None or "status" in odd:
            server.answer(200, json.dumps({"kind": "ResourceClaimList", "metadata": {}, "items": [odd]}).encode())
            with pytest.raises(ApiError, match="a list of resourceclaims"):
                list(kube.claims())


def test_a_list_that_is_none_is_no_empty_list(server: StandInApiServer, kube: Kube) -> None:
    for odd in ({}, {"kind": "Status", "metadata": {}}, {"kind": "ResourceSlice", "metadata": {}, "spec": {}}):
        server.answer(200, json.dumps(odd).encode(), times=2)

        with pytest.raises(ApiError, match="no list of resourceclaims"):
            list(kube.claims())
        with pytest.raises(ApiError, match="no list of resourceslices"):
            kube.resource_slices("gpuslice.dev", "n1")


def test_an_answer_to_a_delete_that_names_another_object_deletes_nothing(server: StandInApiServer, kube: Kube) -> None:
    for odd in ({}, {"kind": "Status", "status": "Failure"}, {"kind": "ResourceSlice", "metadata": {"uid": "other"}}):
        server.answer(200, json.dumps(odd).encode())

        with pytest.raises(ApiError, match="something else than the deletion"):
            kube.delete_resource_slice("c", uid="u", resource_version="1")


def test_a_missing_right_is_told_with_the_rule_to_add(server: StandInApiServer, kube: Kube) -> None:
    server.fail(403)

    with pytest.raises(ApiError) as refused:
        kube.claim("ns", "c")

    assert 'apiGroups: ["resource.k8s.io"], resources: ["resourceclaims"], verbs: ["get"]' in str(refused.value)


def test_a_busy_server_is_told_at_once_and_not_waited_for(server: StandInApiServer, kube: Kube) -> None:
    server.fail(429, retry_after_s=60)

    began = time.monotonic()
    with pytest.raises(ApiError, match="too busy"):
        kube.claim("ns", "c")

    assert time.monotonic() - began < 5


def test_a_server_that_is_away_is_told_with_its_address(server: StandInApiServer, kube: Kube) -> None:
    server.away()

    with pytest.raises(ApiError, match=rf"127\.0\.0\.1:{server.port} .*check that it runs") as refused:
        kube.claim("ns", "c")
    assert refused.value.status == 0


def test_a_call_that_hangs_ends_with_an_error(
    server: StandInApiServer, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "_READ_S", 0.1)
    server.hang(times=9)

    with pytest.raises(ApiError, match="no answer"):
        kube.claim("ns", "c")


def test_a_connection_that_died_while_idle_costs_no_error(server: StandInApiServer, kube: Kube) -> None:
    a_claim(server)
    kube.claim("ns", "c")
    server.cut()

    assert kube.claim("ns", "c")


def test_a_create_is_not_repeated_when_its_answer_is_lost(server: StandInApiServer, kube: Kube) -> None:
    server.cut()

    with pytest.raises(ApiError):
        kube.create_resource_slice({"metadata": {"generateName": "x-"}, "spec": {}})
    assert len(server.requests) == 1


def test_eight_claims_are_answered_while_every_slice_request_hangs(server: StandInApiServer, kube: Kube) -> None:
    a_claim(server)
    server.hang(times=20, path="resourceslices")
    with ThreadPoolExecutor(28) as threads:
        stuck = [threads.submit(kube.resource_slices, "gpuslice.dev", "n1") for _ in range(20)]
        server.wait(lambda: len(server.requests) == 20)

        answers = list(threads.map(lambda _: kube.claim("ns", "c"), range(8)))
        server.release()

    assert len(answers) == 8
    assert all(future.result() for future in stuck)


def test_a_watch_is_closed_from_another_thread(kube: Kube) -> None:
    _, version = kube.resource_slices("gpuslice.dev", "n1")
    watch = kube.watch_resource_slices("gpuslice.dev", "n1", version, timeout_s=300)
    reader = threading.Thread(target=lambda: list(watch))
    reader.start()

    watch.close()
    reader.join(5)

    assert not reader.is_alive()


def test_a_watch_that_breaks_off_is_an_error(server: StandInApiServer, kube: Kube) -> None:
    _, version = kube.resource_slices("gpuslice.dev", "n1")
    watch = kube.watch_resource_slices("gpuslice.dev", "n1", version, timeout_s=300)
    server.away()

    with pytest.raises(ApiError):
        list(watch)


def test_an_unusable_kubeconfig_is_told(tmp_path: Path) -> None:
    (tmp_path / "broken").write_text("kind: Config\n")

    for path in (tmp_path / "none", tmp_path / "broken"):
        with pytest.raises(ConfigError, match=f"kubeconfig {path}"):
            Kube(path)


def test_outside_a_pod_the_service_account_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(ConfigError, match="this pod's service account"):
        Kube(None)


def test_no_typed_model_is_imported_for_they_cost_half_a_second(server: StandInApiServer) -> None:
    program = (
        "import sys; from pathlib import Path; from gpuslice.kube import Kube;"
        f"kube = Kube(Path({str(server.kubeconfig)!r})); kube.version(); list(kube.claims()); kube.close();"
        "print([m for m in sys.modules if m.startswith(('kubernetes.client.models.', 'kubernetes.client.api.'))])"
    )

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"


UNUSED = ("kubernetes.stream", "kubernetes.dynamic", "requests", "websocket", "pydantic")


def test_what_the_driver_does_not_use_of_the_client_library_is_not_loaded() -> None:
    program = f"import sys; import gpuslice.app; print([name for name in {UNUSED} if name in sys.modules])"

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "[]"


def test_whoever_needs_what_the_client_library_does_without_gets_the_real_one() -> None:
    program = "import gpuslice.kube, pydantic; print(pydantic.SecretStr('x').get_secret_value())"

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.strip() == "x"


def test_a_login_by_openid_connect_gets_the_real_session() -> None:
    program = (
        "import sys; import gpuslice.kube; from kubernetes.config import kube_config;"
        "session = kube_config.OAuth2Session(client_id='me', token={'refresh_token': 'r'});"
        "print(type(session).__module__, session.client_id, 'requests' in sys.modules)"
    )

    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert answer.stdout.split() == ["requests_oauthlib.oauth2_session", "me", "True"]


def test_the_environment_is_read_for_a_proxy_only_at_the_start(
    server: StandInApiServer, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = itertools.count()
    monkeypatch.setattr("kubernetes.client.configuration.getproxies", lambda: {"number": str(next(reads))})

    assert kube.version()

    assert next(reads) == 0


def test_a_proxy_of_the_kubeconfig_is_asked_for_the_whole_address(tmp_path: Path) -> None:
    asked: list[tuple[str, str | None]] = []

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Host"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"gitVersion": "v1.37.0"}')

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        kubeconfig = tmp_path / "config"
        cluster = {"server": "http://api.example/prefix", "proxy-url": f"http://127.0.0.1:{proxy.server_port}"}
        context = {"cluster": "c", "user": "u"}
        body = {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": cluster}],
            "contexts": [{"name": "c", "context": context}],
            "users": [{"name": "u", "user": {}}],
        }
        kubeconfig.write_text(json.dumps(body))
        kube = Kube(kubeconfig)

        assert kube.version() == "v1.37.0"
        assert asked == [("http://api.example/prefix/version", "api.example")]
        kube.close()
        proxy.shutdown()
