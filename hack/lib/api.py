"""The API server of a cluster that hack/cluster started, and the other servers of that cluster: dicts in, dicts out.

Standard library only, because hack/cluster and hack/gpu run where nothing is installed. The driver's own client
(gpuslice.kube) has only the verbs of its ClusterRole. Here the administrator asks.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

Body = Mapping[str, Any]

RESOURCE = "/apis/resource.k8s.io/v1"
PODS = "/api/v1/namespaces/default/pods"
CLAIMS = f"{RESOURCE}/namespaces/default/resourceclaims"
TEMPLATES = f"{RESOURCE}/namespaces/default/resourceclaimtemplates"
CLASSES = f"{RESOURCE}/deviceclasses"
SLICES = f"{RESOURCE}/resourceslices"
NODES = "/api/v1/nodes"

_WRITERS = 8  # requests in progress at the same time
_ATTEMPTS = 10  # because a controller may write the same object
_CONFLICT = 409
_ANSWER_S = 120.0
_JSON, _MERGE = "application/json", "application/merge-patch+json"


class RequestError(Exception):
    """One sentence: what was asked, and how it was refused. `status` is the HTTP status, or 0 without an answer."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


def fetch(url: str, token: str = "", timeout_s: float = _ANSWER_S) -> bytes:
    """Ask another server of the cluster, without a proxy and without a check of its certificate. RequestError if it
    refuses."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    unverified = ssl._create_unverified_context()
    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=unverified)
    )
    try:
        with direct.open(request, timeout=timeout_s) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as e:
        raise RequestError(f"{url} was answered {e.code}: {e.read(300).decode(errors='replace')}", e.code) from e
    except (OSError, http.client.HTTPException) as e:
        raise RequestError(f"no answer from {url}: {e}") from e


class WatchStream:
    """The events of a watch as they arrive. `close` ends the watch at once, from any thread."""

    def __init__(
        self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, sock: socket.socket
    ) -> None:
        self._connection, self._response, self._socket = connection, response, sock

    def lines(self) -> Iterator[bytes]:
        """One event per line, not yet parsed as JSON. RequestError if the server stays silent."""
        try:
            yield from self._response
        except (OSError, ValueError, http.client.HTTPException) as e:
            raise RequestError(f"the watch broke: {e}") from e
        finally:
            self._connection.close()

    def __iter__(self) -> Iterator[Body]:
        """{"type": …, "object": …}. RequestError if the server ends the watch with an error."""
        for line in self.lines():
            event: Body = json.loads(line)
            if event["type"] == "ERROR":
                raise RequestError(f"the watch broke: {event['object'].get('message', 'no reason given')}")
            yield event

    def close(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the watch has ended already
            self._socket.shutdown(socket.SHUT_RDWR)


class ApiServer:
    """The API server for its administrator, from any number of threads. A verb raises RequestError with the server's
    sentence."""

    def __init__(self, url: str, token: str, certificate: Path, *, timeout_s: float = _ANSWER_S) -> None:
        self.token = token
        self._url, self._timeout_s = url, timeout_s
        self._trust = ssl.create_default_context(cafile=str(certificate))
        self._idle: list[http.client.HTTPSConnection] = []

    @staticmethod
    def of_kubeconfig(path: Path) -> ApiServer:
        """`path`: a kubeconfig that hack/cluster wrote, which is JSON."""
        body = json.loads(path.read_text(encoding="utf-8"))
        server, user = body["clusters"][0]["cluster"], body["users"][0]["user"]
        return ApiServer(server["server"], user["token"], Path(server["certificate-authority"]))

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()

    # ------------------------------------------------------------ verbs

    def ask(self, method: str, path: str, body: Body | None = None) -> Any:
        return json.loads(self._answer(method, path, body))

    def text(self, path: str) -> str:
        """The text of an answer that is not JSON: metrics, "ok"."""
        return self._answer("GET", path).decode(errors="replace")

    def create(self, path: str, bodies: Iterable[Body]) -> list[Body]:
        """Create all objects, several at the same time. The result has the order of `bodies`, as the server stored them."""
        with ThreadPoolExecutor(_WRITERS, "api") as threads:
            return list(threads.map(lambda body: self.ask("POST", path, body), bodies))

    def merge(self, changes: Iterable[tuple[str, Body]]) -> None:
        """Merge each body into the object at its path, several at the same time. A conflict is tried again, because no body
        names a version."""
        with ThreadPoolExecutor(_WRITERS, "api") as threads:
            list(threads.map(lambda change: self._again("PATCH", change[0], change[1], _MERGE), changes))

    def clear(self, path: str) -> None:
        """Delete all objects at this path at once."""
        self._again("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0})

    def watch(self, path: str, version: str, timeout_s: float) -> WatchStream:
        """What happens after a resource version, for this time. `path` may have a selector: "…/pods?labelSelector=…"."""
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": f"{timeout_s:.0f}"}
        target = f"{path}{'&' if '?' in path else '?'}{urlencode(query)}"
        connection = self._connect(timeout_s + 30.0)
        try:
            response, sock = self._send(connection, "GET", target)
            if response.status >= 300:
                raise _refused("GET", target, response.status, response.read())
        except (OSError, http.client.HTTPException) as e:
            connection.close()
            raise RequestError(f"no answer from {self._url} to GET {target}: {e}") from e
        except RequestError:
            connection.close()
            raise
        return WatchStream(connection, response, sock)

    def wait_gone(self, path: str, timeout_s: float) -> None:
        """Return when the collection is empty. RequestError after this time; it names the objects that are still there."""
        listed = self.ask("GET", path)
        there = {item["metadata"]["name"] for item in listed["items"]}
        for event in self.watch(path, listed["metadata"]["resourceVersion"], timeout_s) if there else ():
            name = event["object"]["metadata"]["name"]
            (there.discard if event["type"] == "DELETED" else there.add)(name)
            if not there:
                return
        if there:
            raise RequestError(f"{', '.join(sorted(there))} stayed longer than {timeout_s:.0f} s in {path}")

    # ------------------------------------------------------------ below the verbs

    def _again(self, method: str, path: str, body: Body, kind: str = _JSON) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                self._answer(method, path, body, kind)
                return
            except RequestError as e:
                if e.status != _CONFLICT or attempt == _ATTEMPTS - 1:
                    raise

    def _answer(self, method: str, path: str, body: Body | None = None, kind: str = _JSON) -> bytes:
        connection = self._reused() or self._connect(self._timeout_s)
        try:
            response, _ = self._send(connection, method, path, body, kind)
            data = response.read()
        except (OSError, http.client.HTTPException) as e:
            connection.close()
            raise RequestError(f"no answer from {self._url} to {method} {path}: {e}") from e
        self._idle.append(connection)
        if response.status >= 300:
            raise _refused(method, path, response.status, data)
        return data

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        body: Body | None = None,
        kind: str = _JSON,
    ) -> tuple[http.client.HTTPResponse, socket.socket]:
        headers = {"Authorization": f"Bearer {self.token}", "Accept": _JSON, "Content-Type": kind}
        connection.request(method, target, None if body is None else json.dumps(body), headers)
        sock = connection.sock
        return connection.getresponse(), sock

    def _connect(self, timeout_s: float) -> http.client.HTTPSConnection:
        address = urlsplit(self._url)
        assert address.hostname is not None
        return http.client.HTTPSConnection(address.hostname, address.port, timeout=timeout_s, context=self._trust)

    def _reused(self) -> http.client.HTTPSConnection | None:
        """An idle connection that the server has not closed. A closed connection has its end of file to read."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if connection.sock is not None and not select.select([connection.sock], [], [], 0)[0]:
                return connection
            connection.close()


def _refused(method: str, path: str, status: int, data: bytes) -> RequestError:
    try:
        text = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        text = data[:300].decode(errors="replace").strip()
    return RequestError(f"{method} {path} was answered {status}: {text}", status)
