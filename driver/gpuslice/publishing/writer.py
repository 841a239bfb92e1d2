"""One look of the writer: compare the wanted pools with the slices in the API, and write the difference."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

from gpuslice.core.json import Body
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.pools.reconcile import Change, Create, Delete, Owner, Update
from gpuslice.core.pools.sendable import SendablePools
from gpuslice.errors import ApiError, NotFoundError
from gpuslice.kube import Kube
from gpuslice.publishing.status import StatusReporter
from gpuslice.publishing.write_state import WriteState

log = logging.getLogger(__name__)

_WRITERS = 4  # parallel pools; more cost more in TLS handshakes than they save (measured, 8 pools on 2 cores)


class _Hazard(Exception):  # noqa: N818 - not an error of ours
    """The server dropped counters. The rest of the pool must not follow: the scheduler would allocate its devices twice."""


class SliceWriter:
    """For one thread. It writes the pools of one look in several threads."""

    def __init__(self, kube: Kube, driver: str, node: str, state: WriteState, reporter: StatusReporter) -> None:
        self._kube, self._driver, self._node = kube, driver, node
        self._state, self._reporter = state, reporter
        self._sendable = SendablePools()
        self._lock = threading.Lock()  # guards `_sendable`

    def sync(self, wanted: tuple[PoolSlices, ...]) -> None:
        """Compare, write, report. If a write failed, it raises the first ApiError."""
        with self._lock:
            self._sendable.want(wanted)
            pools, faults = self._sendable.pools(), self._sendable.faults()
        self._reporter.report(rejected=faults)
        owner = self._state.owner() or Owner(self._driver, self._node, self._kube.node_uid(self._node))
        existing = self._state.start_writing(owner)
        try:
            with self._lock:
                writable = [body for body in existing if self._sendable.writable(body["spec"]["pool"]["name"])]
            changes = reconcile.changes(pools, writable, owner)
            errors = self._write(changes)
        except BaseException:
            self._state.abort_writing()
            raise
        if not errors:  # before the end, so that whoever finds the pools published finds no old error
            self._reporter.report(error="")
        self._state.end_writing(wanted, wrote=bool(changes), complete=not errors)
        if errors:
            raise errors[0]
        if changes:
            log.info("published the ResourceSlices of this node pools=%d writes=%d", len(pools), len(changes))

    def forget_dropped(self) -> None:
        """Any thread may call it."""
        with self._lock:
            self._sendable.forget_dropped()

    def _write(self, changes: Sequence[Change]) -> list[ApiError]:
        pools = [list(group) for _, group in groupby(changes, key=lambda change: change.pool)]
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
                self._delete(body)
            case Update(body=body):
                try:
                    returned = self._kube.update_resource_slice(body)
                except NotFoundError:
                    self._state.take_removed(body)
                    raise
                self._take_answer(change, returned)
            case Create(body=body):
                self._take_answer(change, self._kube.create_resource_slice(body))

    def _delete(self, body: Body) -> None:
        meta = body["metadata"]
        try:
            self._kube.delete_resource_slice(meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"])
        except NotFoundError:
            pass
        self._state.take_removed(body)

    def _take_answer(self, change: Update | Create, returned: Body) -> None:
        """Take over the server's answer to a write. Dropped fields are reported and not sent again."""
        self._state.take_written(reconcile.sharing(change.body["spec"], returned))
        with self._lock:
            lost = self._sendable.learn(change, returned)
        if lost:
            log.warning(
                "the API server dropped fields, so its features are off pool=%s features=%s", change.pool, sorted(lost)
            )
            self._reporter.report(dropped=lost)
        if reconcile.PARTITIONABLE in lost:
            raise _Hazard
