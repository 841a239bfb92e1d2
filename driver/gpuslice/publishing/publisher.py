"""Make the API's ResourceSlices those that are wanted, and keep them so when others delete or change them.

Two threads. The *watcher* lists and watches our slices into a `SliceCache`; the *writer* compares the cache with what is
wanted (`core.reconcile`) and writes the difference. Nothing here ever fails for good: what the API server refuses or
does not answer is tried again, more and more rarely, and prepare and unprepare do not notice.

Others write, too. The kubelet deletes all slices of its node when it starts, in the background, so perhaps after we
have published again: each foreign change is answered, after a moment of quiet, and every answer that meets another
foreign change within a minute doubles that moment. This also keeps two instances of different versions from writing
against each other for ever.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from gpuslice.core.json import Body
from gpuslice.core.model import PoolName
from gpuslice.core.pools import reconcile, validation
from gpuslice.core.pools.backoff import CALM_S, DEFAULT_BACKOFF, Backoff, BackoffConfig, Debounce
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Change, Create, Delete, Owner, Update
from gpuslice.core.pools.slice_cache import SliceCache
from gpuslice.errors import ApiError, ConflictError, ExpiredError, NotFoundError
from gpuslice.kube import Kube, Watch

log = logging.getLogger(__name__)

_WRITERS = 4  # pools written at once; more cost more in TLS handshakes than they save (measured, 8 pools on 2 cores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How publishing stands: for readiness, metrics and logs."""

    error: str = ""  # why the API does not show what is wanted; it is tried again
    rejected: tuple[str, ...] = ()  # pools with faults of our own making: not sent, not tried again until they change
    dropped: frozenset[str] = frozenset()  # gates the API server turned out not to have: plan again without them


class _Hazard(Exception):  # noqa: N818 - not an error of ours
    """The server dropped counters: the rest of the pool must not follow, because it would be given out twice."""


class Publisher:
    """Keeps a driver's ResourceSlices on a node as `publish` last wanted them.

    `published` is set while the API shows exactly that. `changed` is called with each new `Status`, from a thread of
    the publisher; it must not block. Nothing is written before the first `publish`.
    """

    def __init__(
        self,
        kube: Kube,
        driver: str,
        node: str,
        *,
        backoff: BackoffConfig = DEFAULT_BACKOFF,
        changed: Callable[[Status], None] = lambda _: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube, self._driver, self._node = kube, driver, node
        self._backoff, self._changed, self._now = backoff, changed, now
        self.published = threading.Event()
        self.status = Status()
        self._state = threading.Condition()  # guards all below
        self._stopped = threading.Event()
        self._cache = SliceCache()
        self._listed = False
        self._watch: Watch | None = None
        self._wanted: tuple[PoolSlices, ...] | None = None
        self._owner: Owner | None = None
        self._due: float | None = None  # when the writer is to look
        self._writing = False
        self._stale = False
        self._debounce = Debounce(backoff)
        self._adopted: dict[tuple[str, int], tuple[Body, Body]] = {}  # sent → what the server made of it
        self._given_up: dict[str, PoolSlices] = {}
        self._checked: tuple[PoolSlices, ...] = ()
        self._faults: dict[PoolName, tuple[str, ...]] = {}
        self._threads: list[threading.Thread] = []

    # ------------------------------------------------------------ for the caller

    @property
    def last_error(self) -> str:
        return self.status.error

    def start(self) -> None:
        for job in (self._keep_watching, self._keep_writing):
            thread = threading.Thread(target=job, name=f"publisher-{job.__name__.rpartition('_')[2]}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """End both threads; what is published stays, because a restart must not cost the node its devices."""
        with self._state:
            self._stopped.set()
            watch = self._watch
            self._state.notify_all()
        if watch is not None:
            watch.close()
        for thread in self._threads:
            thread.join(2.0)  # it may be in a call that hangs; it is a daemon and holds nothing

    def publish(self, desired: Sequence[PoolSlices]) -> None:
        """Want exactly these pools from now on; returns at once."""
        with self._state:
            if self._wanted == tuple(desired):
                return
            self._wanted = tuple(desired)
            self.published.clear()
            self._wake(0.0)

    def _wake(self, delay_s: float) -> None:
        due = self._now() + delay_s
        self._due = due if self._due is None else min(self._due, due)
        self._state.notify_all()

    # ------------------------------------------------------------ the watcher

    def _keep_watching(self) -> None:
        retry = Backoff(self._backoff)
        while not self._stopped.is_set():
            began = self._now()
            try:
                self._follow(self._list())
            except ExpiredError:
                pass
            except ApiError as e:
                self._tell(error=str(e))
            except Exception:  # a thread that died would be silence for ever
                log.exception("publishing: the watch failed unexpectedly; it starts again")
            if self._now() - began > CALM_S:
                retry = Backoff(self._backoff)
            if self._now() - began < self._backoff.relist_s:  # else it is time for a new list anyway
                self._stopped.wait(retry.delay_s(random.random()))  # noqa: S311 - not a secret

    def _list(self) -> str:
        bodies, version = self._kube.resource_slices(self._driver, self._node)
        with self._state:
            self._cache.replace(bodies, version)
            self._owner = None  # the Node may be another one of the same name by now
            self._listed = True
            self._wake(0.0)
        return version

    def _follow(self, version: str) -> None:
        """Watch until it is time to list again. ApiError: the watch broke. ExpiredError: it would reach too far back."""
        end = self._now() + self._backoff.relist_s
        while not self._stopped.is_set() and (left_s := end - self._now()) > 0:
            began = self._now()
            timeout_s = max(1, int(min(self._backoff.watch_s, left_s)))
            watch = self._kube.watch_resource_slices(self._driver, self._node, version, timeout_s)
            with self._state:
                self._watch = watch
                if self._stopped.is_set():
                    watch.close()
            for event in watch:
                version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    self._observe(event["type"], event["object"])
            if self._now() - began < timeout_s / 2 and not self._stopped.is_set():
                raise ApiError(f"the API server at {self._kube.server} broke a watch off; it will be tried again")

    def _observe(self, kind: str, body: Body) -> None:
        with self._state:
            self._cache.observe(kind, body)
            if kind == "DELETED":
                self._owner = None
            if not self._writing:
                self._answer_foreign()

    def _answer_foreign(self) -> None:
        if self._cache.foreign():
            self.published.clear()
            # Not `_wake`: each further change of a wipe puts the answer off.
            self._due = self._debounce.due(self._now())
            self._state.notify_all()

    # ------------------------------------------------------------ the writer

    def _keep_writing(self) -> None:
        retry = Backoff(self._backoff)
        while (wanted := self._next()) is not None:
            try:
                self._sync(wanted)
                retry = Backoff(self._backoff)
            except ApiError as e:
                self._stale = self._stale or isinstance(e, ConflictError)
                self._fail(str(e), retry)
            except Exception as e:
                log.exception("publishing: writing failed unexpectedly")
                self._fail(f"unexpected: {e!r}", retry)

    def _fail(self, error: str, retry: Backoff) -> None:
        self._tell(error=error)
        with self._state:
            self._wake(retry.delay_s(random.random()))  # noqa: S311 - not a secret

    def _next(self) -> tuple[PoolSlices, ...] | None:
        """Wait until there is something to look at; None when we are to stop."""
        with self._state:
            while not self._stopped.is_set():
                due = self._due if self._listed and self._wanted is not None else None
                if due is not None and due <= self._now():
                    self._due = None
                    return self._wanted
                self._state.wait(None if due is None else due - self._now())
        return None

    def _sync(self, wanted: tuple[PoolSlices, ...]) -> None:
        """One look: compare, write, tell. ApiError, the first, when something could not be written."""
        if self._stale:  # a conflict shows that the watch lags or is dead
            self._list()
            self._stale = False
        if self._checked != wanted:
            self._checked, self._faults = wanted, {pool.name: validation.problems(pool) for pool in wanted}
        faults = self._faults
        sound = [pool for pool in wanted if not faults[pool.name] and self._given_up.get(pool.name) != pool]
        self._tell(rejected=tuple(fault for found in faults.values() for fault in found))
        owner = self._owner or Owner(self._driver, self._node, self._kube.node_uid(self._node))
        with self._state:
            self._owner = owner
            existing = [b for b in self._cache.bodies() if self._may_touch(b, wanted, sound)]
            todo = reconcile.changes([self._as_adopted(pool) for pool in sound], existing, owner)
            self._writing = True
        try:
            errors = self._write(todo)
        finally:
            self._writing = False
        with self._state:
            self._debounce.record_answer(self._now(), wrote=bool(todo))
            self._answer_foreign()
            if not errors and self._due is None and self._wanted == wanted:
                self.published.set()
        if errors:
            raise errors[0]
        if todo:
            log.info("published pools=%d writes=%d", len(sound), len(todo))
        self._tell(error="")

    @staticmethod
    def _may_touch(body: Body, wanted: Sequence[PoolSlices], sound: Sequence[PoolSlices]) -> bool:
        """A pool that is wanted but not sound keeps what it has published."""
        name = body["spec"]["pool"]["name"]
        return name in {pool.name for pool in sound} or name not in {pool.name for pool in wanted}

    def _write(self, todo: Sequence[Change]) -> list[ApiError]:
        pools = [list(group) for _, group in groupby(todo, key=lambda change: change.pool)]
        if len(pools) < 2:
            return [error for pool in pools if (error := self._write_pool(pool))]
        with ThreadPoolExecutor(min(_WRITERS, len(pools)), "publisher-pool") as threads:
            return [error for error in threads.map(self._write_pool, pools) if error]

    def _write_pool(self, changes: Sequence[Change]) -> ApiError | None:
        try:
            for change in changes:
                self._write_one(change)
        except _Hazard:
            return None
        except ApiError as e:
            return e
        return None

    def _write_one(self, change: Change) -> None:
        match change:
            case Delete(body=body):
                meta = body["metadata"]
                try:
                    self._kube.delete_resource_slice(
                        meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"]
                    )
                except NotFoundError:
                    pass
                with self._state:
                    self._cache.remove(body)
            case Update(body=body):
                try:
                    returned = self._kube.update_resource_slice(body)
                except NotFoundError:
                    with self._state:
                        self._cache.remove(body)
                    raise
                self._took(change, returned)
            case Create(body=body):
                self._took(change, self._kube.create_resource_slice(body))

    def _took(self, change: Update | Create, returned: Body) -> None:
        """Take in what the server made of a write. Fields that it dropped are reported, and never sent again and again."""
        sent = change.body["spec"]
        lost = reconcile.dropped(sent, returned["spec"])
        with self._state:
            self._cache.mutate(reconcile.sharing(sent, returned))
        if not lost:
            return
        log.warning("the API server dropped fields of pool %s: features %s are off", change.pool, sorted(lost))
        with self._state:
            if reconcile.PARTITIONABLE in lost:
                self._given_up |= {pool.name: pool for pool in self._wanted or () if pool.name == change.pool}
            else:
                self._adopted[change.pool, change.index] = (sent, returned["spec"])
        self._tell(dropped=self.status.dropped | lost)
        if reconcile.PARTITIONABLE in lost:
            raise _Hazard

    def _as_adopted(self, pool: PoolSlices) -> PoolSlices:
        """The pool with every slice of which the server is known to drop something as the server has it."""
        specs = list(pool.specs)
        for index, spec in enumerate(specs):
            sent, returned = self._adopted.get((pool.name, index), (None, {}))
            if sent is not None and reconcile.same(sent, spec):
                specs[index] = returned
        return PoolSlices(pool.name, tuple(specs))

    def _tell(
        self, error: str | None = None, rejected: tuple[str, ...] | None = None, dropped: frozenset[str] | None = None
    ) -> None:
        """Change the given parts of the status; log and pass on what is new."""
        with self._state:
            old = self.status
            new = Status(
                error=old.error if error is None else error,
                rejected=old.rejected if rejected is None else rejected,
                dropped=old.dropped if dropped is None else dropped,
            )
            self.status = new
        if new == old:
            return
        if new.error and new.error != old.error:
            log.warning("publishing: %s", new.error)
        for fault in new.rejected:
            if fault not in old.rejected:
                log.error("not published: %s", fault)
        self._changed(new)
