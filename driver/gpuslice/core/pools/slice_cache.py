"""The ResourceSlices of this driver in the API, as known from the events of the watch and from its own writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpuslice.core.json import Body


@dataclass(frozen=True, slots=True)
class Unseen:
    """A change of ours: its number, and the resource version that shows it. No version shows a deletion."""

    number: int
    version: float


class SliceCache:
    """The state of our slices in the API. Our own writes count at once, before the watch shows them.

    Otherwise a late watch makes the writer create everything twice (the DRA contract, statement 60). The cache
    compares resource versions as numbers. Kubernetes promises this order since KEP-5504, and always kept it. But versions
    go back when an etcd is restored. So only a change after the request for a list can outweigh the list. Not
    thread-safe: the owner locks.
    """

    def __init__(self) -> None:
        self._bodies: dict[str, Body] = {}
        self._changes = 0
        self._changed: dict[str, int] = {}  # name → number of its last change
        self._deleted: dict[str, int] = {}  # UID → number of its deletion; late news must not restore it
        self._unexplained: dict[str, int] = {}  # UID → version that we did not write, as far as we know now
        self._unseen: dict[str, Unseen] = {}  # UID → our last change of the slice, if no event has shown it yet

    def bodies(self) -> list[Body]:
        return list(self._bodies.values())

    def unseen(self) -> frozenset[Unseen]:
        """Our own changes that neither the watch nor a list has shown yet. A watch that begins now will show them."""
        return frozenset(self._unseen.values())

    def began(self) -> int:
        """The number of changes, for `replace`. Take it before the request for a list."""
        return self._changes

    def replace(self, bodies: Sequence[Body], began: int) -> None:
        """Take over a list, except for slices that changed after the request for it."""
        self._deleted = {uid: at for uid, at in self._deleted.items() if at > began}
        self._changed = {name: at for name, at in self._changed.items() if at > began}
        self._unseen = {uid: change for uid, change in self._unseen.items() if change.number > began}
        alive = {b["metadata"]["name"]: b for b in bodies if b["metadata"]["uid"] not in self._deleted}
        newer = {name: self._bodies[name] for name in self._changed if name in self._bodies}
        stays = {name: body for name, body in newer.items() if _version(body) > _version(alive.get(name))}
        self._bodies = alive | stays

    def observe(self, kind: str, body: Body) -> None:
        """Take over an event of the watch: ADDED, MODIFIED or DELETED."""
        name, uid = body["metadata"]["name"], body["metadata"]["uid"]
        known = self._bodies.get(name)
        if (change := self._unseen.get(uid)) and (kind == "DELETED" or _version(body) >= change.version):
            del self._unseen[uid]
        if uid in self._deleted or _version(known) >= _version(body):
            return
        self._unexplained[uid] = _version(body)
        if kind != "DELETED":
            self._put(body)
            return
        self._deleted[uid] = self._change(name)
        if known is not None and known["metadata"]["uid"] == uid:
            del self._bodies[name]

    def mutate(self, body: Body) -> None:
        """Take over the answer to a create or an update of the driver."""
        uid, known = body["metadata"]["uid"], self._bodies.get(body["metadata"]["name"])
        if shown := self._unexplained.get(uid) == _version(body):
            del self._unexplained[uid]
        elif uid in self._unexplained or uid in self._deleted:
            return  # the watch has a newer state: another writer has already changed or deleted the slice
        number = self._put(body)
        if not shown and _version(known) != _version(body):  # no event shows a write that changed nothing
            self._unseen[uid] = Unseen(number, _version(body))

    def remove(self, body: Body) -> None:
        """Remove a slice that the driver deleted or that no longer exists."""
        uid, number = body["metadata"]["uid"], self._change(body["metadata"]["name"])
        if uid not in self._deleted:
            self._unseen[uid] = Unseen(number, math.inf)
        self._deleted[uid] = number
        self._unexplained.pop(uid, None)
        self._bodies.pop(body["metadata"]["name"], None)

    def foreign(self) -> bool:
        """Whether another writer changed something since the last call.

        Call it only while no write is in progress: the watch may show our own write before its answer arrives.
        """
        found, self._unexplained = bool(self._unexplained), {}
        return found

    def _put(self, body: Body) -> int:
        self._bodies[body["metadata"]["name"]] = body
        return self._change(body["metadata"]["name"])

    def _change(self, name: str) -> int:
        self._changes += 1
        self._changed[name] = self._changes
        return self._changes


def _version(body: Body | None) -> int:
    return -1 if body is None else int(body["metadata"]["resourceVersion"])
