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
from gpuslice.core.record import Record
from gpuslice.demo.cast import Cast
from gpuslice.demo.screen import WIDTH, CardRow, map_lines, say
from gpuslice.mps.client import MpsClient
from gpuslice.node import Node
from gpuslice.nvml.sim import spec
from gpuslice.standin import scheduler
from gpuslice.standin.cluster import DRIVER, NODE, DriverProcess, StandInCluster, UnschedulableError
from gpuslice.standin.scheduler import Request

_T = TypeVar("_T")
_HOW_TO_READ = (
    "The map of the cards: one column for each memory slice of a card, below its number. [ . ] is free; a name is what "
    "occupies these slices."
)
_HOW_TO_READ_WITHOUT_MIG = "The map of the cards: [ . ] is free; a name is what occupies the card."
_FEW = 3  # the most devices of one claim that are shown one by one


class BrokenPromiseError(Exception):
    """The demo saw a state that must never exist. The text names the state."""


class Stage:
    """The cluster, and the claims that hold devices at this point of the story."""

    def __init__(self, cluster: StandInCluster) -> None:
        self.cluster = cluster
        self.cast = Cast.of(spec.parse(cluster.simulate))
        self.held: dict[str, ClaimRef] = {}
        self.calls: list[asyncio.Task[Any]] = []  # calls of the kubelet that a kill has cut off
        self._map_known = False

    @property
    def mps(self) -> MpsClient:
        """The MPS daemons, read like the driver reads them."""
        return MpsClient(self.cluster.mps)

    @property
    def driver(self) -> DriverProcess:
        return self.cluster.drivers[-1]

    def log(self) -> str:
        """The end of the newest driver's log."""
        return "\n".join(self.driver.log.read_text(encoding="utf-8").splitlines()[-20:]) if self.cluster.drivers else ""

    def devices(self) -> dict[tuple[str, str], Mapping[str, Any]]:
        """The published devices of the node, by pool and device name."""
        specs = [body["spec"] for body in self.cluster.api.all("resourceslices")]
        return {(spec["pool"]["name"], d["name"]): d for spec in specs for d in spec.get("devices", [])}

    # ------------------------------------------------------------ what users do

    def claim(self, name: str, words: str, *requests: Request) -> ClaimRef | None:
        """Create a claim and let the scheduler choose. None if its pod stays Pending."""
        say(f"claim {name}: {words}")
        try:
            ref = self.cluster.claim(name, *requests)
        except UnschedulableError:
            say("the scheduler: no device fits, so the pod stays Pending", 4)
            return None
        return ref

    def fits(self, *requests: Request) -> bool:
        """Whether the scheduler would find devices for a claim now."""
        slices, claims = self.cluster.api.all("resourceslices"), self.cluster.api.all("resourceclaims")
        return scheduler.allocate(slices, claims, requests, node=NODE) is not None

    async def use(self, ref: ClaimRef) -> None:
        """Prepare a claim as the kubelet does for its pod, and show what the pod gets."""
        begin = time.monotonic()
        await self.cluster.run(ref)
        took_ms = (time.monotonic() - begin) * 1000
        self.held[ref.name] = ref
        got = self.got(self.look(lambda node: node.records[ref.uid]))
        for what, uuid in got[:_FEW]:
            say(f"{ref.name} has {what}", 4)
            say(f"{uuid}, ready after {took_ms:.0f} ms", 6)
        if len(got) > _FEW:
            say(f"and {len(got) - _FEW} more", 4)

    def got(self, record: Record) -> list[tuple[str, str]]:
        """Each device of a claim: its name with the claim's part of it, and its UUID."""
        published = self.devices()
        found: list[tuple[str, str]] = []
        for device, grant in zip(record.prepared.devices if record.prepared else (), record.plan.grants, strict=True):
            whole = published[device.device.pool, device.device.device]["capacity"]["memory"]["value"]
            what = share.describe(grant) or (whole if whole != "0" else "to look at the card")
            found.append((f"{device.device}, {what}", device.uuid))
        return found

    async def take(self, name: str, words: str, *requests: Request) -> bool:
        """Make a claim. Returns whether the scheduler found a device."""
        ref = self.claim(name, words, *requests)
        if ref is not None:
            await self.use(ref)
        return ref is not None

    async def release(self, *names: str) -> None:
        for name in names:
            if ref := self.held.pop(name, None):
                await self.cluster.end(ref)
                say(f"claim {name} is released")

    async def release_all(self) -> None:
        await self.release(*list(self.held))

    # ------------------------------------------------------------ looks at the node

    def look(self, what: Callable[[Node], _T]) -> _T:
        """Look at the node beside the driver, like `gpuslice devices`."""
        config = Config(kubelet_plugins_directory_path=self.cluster.plugins, simulate_latency="zero")
        with node.snapshot(config) as seen:
            return what(seen)

    def show_map(self) -> None:
        """Show what occupies the memory slices of each card. The first map explains how to read it."""
        if not self._map_known:
            say(_HOW_TO_READ if self.cast.cut is not None or self.cast.stuck else _HOW_TO_READ_WITHOUT_MIG)
            self._map_known = True
        print("\n".join(map_lines(self.look(card_rows))))

    def must(self, so: bool, what: str) -> None:
        if not so:
            raise BrokenPromiseError(
                f"the demo found a state that must never happen: {what}; please report it with the log above"
            )
        say(f"checked: {what}")


def card_rows(node: Node) -> list[CardRow]:
    """Each card of the node with what occupies it."""
    rows = []
    records = tuple(node.records.values())
    for pool in node.inventory.pools:
        grants = [grant for record in records for grant in record.plan.grants if grant.gpu == pool.gpu.uuid]
        lines = report.memory_map(pool, node.live.get(pool.gpu.uuid), grants, records, WIDTH)
        rows.append(CardRow(pool.gpu.index, tuple(lines)))
    return rows


# ---------------------------------------------------------------- requests


def a_partition(name: str = "gpu", **where: str | int) -> Request:
    return Request(name=name, driver=DRIVER, where={"type": "mig", **where})


def a_card(name: str = "gpu") -> Request:
    return Request(name=name, driver=DRIVER, where={"type": "gpu"})


def cards(count: int) -> Request:
    return Request(name="gpu", driver=DRIVER, where={"type": "gpu"}, count=count)


def these_cards(*indices: int) -> tuple[Request, ...]:
    """Whole cards by their index, one request each."""
    return tuple(Request(name=f"gpu-{at}", driver=DRIVER, where={"type": "gpu", "index": at}) for at in indices)


def a_share(manner: str, name: str = "gpu", **capacity: str) -> Request:
    """A share of a whole card by MPS or time-slicing. `capacity`: the claim's request; defaults decide the rest."""
    return Request(name=name, driver=DRIVER, where={"type": manner, "profile": ""}, capacity=capacity)
