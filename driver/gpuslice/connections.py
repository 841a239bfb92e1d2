"""Connections to the API server: kept alive, logged in, and with a limit on each call."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import urllib3

from gpuslice import __version__
from gpuslice.client_library import ApiClient
from gpuslice.deadline import limit_call, limit_connections
from gpuslice.errors import ConfigError
from gpuslice.kubeconfig import read, usable

_CONNECT_S, _READ_S, _CALL_S = 3.0, 8.0, 20.0  # limits of the connection, of each read, of the whole call
_LOGIN_S = 5.0  # the shortest time between two reads of the credentials


@dataclass(frozen=True, slots=True)
class _Login:
    """Kept-alive connections, and the credentials from the file."""

    client: ApiClient
    urlopen: Callable[..., urllib3.BaseHTTPResponse]
    prefix: str  # the beginning of each path
    server: str

    @classmethod
    def read(cls, kubeconfig: Path | None) -> _Login:
        configuration = read(kubeconfig)
        client = ApiClient(configuration)
        manager: urllib3.PoolManager = client.rest_client.pool_manager
        limit_connections(manager)
        url = urlsplit(configuration.host)
        if type(manager) is urllib3.PoolManager:
            return cls(
                client, manager.connection_from_url(configuration.host).urlopen, url.path.rstrip("/"), url.netloc
            )
        # Behind a proxy, the manager chooses a connection for each request.
        return cls(client, manager.urlopen, configuration.host, url.netloc)


class Connections:
    """A login to one server. `request` renews it when the server refuses it.

    The client library alone is not enough: it reads a token again by the clock, and a clock may go back by hours.
    """

    def __init__(self, kubeconfig: Path | None) -> None:
        # urllib3 warns about each connection that it opens again. Our errors say enough.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._kubeconfig = kubeconfig
        self._lock = threading.Lock()
        self._login = _Login.read(kubeconfig)
        self._renewed_at = -_LOGIN_S
        self.server = self._login.server

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit_s: float | None
    ) -> urllib3.BaseHTTPResponse:
        """The head of the answer. The caller reads the body."""
        login = self._login
        answer = _request(login, method, path, body, limit_s)
        if answer.status != 401 or not self._renew(login):
            return answer
        answer.drain_conn()
        return _request(self._login, method, path, body, limit_s)

    def _renew(self, refused: _Login) -> bool:
        """Read the credentials again, but not twice within `_LOGIN_S`. True if there is another login to try."""
        with self._lock:
            now = time.monotonic()
            if self._login is refused and now - self._renewed_at >= _LOGIN_S:
                self._renewed_at = now
                with contextlib.suppress(ConfigError), usable(self._kubeconfig):
                    self._login = _Login.read(self._kubeconfig)
            return self._login is not refused

    def close(self) -> None:
        self._login.client.close()


def _request(
    login: _Login, method: str, path: str, body: Mapping[str, Any] | None, limit_s: float | None
) -> urllib3.BaseHTTPResponse:
    headers = {"Accept": "application/json", "User-Agent": f"gpuslice/{__version__}"}
    data = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = json.dumps(body).encode()
    login.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, data)
    limit_call(limit_s or _CALL_S)
    return login.urlopen(
        method,
        login.prefix + path,
        body=data,
        headers=headers,
        timeout=urllib3.Timeout(connect=_CONNECT_S, read=limit_s or _READ_S),
        preload_content=False,
        assert_same_host=False,
    )
