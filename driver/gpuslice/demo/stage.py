"""The demo's stage: a cluster, the claims that hold devices at this point of the story, and ways to act and to look."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from gpuslice import node, report
from gpuslice.config import Config
from gpuslice.core import share
from gpuslice.core.model import ClaimRef
from gpuslice.mps.client import MpsClient
from gpuslice.node import Node
from gpuslice.standin.cluster import DRIVER, DriverProcess, StandInCluster, UnschedulableError
from gpuslice.standin.scheduler import Request

_T = TypeVar("_T")


class BrokenPromiseError(Exception):
    """The demo saw something that must never happen; the text names it."""


class Stage:
    """The cluster, and the claims that hold devices at this point of the story."""

    def __init__(self, cluster: StandInCluster) -> None:
        self.cluster = cluster
        self.held: dict[str, ClaimRef] = {}
        self.calls: list[asyncio.Task[Any]] = []  # of the kubelet, cut off by a kill

    @property
    def mps(self) -> MpsClient:
        """The MPS daemons, as the driver asks for them."""
        return MpsClient(self.cluster.mps)

    @property
    def driver(self) -> DriverProcess:
        return self.cluster.drivers[-1]

    def log(self) -> str:
        """The end of the newest driver's log."""
        return "\n".join(self.driver.log.read_text(encoding="utf-8").splitlines()[-20:]) if self.cluster.drivers else ""

    def devices(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """What the node publishes, by pool and device name."""
        specs = [body["spec"] for body in self.cluster.api.all("resourceslices")]
        return {(spec["pool"]["name"], d["name"]): d for spec in specs for d in spec.get("devices", [])}

    # ------------------------------------------------------------ what users do

    def claim(self, name: str, words: str, *requests: Request) -> ClaimRef | None:
        """Create a claim and let the scheduler choose; None where its pod stays Pending."""
        print(f"  claim {name}: {words}")
        try:
            ref = self.cluster.claim(name, *requests)
        except UnschedulableError:
            print("    the scheduler: no device fits, so the pod stays Pending")
            return None
        return ref

    async def use(self, ref: ClaimRef) -> None:
        """Prepare a claim as the kubelet does for its pod, and show what the pod gets."""
        begin = time.monotonic()
        await self.cluster.run(ref)
        took_ms = (time.monotonic() - begin) * 1000
        self.held[ref.name] = ref
        record = self.look(lambda node: node.records[ref.uid])
        published = self.devices()
        for device, grant in zip(record.prepared.devices if record.prepared else (), record.plan.grants, strict=True):
            whole = published[device.device.pool, device.device.device]["capacity"]["memory"]["value"]
            what = share.describe(grant) or whole
            print(f"    {ref.name} has {device.device}, {what}, {device.uuid}, ready after {took_ms:.0f} ms")

    async def take(self, name: str, words: str, *requests: Request) -> bool:
        """Whether the scheduler found a device for it."""
        ref = self.claim(name, words, *requests)
        if ref is not None:
            await self.use(ref)
        return ref is not None

    async def release(self, name: str) -> None:
        if ref := self.held.pop(name, None):
            await self.cluster.end(ref)
            print(f"  claim {name} is released")

    # ------------------------------------------------------------ what there is to see

    def look(self, what: Callable[[Node], _T]) -> _T:
        """A look at the node beside the driver, as `gpuslice devices` takes it."""
        config = Config(kubelet_plugins_directory_path=self.cluster.plugins, simulate_latency="zero")
        with node.snapshot(config) as seen:
            return what(seen)

    def show_map(self) -> None:
        """What occupies the memory slices of each card, with the claim that holds it."""
        for line in self.look(_map):
            print(f"  {line}")

    def must(self, so: bool, what: str) -> None:
        if not so:
            raise BrokenPromiseError(
                f"the demo found a state that must never happen: {what}; please report it with the log above"
            )
        print(f"  checked: {what}")


def _map(node: Node) -> list[str]:
    lines = []
    records = tuple(node.records.values())
    for pool in node.inventory.pools:
        grants = [grant for record in records for grant in record.plan.grants if grant.gpu == pool.gpu.uuid]
        *ruler, cells = report.memory_map(pool, node.live.get(pool.gpu.uuid), grants, records)
        lines += [f"GPU {pool.gpu.index}".ljust(10) + "".join(ruler)[10:], cells]
    return lines


# ---------------------------------------------------------------- what is asked for


def a_partition(name: str = "gpu", **where: str | int) -> Request:
    return Request(name=name, driver=DRIVER, where={"type": "mig", **where})


def a_card(name: str = "gpu") -> Request:
    return Request(name=name, driver=DRIVER, where={"type": "gpu"})


def a_share(manner: str, name: str = "gpu", **capacity: str) -> Request:
    """A share of a whole card by MPS or time-slicing; `capacity`: what the claim asks for; defaults decide the rest."""
    return Request(name=name, driver=DRIVER, where={"type": manner, "profile": ""}, capacity=capacity)
