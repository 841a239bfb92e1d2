"""An HTTP server with a limit of connections and a time limit for each, so that clients cannot exhaust the process.

Each connection has one request and is closed with the answer. At the ceiling the server closes the oldest connection for
the newest one, so that it always serves the kubelet's probes. Without the ceiling, idle clients took a thread and a
descriptor each, until prepares failed because the process had no descriptors left.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from urllib.parse import urlsplit

from gpuslice.system.threads import ThreadWatch
from gpuslice.web.endpoint import Endpoint

log = logging.getLogger(__name__)

CEILING = 32  # connections at once
_LIMIT_S = 10.0  # for a whole connection
_SILENCE_S = 5.0  # without a byte from or to the client
_NO_DESCRIPTORS_S = 0.2
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Connection": "close",
}


@dataclass(frozen=True, slots=True)
class Answer:
    body: str | bytes
    kind: str = "text/plain; charset=utf-8"
    status: int = 200


Answers = Mapping[str, Callable[[], Answer]]  # path → function that makes the answer; it may block for seconds


class HttpServer:
    """Serves from now on, in its own threads. `close` ends it."""

    def __init__(
        self,
        endpoint: Endpoint,
        answers: Answers,
        *,
        private: Answers | None = None,
        threads: ThreadWatch | None = None,
    ) -> None:
        """Only loopback peers get the answers of `private`. ConfigError if nothing can listen at the endpoint."""
        self._server = _LimitedServer(endpoint.listen(), answers, private or {})
        self._closed = threading.Event()
        self._threads = threads or ThreadWatch()
        self._threads.start("http", self._server.serve_forever, over=self._closed.is_set)

    @property
    def address(self) -> str:
        host, port = self._server.socket.getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def close(self) -> None:
        self._closed.set()
        if "http" in self._threads.alive():  # if the thread has died, `shutdown` waits for ever
            self._server.shutdown()
        self._server.server_close()


class _LimitedServer(ThreadingMixIn, TCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, listener: socket.socket, answers: Answers, private: Answers) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.answers, self.private = answers, private
        self._lock = threading.Lock()
        self._open: dict[socket.socket, float] = {}  # connection → its start, the oldest first

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError as e:
            if e.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(_NO_DESCRIPTORS_S)  # otherwise the loop would spin, because the client still waits
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            if len(self._open) >= 2 * CEILING:  # the threads of cut connections still run
                full = True
            else:
                full = False
                self._open[request] = time.monotonic()
                excess = list(self._open)[: max(0, len(self._open) - CEILING)]
        if full:
            self.shutdown_request(request)
            return
        for connection in excess:
            _cut(connection)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """The loop of the base class calls this twice a second."""
        late = time.monotonic() - _LIMIT_S
        with self._lock:
            expired = [connection for connection, began in self._open.items() if began < late]
        for connection in expired:
            _cut(connection)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """In most cases the client is gone or was cut. The library would print a traceback."""
        log.debug("http request from %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _LimitedServer
    timeout = _SILENCE_S
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "gpuslice", ""

    def do_GET(self) -> None:
        self._send(self._answer(urlsplit(self.path).path))

    do_HEAD = do_GET  # noqa: N815 - the library's name

    def _answer(self, path: str) -> Answer:
        answers, private = self.server.answers, self.server.private
        make = answers.get(path) or private.get(path)
        if make is None:
            return Answer(f"known paths: {' '.join([*private, *answers])}\n", status=404)
        if path in private and not self._is_local():
            return Answer(_PRIVATE.format(" ".join(answers)), status=403)
        try:
            return make()
        except Exception:
            log.exception("http: %s failed unexpectedly", path)
            return Answer("internal error of the driver, see its log\n", status=500)

    def _is_local(self) -> bool:
        """Whether the client is a person on this node or at the other end of a port-forward, and not a proxy."""
        forwarded = any(name in self.headers for name in ("Forwarded", "X-Forwarded-For", "Via"))
        return not forwarded and _is_loopback(str(self.client_address[0])) and _is_local_name(self.headers.get("Host"))

    def _send(self, answer: Answer) -> None:
        body = answer.body.encode(errors="backslashreplace") if isinstance(answer.body, str) else answer.body
        self.send_response(answer.status)
        for name, value in {"Content-Type": answer.kind, "Content-Length": str(len(body)), **_HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        log.debug("http " + format, *args)


_PRIVATE = (
    "this page names claims, so it is shown on the pod's loopback only; "
    "use kubectl port-forward and http://localhost, or ask for one of: {}\n"
)


def _cut(connection: socket.socket) -> None:
    """Wake the thread that reads from the connection or writes to it. That thread closes the connection."""
    with contextlib.suppress(OSError):  # it is closed already
        connection.shutdown(socket.SHUT_RDWR)


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_local_name(host: str | None) -> bool:
    """Whether the browser used a local name. An attacker could point another name to this address, so that the scripts of
    the attacker's page can read ours (DNS rebinding)."""
    if host is None:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or _is_loopback(name)
    except ValueError:
        return False
