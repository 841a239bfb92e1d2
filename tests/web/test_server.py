"""The HTTP port with unknown clients: idle, slow, many, and from other machines."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from gpuslice.web import server as web
from gpuslice.web.endpoint import Endpoint
from gpuslice.web.server import Answer, HttpServer

PAGE = "default/one holds the card"


def fail() -> Answer:
    raise OSError("no such file")


ANSWERS = {"/healthz": lambda: Answer("ok\n"), "/broken": fail}
PRIVATE = {"/": lambda: Answer(PAGE, "text/html; charset=utf-8")}


@pytest.fixture
def server() -> Iterator[HttpServer]:
    server = HttpServer(Endpoint.parse(":0"), ANSWERS, private=PRIVATE)
    yield server
    server.close()


def port(server: HttpServer) -> int:
    return int(server.address.rpartition(":")[2])


def ask(
    server: HttpServer, path: str, *, host: str = "127.0.0.1", method: str = "GET", **headers: str
) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port(server), timeout=10)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def own_address() -> str:
    """An address of this machine that is no loopback; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no address but the loopback")
        return str(probe.getsockname()[0])


def threads() -> int:
    return sum(
        thread.name.startswith("Thread-") and "process_request" in thread.name for thread in threading.enumerate()
    )


# ---------------------------------------------------------------- limits


def test_idle_clients_neither_fill_the_process_nor_keep_a_probe_out(server: HttpServer) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port(server)), 10)) for _ in range(300)]

        assert ask(server, "/healthz") == (200, "ok\n")
        assert threads() <= 2 * web.CEILING
        assert clients[0].recv(1) == b"", "the oldest connection made room"


def test_an_idle_client_is_sent_away_in_time(server: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web._Handler, "timeout", 0.2)
    with socket.create_connection(("127.0.0.1", port(server)), 10) as client:
        assert client.recv(1) == b""


def test_a_client_that_sends_a_byte_now_and_then_is_sent_away_in_time(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_LIMIT_S", 0.3)
    with socket.create_connection(("127.0.0.1", port(server)), 0.05) as client:
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                client.sendall(b"x")
                assert client.recv(1) == b""
                break
            except TimeoutError:
                continue  # still open: one more byte
            except OSError:
                break
        assert time.monotonic() < end


def test_a_connection_ends_with_its_answer(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", port(server)), 10) as client:
        client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        text = b"".join(iter(lambda: client.recv(4096), b""))

    assert text.endswith(b"\r\n\r\nok\n")
    assert b"Connection: close" in text


# ---------------------------------------------------------------- who may see the page


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_the_page_is_shown_to_a_loopback_peer(server: HttpServer, host: str) -> None:
    assert ask(server, "/", host=host) == (200, PAGE)
    assert ask(server, "/?a=b", host=host) == (200, PAGE)


def test_other_peers_get_metrics_and_probes_and_are_told_the_way(server: HttpServer) -> None:
    status, text = ask(server, "/", host=own_address())

    assert status == 403
    assert "kubectl port-forward" in text and "/healthz" in text
    assert PAGE not in text
    assert ask(server, "/healthz", host=own_address()) == (200, "ok\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example:9510"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"X_Forwarded_For": "203.0.113.9"},
        {"Forwarded": "for=203.0.113.9"},
        {"Via": "1.1 proxy"},
    ],
)
def test_the_page_is_not_shown_on_behalf_of_others(server: HttpServer, headers: dict[str, str]) -> None:
    status, text = ask(server, "/", **headers)

    assert (status, PAGE in text) == (403, False)


# ---------------------------------------------------------------- answers


def test_an_unknown_path_is_told_the_known_ones_and_is_not_repeated(server: HttpServer) -> None:
    status, text = ask(server, "/<script>")

    assert (status, text) == (404, "known paths: / /healthz /broken\n")


def test_head_is_answered_as_get_without_a_body(server: HttpServer) -> None:
    assert ask(server, "/healthz", method="HEAD") == (200, "")


def test_an_answer_that_fails_is_a_500_and_the_reason_is_in_the_log(
    server: HttpServer, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(server, "/broken") == (500, "internal error of the driver, see its log\n")
    assert "no such file" in caplog.text


def test_nothing_of_the_page_is_kept_framed_or_run(server: HttpServer) -> None:
    connection = http.client.HTTPConnection("localhost", port(server), timeout=10)
    connection.request("GET", "/")
    headers = connection.getresponse().headers
    connection.close()

    assert headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"
