"""The only way to the API server: a dozen blocking verbs that take and return dicts. Every failure is an `ApiError`.

Bodies stay dicts on purpose. A typed client drops fields that a newer API server added, so an object that it read must
never be written back. And `kubernetes`' model modules take 0.1 to 0.7 s at the start (measured). So nothing above
`ApiClient` is used: it has TLS, kubeconfig with all kinds of login, rotation of the service-account token and connection
pools. Requests go straight to its connection pool, because its own way takes as long as the request (0.2 ms, measured).

Only resource.k8s.io/v1, which Kubernetes has since 1.34 (the DRA contract, statement 66). Clusters with only v1beta1,
which nests devices differently, or v1beta2, which has the types of v1, cannot share a GPU safely. Their users get an error.

Calls block, and are safe in any number of threads. Claims have their own connections, so slices never delay a pod.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import urllib3

from gpuslice import __version__
from gpuslice.client_library import ApiClient, Configuration, config
from gpuslice.core import json as bodies
from gpuslice.core.json import Body
from gpuslice.core.model import RESOURCE_API
from gpuslice.errors import ApiError, ConflictError, ExpiredError, LastingApiError, NotFoundError
from gpuslice.kubeconfig import read, usable

_CONNECT_S, _READ_S = 3.0, 8.0
_TIMEOUT = urllib3.Timeout(connect=_CONNECT_S, read=_READ_S)
_PAGE = 500  # objects per list request, client-go's figure
_GROUP = f"/apis/{RESOURCE_API}"


@dataclass(frozen=True, slots=True)
class _Call:
    """A request in the words of a ClusterRole."""

    verb: str  # Kubernetes' word in RBAC
    resource: str
    path: str

    @property
    def method(self) -> str:
        return {"create": "POST", "update": "PUT", "delete": "DELETE"}.get(self.verb, "GET")

    @property
    def collection(self) -> bool:
        """Whether a 404 can only mean that the server does not know the resource."""
        return self.verb in ("list", "watch", "create")


class Watch:
    """Events as they arrive, until the time is over: {"type": ADDED | MODIFIED | DELETED | BOOKMARK, "object": …}.

    `close` ends the watch at once, from any thread. ExpiredError: the resource version is too old, list again.
    """

    def __init__(self, call: _Call, response: urllib3.BaseHTTPResponse, server: str) -> None:
        self._call, self._response, self._server = call, response, server
        self._closed = False

    def __iter__(self) -> Iterator[Body]:
        try:
            for line in self._lines():
                event = bodies.parse_object(line)
                thing = event.get("object")
                if event.get("type") == "ERROR" and isinstance(thing, dict):
                    raise _refused(self._call, *bodies.status(thing))
                if bodies.is_event(event):
                    yield event
        except (urllib3.exceptions.HTTPError, ValueError, OSError) as e:
            if not self._closed:
                raise _unreachable(self._server, e) from e
        finally:
            self._response.close()

    def _lines(self) -> Iterator[bytes]:
        rest = b""
        for chunk in self._response.stream():
            *lines, rest = (rest + chunk).split(b"\n")
            yield from lines

    def close(self) -> None:
        self._closed = True
        # A close alone does not wake the reading thread. ValueError: the watch has ended already.
        with contextlib.suppress(ValueError, OSError):
            self._response.shutdown()


class Kube:
    """The API server of a kubeconfig; with None, the API server of the cluster that this pod runs in.

    The constructor reads the configuration, but does not connect yet (a few ms). ConfigError: the configuration is unusable.
    Every verb raises ApiError (NotFoundError, ConflictError, ExpiredError). None waits longer than about 20 s.
    """

    def __init__(self, kubeconfig: Path | None = None) -> None:
        with usable(kubeconfig):
            configuration = read(kubeconfig)
            self.server = urlsplit(configuration.host).netloc
            self._connections = _Connections(configuration)
            self._claims = _Connections(configuration)

    def close(self) -> None:
        self._connections.close()
        self._claims.close()

    def version(self) -> str:
        """The server's version: "v1.37.1"."""
        version = self._ask(_Call("get", "version", "/version")).get("gitVersion")
        if not isinstance(version, str):
            raise self._odd("a version without gitVersion")
        return version

    def node_uid(self, name: str) -> str:
        try:
            body = self._ask(_Call("get", "nodes", f"/api/v1/nodes/{quote(name)}"))
        except NotFoundError as e:
            said = (
                f"there is no Node {name!r} in the cluster of {self.server}; name a node that kubectl get nodes lists"
            )
            raise NotFoundError(f"{said}, with --node-name or NODE_NAME", e.status) from e
        uid = body.get("metadata", {}).get("uid")
        if not isinstance(uid, str):
            raise self._odd(f"a node {name} without UID")
        return uid

    # ------------------------------------------------------------ claims

    def claim(self, namespace: str, name: str) -> Body:
        """A ResourceClaim; about 1 ms on a kept-alive connection (measured against the stand-in, same machine)."""
        path = f"{_GROUP}/namespaces/{quote(namespace)}/resourceclaims/{quote(name)}"
        return self._ask(_Call("get", "resourceclaims", path), connections=self._claims)

    def claims(self) -> list[Body]:
        """All ResourceClaims of the cluster, in pages."""
        return self._all(_Call("list", "resourceclaims", f"{_GROUP}/resourceclaims"))[0]

    # ------------------------------------------------------------ resource slices

    def resource_slices(self, driver: str, node: str) -> tuple[list[Body], str]:
        """A driver's ResourceSlices on a node, and the resource version from which to watch them."""
        selector = _selector(driver, node)
        call = _Call("list", "resourceslices", f"{_GROUP}/resourceslices")
        items, version = self._all(call, {"fieldSelector": selector})
        if not version.isdecimal():
            raise self._odd(f"a list of resourceslices with the resource version {version[:40]!r}")
        return list(filter(bodies.is_resource_slice, items)), version

    def watch_resource_slices(self, driver: str, node: str, resource_version: str, timeout_s: int) -> Watch:
        """Watch the ResourceSlices of a driver on a node after a resource version, for at most `timeout_s`."""
        call = _Call("watch", "resourceslices", f"{_GROUP}/resourceslices")
        query = {
            "fieldSelector": _selector(driver, node),
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(timeout_s),
        }
        # The read timeout is for a silent server. A healthy server ends the watch before.
        timeout = urllib3.Timeout(connect=_CONNECT_S, read=timeout_s + 30.0)
        response = self._send(self._connections, call, query, None, timeout)
        return Watch(call, response, self.server)

    def create_resource_slice(self, body: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Create a ResourceSlice and return it as the server stored it. `dry_run`: the server only checks it."""
        call = _Call("create", "resourceslices", f"{_GROUP}/resourceslices")
        return self._written(call, body, dry_run=dry_run)

    def update_resource_slice(self, body: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Replace the slice of this name. ConflictError if its resourceVersion differs from the body's."""
        name = quote(body["metadata"]["name"])
        call = _Call("update", "resourceslices", f"{_GROUP}/resourceslices/{name}")
        return self._written(call, body, dry_run=dry_run)

    def _written(self, call: _Call, body: Mapping[str, Any], *, dry_run: bool) -> Body:
        answer = self._ask(call, {"dryRun": "All"} if dry_run else {}, body)
        if not bodies.is_resource_slice(answer, stored=not dry_run):
            raise self._odd(f"an object that is not a slice to {call.verb} {call.resource}")
        return answer

    def delete_resource_slice(self, name: str, *, uid: str, resource_version: str) -> None:
        """Delete this state of a ResourceSlice. NotFoundError if it does not exist, ConflictError if it has changed."""
        call = _Call("delete", "resourceslices", f"{_GROUP}/resourceslices/{quote(name)}")
        self._ask(call, body={"preconditions": {"uid": uid, "resourceVersion": resource_version}})

    # ------------------------------------------------------------ below the verbs

    def _all(self, call: _Call, query: Mapping[str, str] | None = None) -> tuple[list[Body], str]:
        found: list[Body] = []
        page = {"limit": str(_PAGE), **(query or {})}
        while True:
            answer = self._ask(call, page)
            items = answer.get("items") or []
            if not isinstance(items, list):
                raise self._odd(f"a list of {call.resource} whose items are not a list")
            found += filter(bodies.is_object, items)
            metadata = answer.get("metadata", {})
            if not (onward := metadata.get("continue")):
                return found, str(metadata.get("resourceVersion", ""))
            page["continue"] = onward

    def _ask(
        self,
        call: _Call,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        connections: _Connections | None = None,
    ) -> Body:
        response = self._send(connections or self._connections, call, query or {}, body, _TIMEOUT)
        try:
            return bodies.parse_object(response.data)
        except (urllib3.exceptions.HTTPError, ValueError, OSError) as e:
            raise _unreachable(self.server, e) from e

    def _odd(self, what: str) -> ApiError:
        return ApiError(
            f"the API server at {self.server} answered {what}; check the API server and the proxies before it"
        )

    def _send(
        self,
        connections: _Connections,
        call: _Call,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        timeout: urllib3.Timeout,
    ) -> urllib3.BaseHTTPResponse:
        path = f"{call.path}?{urlencode(query)}" if query else call.path
        try:
            answer = connections.request(call.method, path, body, timeout)
            if answer.status < 300:
                return answer
            text = bodies.message(answer.data)
        except (urllib3.exceptions.HTTPError, config.ConfigException, OSError) as e:
            raise _unreachable(self.server, e) from e
        if answer.status == 404 and call.collection:
            said = f"API server {self.version()} does not serve resource.k8s.io/v1; Kubernetes 1.34 or later is needed"
            raise LastingApiError(said, 404)
        raise _refused(call, answer.status, text)


class _Connections:
    """Kept-alive connections to one server, with its login."""

    def __init__(self, configuration: Configuration) -> None:
        # urllib3 warns about each connection that it opens again. Our errors have all that matters.
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
        self._client = ApiClient(configuration)
        manager: urllib3.PoolManager = self._client.rest_client.pool_manager
        # With a proxy, the manager decides for each request which way it takes.
        direct = type(manager) is urllib3.PoolManager
        self._urlopen = manager.connection_from_url(configuration.host).urlopen if direct else manager.urlopen
        self._prefix = urlsplit(configuration.host).path.rstrip("/") if direct else configuration.host

    def request(
        self, method: str, path: str, body: Mapping[str, Any] | None, timeout: urllib3.Timeout
    ) -> urllib3.BaseHTTPResponse:
        """The head of the answer. The body is not read yet."""
        headers = {"Accept": "application/json", "User-Agent": f"gpuslice/{__version__}"}
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode()
        self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, data)
        return self._urlopen(
            method,
            self._prefix + path,
            body=data,
            headers=headers,
            timeout=timeout,
            preload_content=False,
            assert_same_host=False,
        )

    def close(self) -> None:
        self._client.close()


def _selector(driver: str, node: str) -> str:
    return f"spec.driver={driver},spec.nodeName={node}"


def _refused(call: _Call, status: int, text: str) -> ApiError:
    what = f"{call.verb} {call.resource}"
    match status:
        case 404:
            return NotFoundError(f"{what}: {text}", status)
        case 409:
            return ConflictError(f"{what}: {text}", status)
        case 410:
            return ExpiredError(f"{what}: {text}", status)
        case 401:
            return LastingApiError(
                f"the API server refused the driver's credentials ({what}: {text}); check the token", status
            )
        case 403:
            group = "" if call.resource == "nodes" else "resource.k8s.io"
            return ApiError(
                f'the API server forbids {what}: {text}; add {{apiGroups: ["{group}"], resources: ["{call.resource}"], '
                f'verbs: ["{call.verb}"]}} to the ClusterRole of this service account',
                status,
            )
        case 429:
            return ApiError(f"the API server is too busy for {what}: {text}; the next try may succeed", status)
        case _:
            return ApiError(f"the API server answered {what} with status {status}: {text}", status)


def _unreachable(server: str, error: Exception) -> ApiError:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, urllib3.exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(reason):
        # The certificate authorities are read once, at the start.
        return LastingApiError(
            f"the API server at {server} has a certificate that is not trusted ({reason}); name the certificate authority of "
            "this cluster in the kubeconfig"
        )
    return ApiError(
        f"no answer from the API server at {server} ({reason}); check that it runs and that this node can reach it"
    )
