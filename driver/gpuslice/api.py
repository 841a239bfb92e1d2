"""Requests to one API server, below the verbs: a request with its whole answer, the pages of a list, a watch.

The rules for every request: it has a limit of time, its answer is checked, and every failure is an `ApiError`.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import urllib3

from gpuslice import answers
from gpuslice.answers import Call
from gpuslice.client_library import config
from gpuslice.connections import Connections
from gpuslice.core import json as bodies
from gpuslice.core.json import Body
from gpuslice.errors import ApiError, LastingApiError
from gpuslice.kubeconfig import usable

_LIST_S = 120.0  # limit for all pages of a list
_PAGE = 500  # objects per list request, client-go's figure
_VERSION = re.compile(r"v(\d+)\.(\d+)")
_FIRST = (1, 34)  # the first release that serves resource.k8s.io/v1
_SILENT_S = 30.0  # how long a watch may be silent after its end

IsItem = Callable[[object], bool]


class Watch:
    """Events as they arrive, until the time is over: {"type": ADDED | MODIFIED | DELETED | BOOKMARK, "object": …}.

    `close` ends the watch at once, from any thread. ExpiredError: the resource version is too old, list again.
    """

    def __init__(self, call: Call, response: urllib3.BaseHTTPResponse, server: str, is_item: IsItem) -> None:
        self._call, self._response, self._server, self._is_item = call, response, server, is_item
        self._closed = False

    def __iter__(self) -> Iterator[Body]:
        try:
            for line in self._lines():
                event = bodies.parse_object(line)
                thing = event.get("object")
                if event.get("type") == "ERROR" and isinstance(thing, dict):
                    raise answers.event_refusal(self._call, thing)
                if not bodies.is_event(
                    event, self._is_item
                ):  # if the driver skipped an event, it would count as no change
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


class Api:
    """The API server of a kubeconfig; with None, the API server of the cluster that this pod runs in.

    The constructor reads the configuration, but does not connect yet (a few ms). ConfigError: the configuration is unusable.
    Any number of threads may use it at once.
    """

    def __init__(self, kubeconfig: Path | None = None) -> None:
        with usable(kubeconfig):
            self._connections = Connections(kubeconfig)
        self.server = self._connections.server

    def close(self) -> None:
        self._connections.close()

    def version(self) -> str:
        """The server's version: "v1.37.1"; "v1.37.1 as 1.35" for a server that emulates 1.35 (KEP-4330)."""
        body = self.ask(Call("get", "version", "/version"))
        version, emulated = body.get("gitVersion"), [body.get(f"emulation{part}") for part in ("Major", "Minor")]
        if not isinstance(version, str) or (match := _VERSION.match(version)) is None:
            raise self.odd("a version without gitVersion")
        if not all(isinstance(part, str) and part.isdecimal() for part in emulated) or emulated == [*match.groups()]:
            return version
        return f"{version} as {'.'.join(map(str, emulated))}"

    def ask(self, call: Call, query: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None) -> Body:
        """Send a request and return the object of the answer. It takes about 20 s at most."""
        response = self._send(call, query or {}, body)
        try:
            return bodies.parse_object(response.data)
        except (urllib3.exceptions.HTTPError, ValueError, OSError) as e:
            raise _unreachable(self.server, e) from e

    def pages(
        self, call: Call, kind: str, is_item: IsItem, query: Mapping[str, str] | None = None
    ) -> Iterator[tuple[list[Body], str]]:
        """The pages of a list, each with the list's resource version. ApiError for a list with an odd item, because a
        missing item counts as deleted."""
        page, end = {"limit": str(_PAGE), **(query or {})}, time.monotonic() + _LIST_S
        while time.monotonic() < end:
            answer = self.ask(call, page)
            items, metadata = answer.get("items") or [], answer.get("metadata", {})
            if answer.get("kind") != kind or not isinstance(items, list):
                raise self.odd(f"no list of {call.resource}")
            if not all(map(is_item, items)):
                raise self.odd(f"a list of {call.resource} with an item of another kind")
            yield items, str(metadata.get("resourceVersion", ""))
            if not (onward := metadata.get("continue")):
                return
            page["continue"] = str(onward)
        raise self.odd(f"a list of {call.resource} that does not end within {_LIST_S:.0f} s")

    def whole(
        self, call: Call, kind: str, is_item: IsItem, query: Mapping[str, str] | None = None
    ) -> tuple[list[Body], str]:
        """All items of a list, and the resource version from which to watch them."""
        items: list[Body] = []
        for page, version in self.pages(call, kind, is_item, query):  # noqa: B007 - the version of the last page counts
            items += page
        if not version.isdecimal():
            raise self.odd(f"a list of {call.resource} with the resource version {version[:40]!r}")
        return items, version

    def watch(
        self, call: Call, is_item: IsItem, resource_version: str, timeout_s: int, query: Mapping[str, str] | None = None
    ) -> Watch:
        """Watch a list after a resource version, for at most `timeout_s`."""
        more = {
            "watch": "true",
            "resourceVersion": resource_version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(timeout_s),
        }
        # The limit is for a silent server. A healthy server ends the watch before it.
        response = self._send(call, {**(query or {}), **more}, None, timeout_s + _SILENT_S)
        return Watch(call, response, self.server, is_item)

    def odd(self, what: str) -> ApiError:
        return answers.odd(self.server, what)

    def _send(
        self,
        call: Call,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        limit_s: float | None = None,
    ) -> urllib3.BaseHTTPResponse:
        """`limit_s`: the limit of a watch, which may be silent for all this time. Other calls have fixed limits."""
        path = f"{call.path}?{urlencode(query)}" if query else call.path
        try:
            answer = self._connections.request(call.method, path, body, limit_s)
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
