"""Which ResourceClaims hold devices of which pools, as the API server shows them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from gpuslice.core import claims
from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.model import ClaimRef, ClaimUid, PoolName
from gpuslice.core.pools.shape import TAINT, pools_of


@dataclass(frozen=True, slots=True)
class Holders:
    """What one list of all claims shows."""

    by_pool: Mapping[PoolName, tuple[ClaimRef, ...]]  # an entry for each pool in the question
    tolerant: bool  # a claim tolerates our taint, so a pool that waits may get new holders


def find(bodies: Iterable[ReadOnlyBody], driver: str, pools: Set[PoolName]) -> Holders:
    """The claims that hold a device of one of these pools. Reads the bodies once and keeps none."""
    found: dict[PoolName, list[ClaimRef]] = {name: [] for name in pools}
    tolerant = False
    for body in bodies:
        tolerant = tolerant or _tolerates(body, driver)
        for name in set(pools_of([body], driver)) & found.keys():
            meta = body["metadata"]
            found[name].append(ClaimRef(str(meta.get("namespace", "")), meta["name"], ClaimUid(meta["uid"])))
    return Holders({name: tuple(refs) for name, refs in found.items()}, tolerant)


def holds(body: ReadOnlyBody, ref: ClaimRef, pool: PoolName, driver: str) -> bool:
    """Whether the body is the claim `ref`, by its UID, and still has a device of the pool."""
    return body["metadata"]["uid"] == ref.uid and pool in pools_of([body], driver)


def _tolerates(body: ReadOnlyBody, driver: str) -> bool:
    """Whether a request of the claim tolerates our taint.

    A request for other devices counts too, because only the scheduler knows which devices a request gets.
    """
    spec = body.get("spec")
    devices = spec.get("devices") if isinstance(spec, Mapping) else None
    for request in claims.mappings(devices, "requests"):
        for part in (request.get("exactly"), *claims.mappings(request, "firstAvailable")):
            if any(_is_for(one, f"{driver}/{TAINT}") for one in claims.mappings(part, "tolerations")):
                return True
    return False


def _is_for(toleration: Mapping[str, Any], key: str) -> bool:
    """Whether the toleration names this key or every key. Its value and effect do not count, which errs on the safe side."""
    return toleration.get("key") in (key, "", None)
