"""The API client and time: a whole call has a limit, however slowly a server sends, and no clock delays a new login."""

from __future__ import annotations

import datetime
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from gpuslice import api as door
from gpuslice import connections
from gpuslice.errors import ApiError, LastingApiError
from gpuslice.kube import Kube
from gpuslice.standin.apiserver import TOKEN, StandInApiServer
from kubernetes.config import incluster_config

PAUSE_S = 0.02
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


class Dripping:
    """Answers each request with `begin` at once, and then sends one byte after the other, for ever."""

    def __init__(self, folder: Path) -> None:
        self.begin, self._ended = b"", threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()
        port = self._socket.getsockname()[1]
        body = {
            "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "users": [{"name": "u", "user": {}}],
        }
        (folder / "config").write_text(json.dumps(body))
        self.kube = Kube(folder / "config")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._drip, args=(connection,), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _drip(self, connection: socket.socket) -> None:
        with connection:
            try:
                connection.recv(65536)
                connection.sendall(self.begin)
                while not self._ended.wait(PAUSE_S):
                    connection.sendall(b"1\r\n \r\n" if b"chunked" in self.begin else b" ")
            except OSError:
                return

    def close(self) -> None:
        self._ended.set()
        self.kube.close()
        self._socket.close()
        for thread in self._threads[1:]:
            thread.join(5)


@pytest.fixture
def dripping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dripping]:
    monkeypatch.setattr(connections, "_CALL_S", 0.2)
    server = Dripping(tmp_path)
    yield server
    server.close()


VERBS: dict[str, Callable[[Kube], object]] = {
    "get": lambda kube: kube.claim("ns", "c"),
    "list": lambda kube: list(kube.claims()),
    "create": lambda kube: kube.create_resource_slice({"metadata": {"generateName": "x-"}, "spec": {}}),
    "delete": lambda kube: kube.delete_resource_slice("s", uid="u", resource_version="1"),
    "version": lambda kube: kube.version(),
}


@pytest.mark.parametrize("verb", list(VERBS))
@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Long: ",
        HEAD + b"Content-Length: 100000\r\n\r\n",
        CHUNKED,
    ],
    ids=["status line", "header", "body", "chunks"],
)
def test_a_server_that_sends_byte_by_byte_is_not_waited_for(dripping: Dripping, verb: str, begin: bytes) -> None:
    """No single read is late."""
    dripping.begin = begin

    with pytest.raises(ApiError, match="no answer from the API server"):
        VERBS[verb](dripping.kube)


def test_a_watch_that_drips_ends_some_time_after_its_end(dripping: Dripping) -> None:
    dripping.begin = CHUNKED

    with pytest.raises(ApiError, match="no answer from the API server"):
        list(dripping.kube.watch_resource_slices("gpuslice.dev", "n1", "1", timeout_s=-29.7))  # type: ignore[arg-type]


def test_a_list_whose_pages_never_end_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_LIST_S", 0.2)
    page = {"kind": "ResourceClaimList", "metadata": {"continue": "more"}, "items": []}
    with StandInApiServer(tmp_path) as server:
        server.answer(200, json.dumps(page).encode(), times=1_000_000)

        with pytest.raises(ApiError, match="that does not end within"):
            list(Kube(server.kubeconfig).claims())


# ---------------------------------------------------------------- credentials


class Clock(datetime.datetime):
    """The clock of the client library, set back by hours after its first look."""

    back = datetime.timedelta()

    @classmethod
    def now(cls, tz: Any = None) -> datetime.datetime:  # type: ignore[override]
        return datetime.datetime.fromtimestamp(2e9, tz) - cls.back


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with StandInApiServer(tmp_path / "api") as server:
        server.create("resourceclaims", {"metadata": {"name": "c"}}, "ns")
        yield server


@pytest.fixture
def in_a_pod(server: StandInApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token file of a pod's service account."""
    token = tmp_path / "token"
    token.write_text(TOKEN)
    certificate = yaml.safe_load(server.kubeconfig.read_text())["clusters"][0]["cluster"]["certificate-authority"]
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", certificate)
    monkeypatch.setattr(incluster_config.datetime, "datetime", Clock)
    return token


def test_a_token_is_read_again_where_the_clock_was_set_back_by_hours(
    server: StandInApiServer, in_a_pod: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kube = Kube(None)
    assert kube.claim("ns", "c")
    monkeypatch.setattr(Clock, "back", datetime.timedelta(hours=5))
    in_a_pod.write_text("rotated")
    server.token = "rotated"

    assert kube.claim("ns", "c")
    assert list(kube.claims())
    kube.close()


def test_a_token_file_of_a_kubeconfig_is_read_again_too(server: StandInApiServer, tmp_path: Path) -> None:
    body = yaml.safe_load(server.kubeconfig.read_text())
    body["users"][0]["user"] = {"tokenFile": str(tmp_path / "token")}
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "config").write_text(yaml.safe_dump(body))
    kube = Kube(tmp_path / "config")
    assert kube.claim("ns", "c")
    (tmp_path / "token").write_text("rotated")
    server.token = "rotated"

    assert kube.claim("ns", "c")
    kube.close()


def test_a_token_that_stays_refused_is_read_again_only_now_and_then(server: StandInApiServer) -> None:
    kube = Kube(server.kubeconfig)
    server.token = "another"

    for _ in range(5):
        with pytest.raises(LastingApiError, match="refused the driver's credentials"):
            kube.claim("ns", "c")
    kube.close()


def test_credentials_that_cannot_be_read_now_are_no_end(server: StandInApiServer) -> None:
    kube = Kube(server.kubeconfig)
    text = server.kubeconfig.read_text()
    server.kubeconfig.write_text("kind: nothing")
    server.token = "another"
    with pytest.raises(LastingApiError, match="refused the driver's credentials"):
        kube.claim("ns", "c")

    server.kubeconfig.write_text(text)
    server.token = TOKEN
    assert kube.claim("ns", "c")
    kube.close()
