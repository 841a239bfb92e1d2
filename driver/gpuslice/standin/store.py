"""The storage of an API server: objects by name, one resource version for all objects, a history for watches.

A stored body never changes. A write replaces the body by a new one, so readers need no copies.
"""

from __future__ import annotations

import json
import random
import threading
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from gpuslice.core.json import Body
from gpuslice.standin.kinds import KINDS

Predicate = Callable[[Body], bool]

_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # of generated names (apimachinery, util/rand)
_LONGEST_BASE = 58  # generateName is cut here; five random characters follow (apiserver, storage/names)
_HISTORY = 10_000


class RefusalError(Exception):
    """An answer other than 2xx, with the words of the API server."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        headers: dict[str, str] | None = None,
        details: Body | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message
        self.headers, self.details = headers or {}, details or {}

    def body(self) -> Body:
        return {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "details": self.details,
            "code": self.status,
        }


@dataclass(frozen=True, slots=True, order=True)
class Key:
    resource: str  # plural: "resourceslices"
    namespace: str  # "" without a namespace
    name: str


@dataclass(frozen=True, slots=True)
class Event:
    version: int
    type: str  # ADDED, MODIFIED, DELETED
    key: Key
    body: Body


def not_found(key: Key) -> RefusalError:
    """Only the details name the object. A 404 for an unknown path or kind has none (apimachinery, `errors.NewNotFound`)."""
    group = KINDS[key.resource].group
    details = {"name": key.name, "kind": key.resource} | ({"group": group} if group else {})
    return RefusalError(404, "NotFound", f'{key.resource} "{key.name}" not found', details=details)


def now_text() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Store:
    """`changed` is notified at each write. Hold it to read several things consistently."""

    def __init__(self) -> None:
        self.changed = threading.Condition(threading.RLock())
        self.writes: Counter[str] = Counter()  # "create resourceslices": writes that changed something
        self.version = 1000
        self._objects: dict[Key, Body] = {}
        self._history: deque[Event] = deque(maxlen=_HISTORY)
        self._forgotten = self.version  # events up to this version are gone

    def get(self, key: Key) -> Body:
        with self.changed:
            body = self._objects.get(key)
        if body is None:
            raise not_found(key)
        return body

    def items(self, resource: str, namespace: str, match: Predicate) -> tuple[list[tuple[Key, Body]], int]:
        """All matching objects, by name, and the version of the store at that moment. Namespace "": all namespaces."""
        with self.changed:
            found = [
                (key, body)
                for key, body in self._objects.items()
                if key.resource == resource and namespace in ("", key.namespace) and match(body)
            ]
            return sorted(found, key=lambda item: item[0]), self.version

    def create(self, resource: str, namespace: str, body: Body, *, dry: bool = False) -> Body:
        meta = dict(body.get("metadata") or {})
        with self.changed:
            name = meta.get("name") or self._free_name(resource, namespace, meta.get("generateName", ""))
            key = Key(resource, namespace, name)
            if key in self._objects:
                raise RefusalError(409, "AlreadyExists", f'{resource} "{name}" already exists')
            meta |= {"name": name, "uid": str(uuid.uuid4()), "generation": 1, "creationTimestamp": now_text()}
            if namespace:
                meta["namespace"] = namespace
            return self._put("create", "ADDED", key, body | {"metadata": meta}, dry=dry)

    def update(self, key: Key, body: Body, *, dry: bool = False) -> Body:
        """Replace an object. 409 if the body has another resourceVersion or uid. An equal body writes nothing."""
        with self.changed:
            old = self.get(key)
            _expect(key, old, body.get("metadata") or {})
            meta = dict(body.get("metadata") or {})
            for kept in ("name", "namespace", "uid", "creationTimestamp", "generation", "deletionTimestamp"):
                meta.pop(kept, None)
                if kept in old["metadata"]:
                    meta[kept] = old["metadata"][kept]
            meta["resourceVersion"] = old["metadata"]["resourceVersion"]
            new = body | {"metadata": meta}
            if new == old:
                return old
            if new.get("spec") != old.get("spec"):
                meta["generation"] = old["metadata"].get("generation", 1) + 1
            if "deletionTimestamp" in meta and not meta.get("finalizers"):
                return self._remove(key, new)
            return self._put("update", "MODIFIED", key, new, dry=dry)

    def delete(self, key: Key, expected: Body, *, dry: bool = False) -> Body:
        """Remove an object; with finalizers, only mark it. `expected`: the uid and resourceVersion that the object must
        have."""
        with self.changed:
            old = self.get(key)
            _expect(key, old, expected)
            if dry:
                return old
            if old["metadata"].get("finalizers"):
                meta = {"deletionTimestamp": now_text()} | old["metadata"]
                return self._put("delete", "MODIFIED", key, old | {"metadata": meta})
            return self._remove(key, old)

    def mark(self, key: Key, metadata: Body) -> Body:
        """Add to the metadata of an object, as only the server itself does it."""
        with self.changed:
            old = self.get(key)
            return self._put("delete", "MODIFIED", key, old | {"metadata": old["metadata"] | metadata})

    def expect(self, key: Key, expected: Body) -> None:
        """409 if the object has another resourceVersion or uid."""
        _expect(key, self.get(key), expected)

    def since(self, version: int, resource: str, namespace: str, match: Predicate) -> Iterator[Event]:
        """Events after a version. 410 if the history does not reach back to it."""
        with self.changed:
            if version < self._forgotten:
                raise RefusalError(410, "Expired", f"too old resource version: {version} ({self._forgotten + 1})")
            recent: list[Event] = []
            for event in reversed(self._history):
                if event.version <= version:
                    break
                if event.key.resource == resource and namespace in ("", event.key.namespace) and match(event.body):
                    recent.append(event)
        yield from reversed(recent)

    def wait_past(self, version: int, timeout_s: float, stopped: Callable[[], bool]) -> int:
        """Wait for a write after this version. Returns the version now."""
        with self.changed:
            self.changed.wait_for(lambda: stopped() or self.version > version, timeout_s)
            return self.version

    def compact(self) -> None:
        """Forget the history, like etcd. Watches and lists from older versions then get 410."""
        with self.changed:
            self._history.clear()
            self._forgotten = self.version

    def snapshot(self) -> tuple[int, dict[Key, Body]]:
        """A backup of etcd."""
        with self.changed:
            return self.version, dict(self._objects)

    def restore(self, backup: tuple[int, dict[Key, Body]]) -> None:
        """Replace everything by a backup. Objects and the resource version go back, and no watch gets an event."""
        with self.changed:
            self.version, objects = backup
            self._objects = dict(objects)
            self.compact()

    def _put(self, verb: str, type_: str, key: Key, body: Body, *, dry: bool = False) -> Body:
        if dry:
            return body
        self.version += 1
        body = body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
        self._objects[key] = body
        self._note(verb, type_, key, body)
        return body

    def _remove(self, key: Key, body: Body) -> Body:
        del self._objects[key]
        self.version += 1
        body = body | {"metadata": body["metadata"] | {"resourceVersion": str(self.version)}}
        self._note("delete", "DELETED", key, body)
        return body

    def _note(self, verb: str, type_: str, key: Key, body: Body) -> None:
        if len(self._history) == _HISTORY:
            self._forgotten = self._history[0].version
        self._history.append(Event(self.version, type_, key, body))
        self.writes[f"{verb} {key.resource}"] += 1
        self.changed.notify_all()

    def _free_name(self, resource: str, namespace: str, base: str) -> str:
        if not base:
            raise RefusalError(422, "Invalid", "metadata.name: Required value: name or generateName is required")
        while True:
            name = base[:_LONGEST_BASE] + "".join(random.choices(_ALPHABET, k=5))
            if Key(resource, namespace, name) not in self._objects:
                return name


def _expect(key: Key, old: Body, expected: Body) -> None:
    for field in ("uid", "resourceVersion"):
        wanted = expected.get(field)
        if wanted and wanted != old["metadata"][field]:
            raise RefusalError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {key.resource} "{key.name}": {field} is '
                f"{old['metadata'][field]}, not {wanted}; the object has been modified",
            )


def copied(body: Body) -> Body:
    """A copy of the body through JSON, so that the caller may change the original."""
    result: Body = json.loads(json.dumps(body))
    return result
