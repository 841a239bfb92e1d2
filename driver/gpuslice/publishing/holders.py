"""Asks the API server which claims hold the pools that wait for a change of their shape.

The driver has no record of a claim that is allocated and not prepared yet. Claims have no field selector for their devices,
so only a list of all claims of the cluster shows such a holder. In a large cluster this list has tens of megabytes, and
after a change of the policy each node of a fleet asks for it. So the driver lists only once in a wait: when no record holds
the pool any more and its taints are in force. Tainted devices get no new holders. From then on the driver asks for the known
holders by name, one after the other.

There are two exceptions: Kubernetes 1.34 and 1.35 have no taints, and a claim may tolerate our taint. Then a pool may get new
holders, so the driver lists again when all known holders have left. The number of lists is then the number of waves of
holders, however long the wait is.

The first claim that tolerates the taint may come after the list. If its pod is not prepared when the last known holder leaves,
the driver does not see this claim. Its prepare is then refused with the advice to delete the pod.
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
    """The known claims that hold the waiting pools. For one thread."""

    def __init__(self, kube: Kube, driver: str) -> None:
        self._kube, self._driver = kube, driver
        self._known: dict[PoolName, list[ClaimRef]] = {}
        self._final: set[PoolName] = set()  # pools that get no new holders

    def keep(self, waiting: Set[PoolName]) -> None:
        """Forget the holders of all other pools, because these do not wait any more."""
        self._known = {name: refs for name, refs in self._known.items() if name in waiting}
        self._final &= waiting

    def held(self, pools: Set[PoolName], *, cordoned: Set[PoolName]) -> set[PoolName]:
        """Those of the pools of which a claim holds a device. ApiError if the API server gives no answer.

        `cordoned`: all pools with taints in force. One list serves them all, also those that are not in `pools` yet.
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
        """Whether one of the known claims still holds a device. Forgets the claims that have left."""
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
