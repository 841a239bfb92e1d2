"""Node objects without machines, each with the slices that our driver would publish on it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import Gpu, GpuUuid
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import reconcile
from gpuslice.core.pools.pool import Features, PoolSlices, resource_slices
from gpuslice.core.pools.reconcile import Create, Owner
from gpuslice.nvml.sim.nvml import SimNvml

from hack.lib.api import CLASSES, NODES, SLICES, ApiServer, Body

DRIVER = "gpuslice.dev"
CARDS = "h100x8"
REPOSITORY = Path(__file__).parents[3]
_SEED = uuid.UUID(int=0)
ALL = Features(partitionable=True, consumable=True, taints=True)  # as in Kubernetes 1.36 and later
_READY = {"type": "Ready", "status": "True", "reason": "Simulated", "message": "an object and nothing else"}

NodePlan = Callable[[str], Sequence[PoolSlices]]  # the pools that a node of this name publishes


@dataclass(frozen=True, slots=True)
class FleetNode:
    name: str
    uid: str


def name_of(number: int) -> str:
    return f"node-{number:03}"


def cards() -> tuple[Gpu, ...]:
    """The cards of one simulated node."""
    with tempfile.TemporaryDirectory(prefix="gpuslice-scale-") as folder:
        nvml = SimNvml(Path(folder), CARDS)
        try:
            return nvml.gpus()
        finally:
            nvml.close()


def plan(gpus: Sequence[Gpu], policy: Policy) -> NodePlan:
    """The pools of a node with these cards under this policy. Only names and UUIDs differ between nodes."""

    def pools(node: str) -> Sequence[PoolSlices]:
        own = [replace(gpu, uuid=GpuUuid(f"GPU-{uuid.uuid5(_SEED, f'{node}/{gpu.index}')}")) for gpu in gpus]
        return resource_slices(Inventory.of(own, policy, node), {}, driver=DRIVER, features=ALL)

    return pools


def slices(node: FleetNode, pools: Sequence[PoolSlices]) -> list[Body]:
    """The objects that the driver's publisher would create, in the same order."""
    owner = Owner(DRIVER, node.name, node.uid)
    return [change.body for change in reconcile.changes(pools, [], owner) if isinstance(change, Create)]


def publish(api: ApiServer, nodes: Iterable[FleetNode], plan: NodePlan) -> None:
    """Replace all slices of these nodes by the slices of the plan."""
    api.clear(SLICES)
    api.create(SLICES, (body for node in nodes for body in slices(node, plan(node.name))))


def create_classes(api: ApiServer) -> None:
    text = (REPOSITORY / "deploy" / "deviceclasses.yaml").read_text()
    api.create(CLASSES, yaml.safe_load_all(text))


def create_nodes(api: ApiServer, count: int) -> list[FleetNode]:
    """Create nodes that are ready for pods. Admission adds a taint to each; this call removes it, because no kubelet does."""
    names = [name_of(number) for number in range(count)]
    made = api.create(
        NODES, ({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}} for name in names)
    )
    room = {"cpu": "256", "memory": "2Ti", "pods": "1000"}
    status = {"capacity": room, "allocatable": room, "conditions": [_READY]}
    api.merge((f"{NODES}/{name}/status", {"status": status}) for name in names)
    api.merge((f"{NODES}/{name}", {"spec": {"taints": None}}) for name in names)
    return [FleetNode(body["metadata"]["name"], body["metadata"]["uid"]) for body in made]
