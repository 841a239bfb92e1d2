"""The API server, as the administrator: a few verbs over one pool of connections, dicts in, dicts out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import urllib3
import yaml

from hack.lib.scale.errors import ScaleError

Body = Mapping[str, Any]

RESOURCE = "/apis/resource.k8s.io/v1"
PODS = "/api/v1/namespaces/default/pods"
CLAIMS = f"{RESOURCE}/namespaces/default/resourceclaims"
TEMPLATES = f"{RESOURCE}/namespaces/default/resourceclaimtemplates"
CLASSES = f"{RESOURCE}/deviceclasses"
SLICES = f"{RESOURCE}/resourceslices"
NODES = "/api/v1/nodes"

_WRITERS = 8  # requests under way at once
_CONFLICT = 409
_ATTEMPTS = 10  # where a controller writes the same object
_LONGEST_S = 600  # of a watch
_MERGE = {"Content-Type": "application/merge-patch+json"}
_JSON = {"Content-Type": "application/json"}


class Api:
    def __init__(self, kubeconfig: Path) -> None:
        body = yaml.safe_load(kubeconfig.read_text())
        server, user = body["clusters"][0]["cluster"], body["users"][0]["user"]
        self._server = server["server"]
        self._user = {"Authorization": f"Bearer {user['token']}"}
        self._http = urllib3.PoolManager(maxsize=_WRITERS + 1, ca_certs=server["certificate-authority"])
        # The scheduler signs its own certificate anew at each start; it is asked on the loopback address only.
        self._other = urllib3.PoolManager(cert_reqs="CERT_NONE", assert_hostname=False)

    def ask(self, verb: str, path: str, body: Body | None = None, kind: Mapping[str, str] = _JSON) -> Any:
        """What the server answers. ScaleError where it refuses; a conflict is tried again."""
        text = None if body is None else json.dumps(body)
        for attempt in range(_ATTEMPTS):
            answer = self._http.request(verb, self._server + path, body=text, headers=self._user | dict(kind))
            if answer.status < 300:
                return json.loads(answer.data)
            if answer.status != _CONFLICT or attempt == _ATTEMPTS - 1:
                raise ScaleError(f"{verb} {path} was refused: {answer.data[:600].decode(errors='replace')}")
        raise AssertionError("unreachable")

    def create(self, path: str, bodies: Iterable[Body]) -> list[Body]:
        """Create all, several at once; in their order, as the server has them."""
        return self._all("POST", ((path, body) for body in bodies), _JSON)

    def patch(self, changes: Iterable[tuple[str, Body]]) -> None:
        """Merge each body into the object at its path, several at once."""
        self._all("PATCH", changes, _MERGE)

    def _all(self, verb: str, calls: Iterable[tuple[str, Body]], kind: Mapping[str, str]) -> list[Body]:
        with ThreadPoolExecutor(_WRITERS, "api") as threads:
            return list(threads.map(lambda call: self.ask(verb, call[0], call[1], kind), calls))

    def clear(self, path: str) -> None:
        """Delete everything there, at once."""
        self.ask("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", "gracePeriodSeconds": 0})

    def watch(self, path: str) -> Iterator[Body]:
        """Events from now on: {"type": …, "object": …}. What is there already comes first, as ADDED, and then one LISTED.

        ScaleError when it takes too long.
        """
        found = self.ask("GET", path)
        yield from ({"type": "ADDED", "object": item} for item in found["items"])
        yield {"type": "LISTED", "object": found}
        query = f"?watch=true&timeoutSeconds={_LONGEST_S}&resourceVersion={found['metadata']['resourceVersion']}"
        answer = self._http.request("GET", f"{self._server}{path}{query}", headers=self._user, preload_content=False)
        try:
            for line in answer:
                event: Body = json.loads(line)
                if event["type"] == "ERROR":
                    raise ScaleError(f"the watch of {path} broke: {event['object'].get('message', 'no reason given')}")
                yield event
        finally:
            answer.close()
        raise ScaleError(f"what was waited for at {path} did not come within {_LONGEST_S} s; see the scheduler's log")

    def gone(self, path: str) -> None:
        """Return when nothing is there."""
        there: set[str] = set()
        for event in self.watch(path):
            name = event["object"]["metadata"].get("name")
            if event["type"] == "ADDED":
                there.add(name)
            elif event["type"] == "DELETED":
                there.discard(name)
            if not there and event["type"] in ("LISTED", "DELETED"):
                return

    def fetch(self, url: str) -> bytes:
        """From another server of this cluster, whoever signed its certificate."""
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
        answer = self._other.request("GET", url, headers=self._user, timeout=120.0)
        if answer.status != 200:
            raise ScaleError(f"{url} answers {answer.status}: {answer.data[:300].decode(errors='replace')}")
        return bytes(answer.data)
