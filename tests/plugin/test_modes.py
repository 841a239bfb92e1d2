"""Claims of all modes in random order on every product: what is granted is fulfilled, and at the end nothing is left."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpuslice.core import claims, health
from gpuslice.core.json import Body, ReadOnlyBody
from gpuslice.core.model import Claim, ClaimRef, ClaimUid
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools.pool import Features, resource_slices
from gpuslice.nvml.sim import models
from gpuslice.standin import scheduler
from gpuslice.standin.scheduler import Request

from tests.kit.rig import NODE, Rig
from tests.plugin.test_mps_shares import a_supervisor

DRIVER = "gpuslice.dev"
ALL = Features(partitionable=True, consumable=True, taints=True)
STEPS = 24
TWINS: Mapping[str, object] = {"sharedPartitions": ["mps", "timeslice"]}


class Node:
    """A node with a scheduler before it: claims come and go."""

    def __init__(self, rig: Rig, chance: random.Random) -> None:
        self.rig, self._chance = rig, chance
        self._claims: dict[ClaimUid, tuple[Claim, ReadOnlyBody]] = {}
        self._number = 0
        self.granted: list[str] = []

    def slices(self) -> list[Body]:
        live = {gpu.uuid: self.rig.nvml.look(gpu.uuid) for gpu in self.rig.gpus}
        records = self.rig.checkpoint.records().values()
        taints = health.taints(self.rig.inventory, live, {}, records, {})
        found = []
        for pool in resource_slices(self.rig.inventory, taints, driver=DRIVER, features=ALL):
            place = {"name": pool.name, "generation": 1, "resourceSliceCount": len(pool.specs)}
            found += [
                {
                    "metadata": {"name": f"{pool.name}-{part}"},
                    "spec": {"driver": DRIVER, "nodeName": NODE, "pool": place, **spec},
                }
                for part, spec in enumerate(pool.specs)
            ]
        return found

    def come(self) -> None:
        kind = self._chance.choice(["gpu", "mig", "mig", "mps", "mps", "timeslice", "any"])
        wanted = {"mig", "mps", "timeslice"} if kind == "any" else {kind}
        capacity = {} if kind in ("gpu", "mig") else {"memory": f"{self._chance.randint(1, 20)}Gi"}
        if kind == "mps" and self._chance.random() < 0.4:
            capacity["smPercent"] = str(self._chance.choice([10, 25, 50]))

        def fits(body: ReadOnlyBody) -> bool:
            return body["attributes"]["type"]["string"] in wanted

        request = Request(name="gpu", where=fits, capacity=capacity)
        bodies = [body for _, body in self._claims.values()]
        allocation = scheduler.allocate(self.slices(), bodies, [request], node=NODE)
        if allocation is None:
            return
        self._number += 1
        uid = ClaimUid(f"uid-{self._number}")
        body = {"metadata": {"uid": uid}, "status": {"allocation": allocation}}
        claim = claims.parse(body, ClaimRef("default", f"claim-{self._number}", uid), DRIVER)
        self.granted += [allocation.device.device for allocation in claim.allocations]
        assert len(self.rig.prepare(claim).devices) == 1, f"granted, not fulfilled: {self.granted}"
        self._claims[uid] = (claim, body)

    def leave(self) -> None:
        if self._claims:
            claim, _ = self._claims.pop(self._chance.choice(sorted(self._claims)))
            self.rig.unprepare(claim)

    def empty(self) -> None:
        while self._claims:
            self.leave()


@contextmanager
def a_node(folder: Path, spec: str, policy: Mapping[str, object], seed: str) -> Iterator[Node]:
    parsed = Policy.parse({"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": policy})
    rig = Rig(folder, spec, parsed)
    supervisor = a_supervisor(folder)
    supervisor.open()
    try:
        yield Node(rig, random.Random(seed))
    finally:
        supervisor.close()
        rig.nvml.close()


@pytest.mark.parametrize("twins", [False, True], ids=["cards shared", "partitions shared too"])
@pytest.mark.parametrize("product", models.known())
def test_what_is_granted_is_fulfilled_and_what_is_given_back_is_free(short: Path, product: str, twins: bool) -> None:
    mig = product.startswith("a") and models.product(product).profiles  # Ampere keeps the mode that it was given
    spec = f"{product}:mig+{product}" if mig else product
    with a_node(short, spec, TWINS if twins else {}, f"{product} {twins}") as node:
        before = [(node.rig.mig(gpu), node.rig.figures(gpu)) for gpu in range(len(node.rig.gpus))]
        for step in range(STEPS):
            node.leave() if step % 3 == 2 else node.come()
            node.rig.assert_agreed()
        node.empty()

        node.rig.assert_empty()
        assert node.rig.mps.running() == ()
        assert node.granted
        after = [(node.rig.mig(gpu), node.rig.figures(gpu)) for gpu in range(len(node.rig.gpus))]
        assert after == before or not mig  # Hopper's MIG mode is switched lazily: the next claim switches it back
