"""The ResourceSlices of this driver in the API, as known from the events of the watch and from its own writes."""

from __future__ import annotations

from collections.abc import Sequence

from gpuslice.core.json import Body


class SliceCache:
    """The state of our slices in the API. Our own writes count at once, before the watch shows them.

    Otherwise a late watch makes the writer create everything twice (the DRA contract, statement 60). Resource versions
    are compared as numbers: Kubernetes promises this since KEP-5504, and it was always true. Not thread-safe: the owner
    locks.
    """

    def __init__(self) -> None:
        self._bodies: dict[str, Body] = {}
        self._deleted: set[str] = set()  # UIDs that must not come back with late events
        self._unexplained: dict[str, int] = {}  # UID → version that we did not write, as far as we know now

    def bodies(self) -> list[Body]:
        return list(self._bodies.values())

    def replace(self, bodies: Sequence[Body], version: str) -> None:
        """Take over a list, except for slices that the driver wrote after the server created the list."""
        alive = {b["metadata"]["name"]: b for b in bodies if b["metadata"]["uid"] not in self._deleted}
        newer = {name: body for name, body in self._bodies.items() if _version(body) > int(version)}
        self._bodies = alive | newer
        self._deleted &= {b["metadata"]["uid"] for b in bodies}

    def observe(self, kind: str, body: Body) -> None:
        """Take over an event of the watch: ADDED, MODIFIED or DELETED."""
        name, uid = body["metadata"]["name"], body["metadata"]["uid"]
        known = self._bodies.get(name)
        if uid in self._deleted or (known is not None and _version(known) >= _version(body)):
            return
        self._unexplained[uid] = _version(body)
        if kind != "DELETED":
            self._bodies[name] = body
        elif known is not None and known["metadata"]["uid"] == uid:
            del self._bodies[name]

    def mutate(self, body: Body) -> None:
        """Take over the answer to a create or an update of the driver."""
        name, uid = body["metadata"]["name"], body["metadata"]["uid"]
        if self._unexplained.get(uid) == _version(body):
            del self._unexplained[uid]
        elif uid in self._unexplained or uid in self._deleted:
            return  # the watch has a newer state: another writer has already changed or deleted the slice
        self._bodies[name] = body

    def remove(self, body: Body) -> None:
        """Remove a slice that the driver deleted or that no longer exists."""
        self._deleted.add(body["metadata"]["uid"])
        self._unexplained.pop(body["metadata"]["uid"], None)
        self._bodies.pop(body["metadata"]["name"], None)

    def foreign(self) -> bool:
        """Whether another writer changed something since the last call.

        Call it only while no write is in progress: the watch may show our own write before its answer arrives.
        """
        found, self._unexplained = bool(self._unexplained), {}
        return found


def _version(body: Body) -> int:
    return int(body["metadata"]["resourceVersion"])
