"""A stand-in API server over HTTPS. It behaves like the real one in everything that a driver can notice.

It keeps objects (`store`), treats ResourceSlices like the real one (`slices`), and serves these verbs: create, get,
list, update, delete, deletecollection, watch. It schedules nothing and checks no rights. Tests embed it and make it
fail on cue. `python -m gpuslice.standin.apiserver --folder F` runs it as a process; its kubeconfig is in the folder.
"""

from __future__ import annotations

import argparse
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import yaml

from gpuslice.core.json import Body
from gpuslice.standin import kinds, pods, resource_slices, tls
from gpuslice.standin.http import HttpRequest, Listener, ScriptedAnswer
from gpuslice.standin.kinds import KINDS, RESOURCE_GROUP
from gpuslice.standin.selectors import matching
from gpuslice.standin.store import Event, Key, RefusalError, Store, copied

TOKEN = "stand-in"

ApiAnswer = tuple[int, Body]


class StandInApiServer:
    """One API server with its state. `start` listens and writes `kubeconfig`. The state survives `away` and `back`.

    version: "1.33" (no resource.k8s.io/v1) to "1.37"; it decides which gates are on. dropping: further gates to turn
    off (`slices.PARTITIONABLE` …). `writes` counts the requests that changed something: "create resourceslices" → 2.
    """

    def __init__(self, folder: Path, version: str = "1.37", *, dropping: Iterable[str] = (), port: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.become(version, dropping=dropping)
        self.store = Store()
        self.kubeconfig = folder / "kubeconfig"
        self.requests: list[HttpRequest] = []
        self.bookmarks = True  # a real server sends none if it knows nothing newer than the version of the request
        self._cues: list[ScriptedAnswer] = []
        self._certificate = tls.certificate(folder)
        self._listener = Listener(self._certificate.server_context(), TOKEN, self._serve, self._watch, self._cue, port)

    # ------------------------------------------------------------ life

    def start(self) -> StandInApiServer:
        self._listener.start()
        self.kubeconfig.write_text(yaml.safe_dump(self._kubeconfig()), encoding="utf-8")
        return self

    def stop(self) -> None:
        self._listener.stop(wake=self.release)

    def away(self) -> None:
        """Stop listening and cut every connection, hanging ones included. The objects stay."""
        self._listener.stop(wake=self.release)

    def back(self) -> None:
        self._listener.start()

    def become(self, version: str, *, dropping: Iterable[str] = ()) -> None:
        """Serve as another version from now on, as after an upgrade or a downgrade. The objects stay."""
        self.version, self.gates = version, resource_slices.gates(version) - frozenset(dropping)

    def __enter__(self) -> StandInApiServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def token(self) -> str:
        """The only token that the server accepts. A test may change it."""
        return self._listener.token

    @token.setter
    def token(self, token: str) -> None:
        self._listener.token = token

    @property
    def writes(self) -> Counter[str]:
        with self.store.changed:
            return Counter(self.store.writes)

    def wait(self, until: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Return when `until` is true. It is checked after each write and each request. TimeoutError after `timeout_s`."""
        with self.store.changed:
            if not self.store.changed.wait_for(until, timeout_s):
                raise TimeoutError(f"not true within {timeout_s} s; writes so far: {dict(self.store.writes)}")

    # ------------------------------------------------------------ cues

    # `path` is any part of the path with its query: "resourceclaims", "watch=true", "dryRun".

    def fail(
        self,
        status: int,
        times: int = 1,
        *,
        method: str = "",
        path: str = "",
        retry_after_s: int | None = None,
        text: str = "refused on cue",
    ) -> None:
        """Answer the next requests of this kind with an error status."""
        self._add(ScriptedAnswer("fail", times, method, path, status, retry_after_s, text))

    def answer(self, status: int, data: bytes, times: int = 1, *, method: str = "", path: str = "") -> None:
        """Answer the next such requests with these bytes, as a proxy or a broken server does."""
        self._add(ScriptedAnswer("answer", times, method, path, status, data=data))

    def drip(self, times: int = 1, *, method: str = "", path: str = "") -> None:
        """Answer the next such requests byte by byte, without an end before `release`."""
        self._add(ScriptedAnswer("drip", times, method, path))

    def hang(self, times: int = 1, *, method: str = "", path: str = "") -> None:
        """Leave the next requests of this kind without an answer until `release`."""
        self._add(ScriptedAnswer("hang", times, method, path))

    def cut(self, times: int = 1, *, method: str = "", path: str = "") -> None:
        """Close the connection of the next requests of this kind instead of an answer."""
        self._add(ScriptedAnswer("cut", times, method, path))

    def release(self) -> None:
        """Forget all cues. Hanging requests are served now."""
        with self.store.changed:
            hanging, self._cues = self._cues, []
            self.store.changed.notify_all()
        for cue in hanging:
            cue.released.set()

    def _add(self, cue: ScriptedAnswer) -> None:
        with self.store.changed:
            self._cues.append(cue)

    def _cue(self, request: HttpRequest) -> ScriptedAnswer | None:
        with self.store.changed:
            self.requests.append(request)
            self.store.changed.notify_all()
            for cue in self._cues:
                if cue.times > 0 and cue.method in ("", request.method) and cue.path in request.target:
                    cue.times -= 1
                    return cue
        return None

    # ------------------------------------------------------------ objects, for callers in the same process

    def create(self, resource: str, body: Body, namespace: str = "") -> Body:
        return self._create(resource, namespace, copied(body), dry=False)

    def get(self, resource: str, name: str, namespace: str = "") -> Body:
        return copied(self.store.get(Key(resource, namespace, name)))

    def all(self, resource: str, namespace: str = "") -> list[Body]:
        return [copied(body) for _, body in self.store.items(resource, namespace, lambda _: True)[0]]

    def update(self, resource: str, body: Body) -> Body:
        """Replace the whole object, including its status."""
        meta = body["metadata"]
        return self.store.update(Key(resource, meta.get("namespace", ""), meta["name"]), copied(body))

    def delete(self, resource: str, name: str, namespace: str = "") -> None:
        self.store.delete(Key(resource, namespace, name), {})

    def add_node(self, name: str) -> str:
        """Register a node. Returns its UID."""
        return str(self.create("nodes", {"metadata": {"name": name}})["metadata"]["uid"])

    # ------------------------------------------------------------ requests

    def _serve(self, request: HttpRequest) -> ApiAnswer:
        if request.method == "GET" and request.path == "/version":
            minor = self.version.split(".")[1]
            return 200, {"major": "1", "minor": minor, "gitVersion": f"v{self.version}.0"}
        if request.method == "GET" and request.path == RESOURCE_GROUP and kinds.is_served(self.version):
            return 200, kinds.discovery(self.version)
        resource, key, below = self._target(request)
        match request.method, key:
            case "POST", Key("pods") if below == "eviction":
                return 201, pods.evict(self.store, key, request.json())
            case "DELETE", Key("pods"):
                return 200, self._typed(resource, pods.delete(self.store, key, request.json(), dry=request.dry))
            case "GET", None:
                return 200, self._list(resource, request)
            case "GET", Key():
                return 200, self._typed(resource, self.store.get(key))
            case "POST", None:
                body = self._create(resource, request.namespace, request.json(), dry=request.dry)
                return 201, self._typed(resource, body)
            case "PUT", Key():
                return 200, self._typed(resource, self._update(key, request, status=below == "status"))
            case "DELETE", Key():
                expected = request.json().get("preconditions") or {}
                return 200, self._typed(resource, self.store.delete(key, expected, dry=request.dry))
            case "DELETE", None:
                return 200, self._delete_all(resource, request)
            case _:
                pass
        raise RefusalError(405, "MethodNotAllowed", f"{request.method} is not served by the stand-in API server")

    def _target(self, request: HttpRequest) -> tuple[str, Key | None, str]:
        """The resource, and the object and the subresource if the path names them."""
        parts = request.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        request.namespace = parts[1] if len(parts) > 2 and parts[0] == "namespaces" else ""
        parts = parts[2:] if request.namespace else parts
        kind = KINDS.get(parts[0]) if parts else None
        served = kind is not None and request.path.startswith(kind.prefix + "/")
        if kind is None or not served or not kind.since <= int(self.version.split(".")[1]):
            raise RefusalError(404, "NotFound", "the server could not find the requested resource")
        key = Key(parts[0], request.namespace, parts[1]) if len(parts) > 1 else None
        return parts[0], key, "/".join(parts[2:])

    def _typed(self, resource: str, body: Body) -> Body:
        kind = KINDS[resource]
        return {"kind": kind.kind, "apiVersion": kind.api_version} | body

    def _create(self, resource: str, namespace: str, body: Body, *, dry: bool) -> Body:
        if KINDS[resource].namespaced and not namespace:
            raise RefusalError(400, "BadRequest", f"{resource} live in a namespace; name one")
        return self.store.create(resource, namespace, self._admitted(resource, body, None), dry=dry)

    def _update(self, key: Key, request: HttpRequest, *, status: bool) -> Body:
        old, new = self.store.get(key), request.json()
        if status:
            expected = new.get("metadata") or {}
            meta = old["metadata"] | {k: expected[k] for k in ("uid", "resourceVersion") if expected.get(k)}
            return self.store.update(key, old | {"metadata": meta, "status": new.get("status", {})}, dry=request.dry)
        new.pop("status", None)
        if "status" in old:
            new["status"] = old["status"]
        if not (new.get("metadata") or {}).get("resourceVersion"):
            raise RefusalError(
                422, "Invalid", "metadata.resourceVersion: Invalid value: must be specified for an update"
            )
        return self.store.update(key, self._admitted(key.resource, new, old), dry=request.dry)

    def _admitted(self, resource: str, body: Body, old: Body | None) -> Body:
        body = {k: v for k, v in body.items() if k not in ("kind", "apiVersion")}
        if resource != "resourceslices":
            return body
        body = resource_slices.accepted(body, old, self.gates)
        if found := resource_slices.faults(body, old):
            name = (body.get("metadata") or {}).get("name", "")
            raise RefusalError(422, "Invalid", f'ResourceSlice "{name}" is invalid: {"; ".join(found)}')
        return body

    def _list(self, resource: str, request: HttpRequest) -> Body:
        items, version = self.store.items(resource, request.namespace, matching(resource, request.query))
        after, limit = request.query.get("continue", ""), int(request.query.get("limit", "0"))
        items = [(key, body) for key, body in items if f"{key.namespace}/{key.name}" > after]
        meta = {"resourceVersion": str(version)}
        if limit and len(items) > limit:
            last = items[limit - 1][0]
            meta["continue"] = f"{last.namespace}/{last.name}"
            items = items[:limit]
        kind = KINDS[resource]
        bodies = [body for _, body in items]
        return {"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": meta, "items": bodies}

    def _delete_all(self, resource: str, request: HttpRequest) -> Body:
        with self.store.changed:
            for key, _ in self.store.items(resource, request.namespace, matching(resource, request.query))[0]:
                self.store.delete(key, {}, dry=request.dry)
        return self._list(resource, request)

    def _watch(self, request: HttpRequest, stopped: Callable[[], bool]) -> Iterator[Body]:
        """Events until the time is over or the listener stops."""
        resource, _, _ = self._target(request)
        match = matching(resource, request.query)
        version = request.query.get("resourceVersion", "")
        if version not in ("", "0"):
            return self._events(request, resource, match, int(version), [], stopped)
        found, at = self.store.items(resource, request.namespace, match)
        return self._events(request, resource, match, at, [Event(at, "ADDED", k, body) for k, body in found], stopped)

    def _events(
        self,
        request: HttpRequest,
        resource: str,
        match: Callable[[Body], bool],
        at: int,
        events: Sequence[Event],
        stopped: Callable[[], bool],
    ) -> Iterator[Body]:
        """A version that is too old is an ERROR event in a stream that began well, as in the real server."""
        deadline = request.deadline()
        while True:
            for event in events:
                yield {"type": event.type, "object": self._typed(resource, event.body)}
                at = event.version
            now = self.store.wait_past(at, deadline.left_s(), stopped)
            over = stopped() or deadline.left_s() <= 0
            try:
                events = list(self.store.since(at, resource, request.namespace, match))
            except RefusalError as e:
                yield {"type": "ERROR", "object": e.body()}
                return
            if over and not events:
                if self.bookmarks and request.query.get("allowWatchBookmarks") == "true":
                    meta = {"metadata": {"resourceVersion": str(now)}}
                    yield {"type": "BOOKMARK", "object": self._typed(resource, meta)}
                return
            at = at if events else now

    def _kubeconfig(self) -> Body:
        authority = str(self._certificate.certificate)
        cluster = {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": authority}
        return {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "stand-in",
            "clusters": [{"name": "stand-in", "cluster": cluster}],
            "users": [{"name": "stand-in", "user": {"token": TOKEN}}],
            "contexts": [{"name": "stand-in", "context": {"cluster": "stand-in", "user": "stand-in"}}],
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpuslice.standin.apiserver", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="for the certificate, the kubeconfig and `port`")
    parser.add_argument("--port", type=int, default=0, help="port; 0: any free one")
    parser.add_argument("--version", default="1.37", help="1.33 to 1.37")
    parser.add_argument("--node", action="append", default=[], help="a node to register; repeatable")
    options = parser.parse_args()
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    with StandInApiServer(options.folder.absolute(), options.version, port=options.port) as server:
        for node in options.node:
            server.add_node(node)
        (options.folder / "port").write_text(str(server.port), encoding="utf-8")
        print(f"https://127.0.0.1:{server.port}", flush=True)
        over.wait()


if __name__ == "__main__":
    main()
