"""HTTP/1.1 over TLS, as much as the stand-in API server needs: keep-alive, one thread per connection, chunked watches."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from gpuslice.core.json import Body
from gpuslice.standin.store import RefusalError


@dataclass(slots=True)
class Deadline:
    at: float  # time.monotonic()

    def left_s(self) -> float:
        return max(0.0, self.at - time.monotonic())


@dataclass(slots=True)
class HttpRequest:
    method: str
    path: str
    query: dict[str, str]
    target: str  # path and query as received
    data: bytes = field(repr=False)
    namespace: str = ""  # set after the path is parsed

    def json(self) -> Body:
        try:
            body: Body = json.loads(self.data or b"{}")
        except ValueError as e:
            raise RefusalError(400, "BadRequest", f"the body is not JSON: {e}") from e
        return body

    @property
    def dry(self) -> bool:
        return self.query.get("dryRun") == "All"

    @property
    def watching(self) -> bool:
        return self.method == "GET" and self.query.get("watch") in ("1", "true")

    def deadline(self) -> Deadline:
        return Deadline(time.monotonic() + float(self.query.get("timeoutSeconds", "1800")))


@dataclass(slots=True, eq=False)
class ScriptedAnswer:
    """What the next requests get instead of their answer. act: fail, hang or cut."""

    act: str
    times: int
    method: str
    path: str
    status: int = 500
    retry_after_s: int | None = None
    text: str = "refused on cue"
    data: bytes = b""
    released: threading.Event = field(default_factory=threading.Event)


_REASONS = {
    400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired",
    422: "Invalid", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable",
}  # fmt: skip

_DRIP_S = 0.02  # between two bytes

Serve = Callable[[HttpRequest], tuple[int, Body]]
EventStream = Callable[[HttpRequest, Callable[[], bool]], Iterator[Body]]


class Listener:
    """Can listen, stop, and listen again on the same port."""

    def __init__(
        self,
        context: ssl.SSLContext,
        token: str,
        serve: Serve,
        watch: EventStream,
        cue: Callable[[HttpRequest], ScriptedAnswer | None],
        port: int,
    ) -> None:
        self.context, self.token, self.serve, self.watch, self.cue, self.port = context, token, serve, watch, cue, port
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        server = _Server(self, ("127.0.0.1", self.port))
        self._server, self.port = server, server.server_address[1]
        # `stop` takes at most one poll interval.
        self._thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="stand-in-api", daemon=True)
        self._thread.start()

    def stop(self, wake: Callable[[], None]) -> None:
        """`wake` wakes threads that wait for something other than the network, so that they check `stopped`."""
        server, thread, self._server = self._server, self._thread, None
        if server is None or thread is None:
            return
        server.shutdown()
        thread.join()
        server.server_close()
        server.hang_up(wake)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, owner: Listener, address: tuple[str, int]) -> None:
        super().__init__(address, _ApiHandler)
        self.owner = owner
        self.stopped = False
        self._lock = threading.Lock()
        self._open: dict[socket.socket, threading.Thread] = {}

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # The handshake is here, not in the accepting thread: otherwise a client that sends nothing would block all others.
        secure = self.owner.context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        with self._lock:
            self._open[secure] = threading.current_thread()
        if self.stopped:
            socket.socket.shutdown(secure, socket.SHUT_RDWR)
        try:
            super().process_request_thread(secure, client_address)
        finally:
            with self._lock:
                del self._open[secure]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing for a broken connection, because many tests break connections. All other errors go to stderr."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def hang_up(self, wake: Callable[[], None]) -> None:
        """Cut all connections and wait for their threads, so that no thread writes into a later test."""
        with self._lock:
            self.stopped = True
            open_now = dict(self._open)
        for connection in open_now:
            with contextlib.suppress(OSError):
                # Not SSLSocket.shutdown: it removes the TLS state while a thread still reads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        wake()
        for thread in open_now.values():
            thread.join(5.0)


class _ApiHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body are sent in one segment
    server: _Server

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ssl.SSLError):
            self.close_connection = True

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = HttpRequest(self.command, unquote(parts.path), dict(parse_qsl(parts.query)), self.path, data)
        owner = self.server.owner
        try:
            if self.headers.get("Authorization", "").split(" ")[-1] != owner.token:
                raise RefusalError(401, "Unauthorized", "Unauthorized")
            if (cue := owner.cue(request)) is not None and self._act(cue):
                return
            if request.watching:
                self._stream(owner.watch(request, lambda: self.server.stopped))
            else:
                self._send(*owner.serve(request))
        except RefusalError as e:
            self._send(e.status, e.body(), e.headers)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _answer  # noqa: N815 - names of the library

    def _act(self, cue: ScriptedAnswer) -> bool:
        """Carry out a cue. False if the request must be served after all."""
        if cue.act == "fail":
            headers = {} if cue.retry_after_s is None else {"Retry-After": str(cue.retry_after_s)}
            raise RefusalError(cue.status, _REASONS.get(cue.status, "Unknown"), cue.text, headers)
        if cue.act == "answer":
            self._send_bytes(cue.status, cue.data)
            return True
        if cue.act == "drip":
            self._drip(cue)
            return True
        if cue.act == "hang":
            cue.released.wait()
            return self.server.stopped
        self.close_connection = True
        return True

    def _send(self, status: int, body: Body, headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(body, separators=(",", ":")).encode(), headers)

    def _send_bytes(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _drip(self, cue: ScriptedAnswer) -> None:
        """Send one byte after the other, for ever. No single read of the client is late."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not self.server.stopped and not cue.released.wait(_DRIP_S):
            self.wfile.write(b"1\r\n \r\n")
            self.wfile.flush()

    def _stream(self, events: Iterator[Body]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.flush()
        for event in events:
            data = json.dumps(event, separators=(",", ":")).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing, because `requests` has all requests."""
