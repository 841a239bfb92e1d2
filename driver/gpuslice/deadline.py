"""A limit on a whole HTTP call.

The timeout of a socket limits only each single read. A server that sends one byte every few seconds never reaches it,
neither in the head nor in the body of an answer.
"""

from __future__ import annotations

import http.client
import io
import math
import socket
import threading
import time
from typing import Any

import urllib3


class _Limit(threading.local):
    at = math.inf  # when the call of this thread must be over, as time.monotonic()


_limit = _Limit()


def limit_call(seconds: float) -> None:
    """Limit the next request of this thread. Its whole answer, with the body, must arrive within this time."""
    _limit.at = time.monotonic() + seconds


def limit_connections(manager: urllib3.PoolManager) -> None:
    """Make all connections of this manager keep the limits. Call it before the manager opens its first connection."""
    manager.pool_classes_by_scheme = {"http": _HttpPool, "https": _HttpsPool}


class _LimitedReads(socket.SocketIO):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock, "r")
        self._limited, self._at = sock, _limit.at

    def readinto(self, buffer: Any) -> int | None:
        left_s, each_s = self._at - time.monotonic(), self._limited.gettimeout()
        if left_s <= 0:
            raise TimeoutError("the answer is not complete within the time of the whole call")
        if each_s is not None and each_s <= left_s:
            return super().readinto(buffer)
        self._limited.settimeout(None if math.isinf(left_s) else left_s)
        try:
            return super().readinto(buffer)
        finally:
            if self._limited.fileno() >= 0:
                self._limited.settimeout(each_s)


class _LimitedSocket:
    """The part of a socket that an HTTP response uses."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def makefile(self, _: str) -> io.BufferedReader:
        reads = _LimitedReads(self._sock)
        self._sock._io_refs += 1  # type: ignore[attr-defined]  # as socket.makefile does it; closing the file counts down
        return io.BufferedReader(reads)


class _LimitedResponse(http.client.HTTPResponse):
    def __init__(self, sock: Any, *arguments: Any, **named: Any) -> None:
        super().__init__(_LimitedSocket(sock), *arguments, **named)  # type: ignore[arg-type]


class _HttpConnection(urllib3.connection.HTTPConnection):
    response_class = _LimitedResponse


class _HttpsConnection(urllib3.connection.HTTPSConnection):
    response_class = _LimitedResponse


class _HttpPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _HttpConnection


class _HttpsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _HttpsConnection
