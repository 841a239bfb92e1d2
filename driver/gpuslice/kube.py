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
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import urllib3

from gpuslice import answers
from gpuslice.answers import Call
from gpuslice.client_library import config
from gpuslice.connections import Connections
from gpuslice.core import json as bodies
from gpuslice.core.json import Body
from gpuslice.core.model import RESOURCE_API
from gpuslice.errors import ApiError, LastingApiError, NotFoundError
from gpuslice.kubeconfig import usable

_LIST_S = 120.0  # limit for all pages of a list
_PAGE = 500  # objects per list request, client-go's figure
_GROUP = f"/apis/{RESOURCE_API}"
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_VERSION = re.compile(r"v(\d+)\.(\d+)")
_FIRST = (1, 34)  # the first release that serves resource.k8s.io/v1

# The rights that the verbs of this module need.
RIGHTS = (
    *((verb, "resourceslices") for verb in ("list", "watch", "create", "update", "delete")),
    *(("get", "resourceclaims"), ("list", "resourceclaims"), ("get", "nodes")),
)


class Watch:
    """Events as they arrive, until the time is over: {"type": ADDED | MODIFIED | DELETED | BOOKMARK, "object": …}.

    `close` ends the watch at once, from any thread. ExpiredError: the resource version is too old, list again.
    """

    def __init__(self, call: Call, response: urllib3.BaseHTTPResponse, server: str) -> None:
        self._call, self._response, self._server = call, response, server
        self._closed = False

    def __iter__(self) -> Iterator[Body]:
        try:
            for line in self._lines():
                event = bodies.parse_object(line)
                thing = event.get("object")
                if event.get("type") == "ERROR" and isinstance(thing, dict):
                    raise answers.event_refusal(self._call, thing)
                if not bodies.is_event(event):  # if the driver skipped an event, it would count as no change
                    raise answers.odd(self._server, "a watch with an item that is not an event")
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
        if rest.strip():  # cut off, or no watch at all
            yield rest

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
            self._connections = Connections(kubeconfig)
            self._claims = Connections(kubeconfig)
            self.server = self._connections.server

    def close(self) -> None:
        self._connections.close()
        self._claims.close()

    def version(self) -> str:
        """The server's version: "v1.37.1"; "v1.37.1 as 1.35" for a server that emulates 1.35 (KEP-4330)."""
        body = self._ask(Call("get", "version", "/version"))
        version, emulated = body.get("gitVersion"), [body.get(f"emulation{part}") for part in ("Major", "Minor")]
        if not isinstance(version, str) or (match := _VERSION.match(version)) is None:
            raise self._odd("a version without gitVersion")
        if not all(isinstance(part, str) and part.isdecimal() for part in emulated) or emulated == [*match.groups()]:
            return version
        return f"{version} as {'.'.join(map(str, emulated))}"

    def node_uid(self, name: str) -> str:
        try:
            body = self._ask(Call("get", "nodes", f"/api/v1/nodes/{quote(name)}", name))
        except NotFoundError as e:
            said = (
                f"there is no Node {name!r} in the cluster of {self.server}; name a node that kubectl get nodes lists"
            )
            raise NotFoundError(f"{said}, with --node-name or NODE_NAME", e.status) from e
        metadata = body.get("metadata", {})
        if not bodies.is_object(body) or metadata["name"] != name:
            raise self._odd(f"something else than node {name} with its UID")
        return str(metadata["uid"])

    def may(self, verb: str, resource: str) -> bool:
        """Whether this login has the right, in every namespace. Every login may ask (ClusterRole system:basic-user)."""
        call = Call("create", "selfsubjectaccessreviews", _REVIEWS)
        right = {"verb": verb, "resource": resource, "group": Call(verb, resource, "").group}
        body = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1"}
        answer = self._ask(call, body={**body, "spec": {"resourceAttributes": right}})
        status = answer.get("status")
        if not isinstance(status, dict) or not isinstance(status.get("allowed"), bool):
            raise self._odd(f"a review of the right to {verb} {resource} without a result")
        return bool(status["allowed"])

    # ------------------------------------------------------------ claims

    def claim(self, namespace: str, name: str) -> Body:
        """A ResourceClaim; about 1 ms on a kept-alive connection (measured against the stand-in, same machine)."""
        path = f"{_GROUP}/namespaces/{quote(namespace)}/resourceclaims/{quote(name)}"
        answer = self._ask(Call("get", "resourceclaims", path, name), connections=self._claims)
        metadata = answer.get("metadata", {})
        if not bodies.is_claim(answer) or (metadata.get("namespace"), metadata["name"]) != (namespace, name):
            raise self._odd(f"something else than claim {namespace}/{name}")
        return answer

    def claims(self) -> Iterator[Body]:
        """All ResourceClaims of the cluster, one page in memory at a time: a large cluster has tens of megabytes of them.

        ApiError may come after the first claims. Then the claims are incomplete.
        """
        call = Call("list", "resourceclaims", f"{_GROUP}/resourceclaims")
        for items, _ in self._pages(call, "ResourceClaimList", bodies.is_claim):
            yield from items

    # ------------------------------------------------------------ resource slices

    def resource_slices(self, driver: str, node: str) -> tuple[list[Body], str]:
        """A driver's ResourceSlices on a node, and the resource version from which to watch them."""
        selector = _selector(driver, node)
        call = Call("list", "resourceslices", f"{_GROUP}/resourceslices")
        items: list[Body] = []
        pages = self._pages(call, "ResourceSliceList", bodies.is_resource_slice, {"fieldSelector": selector})
        for page, version in pages:  # noqa: B007 - the version of the last page counts
            items += page
        if not version.isdecimal():
            raise self._odd(f"a list of resourceslices with the resource version {version[:40]!r}")
        return items, version

    def watch_resource_slices(self, driver: str, node: str, resource_version: str, timeout_s: int) -> Watch:
        """Watch the ResourceSlices of a driver on a node after a resource version, for at most `timeout_s`."""
        call = Call("watch", "resourceslices", f"{_GROUP}/resourceslices")
        query = {
            "fieldSelector": _selector(driver, node),
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(timeout_s),
        }
        # The limit is for a silent server. A healthy server ends the watch before it.
        response = self._send(self._connections, call, query, None, timeout_s + 30.0)
        return Watch(call, response, self.server)

    def create_resource_slice(self, body: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Create a ResourceSlice and return it as the server stored it. `dry_run`: the server only checks it."""
        call = Call("create", "resourceslices", f"{_GROUP}/resourceslices")
        return self._written(call, body, dry_run=dry_run)

    def update_resource_slice(self, body: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Replace the slice of this name. ConflictError if its resourceVersion differs from the body's."""
        name = quote(body["metadata"]["name"])
        call = Call("update", "resourceslices", f"{_GROUP}/resourceslices/{name}", body["metadata"]["name"])
        return self._written(call, body, dry_run=dry_run)

    def _written(self, call: Call, body: Mapping[str, Any], *, dry_run: bool) -> Body:
        answer = self._ask(call, {"dryRun": "All"} if dry_run else {}, body)
        if not bodies.is_resource_slice(answer, stored=not dry_run) or not bodies.answers(body, answer):
            raise self._odd(f"something else than the slice to {call}")
        return answer

    def delete_resource_slice(self, name: str, *, uid: str, resource_version: str) -> None:
        """Delete this state of a ResourceSlice. NotFoundError if it does not exist, ConflictError if it has changed."""
        call = Call("delete", "resourceslices", f"{_GROUP}/resourceslices/{quote(name)}", name)
        answer = self._ask(call, body={"preconditions": {"uid": uid, "resourceVersion": resource_version}})
        if not bodies.is_deletion(answer, uid):
            raise self._odd(f"something else than the deletion to {call}")

    # ------------------------------------------------------------ below the verbs

    def _pages(
        self, call: Call, kind: str, is_item: Callable[[object], bool], query: Mapping[str, str] | None = None
    ) -> Iterator[tuple[list[Body], str]]:
        """The pages of a list, each with the list's resource version. ApiError for a list with an odd item, because a
        missing item counts as deleted."""
        page, end = {"limit": str(_PAGE), **(query or {})}, time.monotonic() + _LIST_S
        while time.monotonic() < end:
            answer = self._ask(call, page)
            items, metadata = answer.get("items") or [], answer.get("metadata", {})
            if answer.get("kind") != kind or not isinstance(items, list):
                raise self._odd(f"no list of {call.resource}")
            if not all(map(is_item, items)):
                raise self._odd(f"a list of {call.resource} with an item of another kind")
            yield items, str(metadata.get("resourceVersion", ""))
            if not (onward := metadata.get("continue")):
                return
            page["continue"] = str(onward)
        raise self._odd(f"a list of {call.resource} that does not end within {_LIST_S:.0f} s")

    def _ask(
        self,
        call: Call,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        connections: Connections | None = None,
    ) -> Body:
        response = self._send(connections or self._connections, call, query or {}, body)
        try:
            return bodies.parse_object(response.data)
        except (urllib3.exceptions.HTTPError, ValueError, OSError) as e:
            raise _unreachable(self.server, e) from e

    def _odd(self, what: str) -> ApiError:
        return answers.odd(self.server, what)

    def _send(
        self,
        connections: Connections,
        call: Call,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        limit_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """`limit_s`: the limit of a watch, which may be silent for all this time. Other calls have fixed limits."""
        path = f"{call.path}?{urlencode(query)}" if query else call.path
        try:
            answer = connections.request(call.method, path, body, limit_s)
            if answer.status < 300:
                return answer
            data = answer.data
        except (urllib3.exceptions.HTTPError, config.ConfigException, OSError) as e:
            raise _unreachable(self.server, e) from e
        if answer.status == 404 and call.verb in ("list", "watch", "create"):
            self._refuse_old_server()
        raise answers.refusal(call, answer.status, data)

    def _refuse_old_server(self) -> None:
        """LastingApiError if the server is too old for resource.k8s.io/v1. A 404 alone proves nothing."""
        version = self.version()
        match = _VERSION.match(version)
        if match is not None and (int(match[1]), int(match[2])) < _FIRST:
            said = f"API server {version} does not serve resource.k8s.io/v1; Kubernetes 1.34 or later is needed"
            raise LastingApiError(said, 404)


def _selector(driver: str, node: str) -> str:
    return f"spec.driver={driver},spec.nodeName={node}"


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
