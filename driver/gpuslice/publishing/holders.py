"""Asks the API server which claims hold the pools that wait for a change of their shape.

Claims have no field selector for their devices, so only a list of all claims of the cluster shows the holders of a pool
that the driver has no record of: claims that were allocated and not prepared yet. In a large cluster this list is tens of
megabytes, and a fleet with a new policy asks for it from each node. So a pool is listed once in a wait, when its own
records are gone and its taints are in force. Tainted devices get no new holders. From then on the driver asks for the
known holders, one after the other, by name.

There are two exceptions. Without taints (Kubernetes 1.34 and 1.35) and where a claim tolerates our taint, a pool may get new
holders. There one more list decides when all known holders have left. So the lists are as many as the waves of holders,
however long the wait is.
"""

from __future__ import annotations

import logging
from collections.abc import Set

from gpuslice.core.model import ClaimRef, PoolName
from gpuslice.core.pools import holders
from gpuslice.errors import NotFoundError
from gpuslice.kube import Kube

log = logging.getLogger(__name__)


class ClaimHolders:
    """The claims that hold the waiting pools, as far as they are known. For one thread."""

    def __init__(self, kube: Kube, driver: str) -> None:
        self._kube, self._driver = kube, driver
        self._known: dict[PoolName, list[ClaimRef]] = {}
        self._final: set[PoolName] = set()  # pools that get no new holders

    def keep(self, waiting: Set[PoolName]) -> None:
        """Forget the holders of all pools but these, because the other pools do not wait any more."""
        self._known = {name: refs for name, refs in self._known.items() if name in waiting}
        self._final &= waiting

    def held(self, pools: Set[PoolName], *, cordoned: Set[PoolName]) -> set[PoolName]:
        """Those of the pools of which a claim holds a device. ApiError if the API server does not say it.

        `cordoned`: all pools with taints in force. One list serves them all, also those that are not asked for yet.
        """
        if pools <= self._known.keys():
            still = {name for name in pools if self._is_held(name)}
            if pools - still <= self._final & cordoned:
                return still
        elif not pools:
            return set()
        self._list(pools | cordoned, cordoned)
        return {name for name in pools if self._known[name]}

    def _list(self, pools: Set[PoolName], cordoned: Set[PoolName]) -> None:
        found = holders.find(self._kube.claims(), self._driver, pools)
        self._known |= {name: list(refs) for name, refs in found.by_pool.items()}
        self._final = set() if found.tolerant else set(cordoned)
        for name, refs in found.by_pool.items():
            if refs:
                log.info("claims hold a pool that waits to change its shape pool=%s claims=%s", name, _few(refs))

    def _is_held(self, pool: PoolName) -> bool:
        """Whether one of the known claims still holds a device. Those that have left are not asked for again."""
        known = self._known[pool]
        while known and not self._holds(known[0], pool):
            known.pop(0)
        return bool(known)

    def _holds(self, ref: ClaimRef, pool: PoolName) -> bool:
        try:
            return holders.holds(self._kube.claim(ref.namespace, ref.name), ref, pool, self._driver)
        except NotFoundError:
            return False


def _few(refs: tuple[ClaimRef, ...]) -> str:
    return ", ".join(map(str, refs[:3])) + (f" and {len(refs) - 3} more" if len(refs) > 3 else "")
