"""A published device is a promise: the driver prepares each request that the policies of capacities and the counters allow."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from decimal import ROUND_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core import claims, plan, share
from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.model import MIB, Claim, ClaimRef, ClaimUid
from gpuslice.core.record import Plan
from gpuslice.nvml.sim import models
from gpuslice.standin import scheduler
from gpuslice.standin.resource_slices import amount
from gpuslice.standin.scheduler import Request

from tests.kit.rig import NODE
from tests.plugin.test_modes import DRIVER, Node, a_node

POLICIES: Mapping[str, Mapping[str, object]] = {
    "default": {},
    "partitions shared": {"sharedPartitions": ["mps", "timeslice"]},
    "one share": {"mps": {"shares": 1}, "timeslice": {"shares": 1}},
    "many shares": {"mps": {"shares": 48}, "timeslice": {"shares": 100}},
    "few clients": {"mps": {"shares": 2, "clients": 2}},
    "settings kept": {"keep": ["computeMode", "timeSlice"]},
    "least and reserve": {"leastShare": "3Gi", "reserve": "1.5Gi", "suffixes": ["+me"]},
}
CARRIED_OUT = ("default", "partitions shared")  # the policies whose every edge runs on an MPS daemon
CASES = [(product, "default") for product in models.known()] + [
    ("h100", name) for name in POLICIES if name != "default"
]


def spec_of(product: str) -> str:
    mig = product.startswith("a") and models.product(product).profiles  # Ampere keeps the mode that it has
    return f"{product}:mig+{product}" if mig else product


def kinds(node: Node) -> Iterator[tuple[str, str, ReadOnlyBody]]:
    """The first device of each kind that can be used now: pool, name and body."""
    seen = set()
    for body in node.slices():
        for device in body["spec"].get("devices", ()):
            facts = {key: next(iter(value.values())) for key, value in device["attributes"].items()}
            kind = (facts["type"], bool(facts["profile"]), body["spec"]["pool"]["name"])
            if kind not in seen and not device.get("taints"):
                seen.add(kind)
                yield body["spec"]["pool"]["name"], device["name"], device


def edges(entry: ReadOnlyBody) -> Iterator[str]:
    """The amounts of a capacity at which its request policy ends or a step begins. The policy allows all of them."""
    policy: dict[str, Any] = entry.get("requestPolicy") or {}
    yield from policy.get("validValues", ())
    if limits := policy.get("validRange"):
        least, most = exact(limits["min"]), exact(limits.get("max", entry["value"]))
        step = exact(limits.get("step", "1"))
        last = least + (most - least) // step * step
        found = (Decimal(0), least, least + step / 2, last - step, last)
        yield from dict.fromkeys(f"{value.normalize():f}" for value in found if 0 <= value <= last)


def exact(text: str) -> Decimal:
    value = amount(text)
    assert value is not None
    return value


def requests(device: ReadOnlyBody) -> Iterator[dict[str, str]]:
    """No request, all smallest amounts together, all largest ones together."""
    found = {name: list(edges(entry)) for name, entry in device["capacity"].items()}
    yield {}
    for choose in (min, max):
        yield {name: choose(texts, key=exact) for name, texts in found.items() if texts}


def each_edge(device: ReadOnlyBody) -> Iterator[dict[str, str]]:
    """Every edge alone."""
    for name, entry in device["capacity"].items():
        texts = list(edges(entry))
        yield from ({name: text} for text in texts if len(texts) > 1)


def allocated(
    node: Node, pool: str, name: str, capacity: Mapping[str, str], beside: Sequence[ReadOnlyBody] = (), uid: str = "one"
) -> ReadOnlyBody | None:
    """The claim for this device, as the scheduler allocates it beside these claims. None if nothing fits."""
    request = Request(
        name="gpu", where=lambda body: bool(body["name"] == name), capacity=capacity, admin=name == "monitor"
    )
    slices = [body for body in node.slices() if body["spec"]["pool"]["name"] == pool]
    allocation = scheduler.allocate(slices, beside, [request], node=NODE)
    return allocation and {"metadata": {"uid": uid}, "status": {"allocation": allocation}}


def read(body: ReadOnlyBody) -> Claim:
    uid = ClaimUid(body["metadata"]["uid"])
    return claims.parse(body, ClaimRef("default", uid, uid), DRIVER)


def told(node: Node, claim: Claim) -> dict[str, str]:
    body: Any = node.rig.cdi(claim)
    edits = [body.get("containerEdits", {}), *(device["containerEdits"] for device in body["devices"])]
    return dict(pair.split("=", 1) for one in edits for pair in one.get("env", ()))


class Promise:
    """One device, and requests for it.

    On an MPS device a small share stays meanwhile, if there is room for it, because the start of a daemon takes long.
    """

    def __init__(self, node: Node, pool: str, name: str, device: ReadOnlyBody) -> None:
        self._node, self._pool, self._name, self._device = node, pool, name, device
        self._type = device["attributes"]["type"]["string"]
        self._small: ReadOnlyBody | None = None

    def broken(self, capacity: Mapping[str, str], *, only_planned: bool = False) -> str:
        """Why the driver breaks the promise for this request. "" if it keeps it.

        `only_planned`: without the hardware, because new ceilings of a daemon take long and are the same for each policy.
        """
        what = f"{self._name} {dict(capacity)}"
        try:
            claim = read(self._allocated(capacity))
            environment = self._planned(claim) if only_planned and self._type == "mps" else self._carried_out(claim)
        except Exception as e:  # noqa: BLE001 - each is a promise that was not kept
            return f"{what}: {type(e).__name__}: {e}"[:300]
        if "requestPolicy" not in self._device["capacity"]["memory"]:
            return ""
        charged = claim.allocations[0].consumed
        memory = (Decimal(charged["memory"]) / MIB).to_integral_value(ROUND_UP)
        wanted = {"GPUSLICE_GPU_MEMORY_MIB": str(memory)}
        if percent := charged["smPercent"]:
            wanted["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percent)
        found = {key: environment.get(key) for key in wanted}
        short = [key for key, text in capacity.items() if charged[key] < exact(text)]
        return "" if found == wanted and not short else f"{what}: {found} for {wanted}, short of {short}"

    def end(self) -> None:
        if self._small is not None:
            self._node.rig.unprepare(read(self._small))
            self._small = None

    def _carried_out(self, claim: Claim) -> dict[str, str]:
        """The environment of the claim's containers."""
        self._node.rig.prepare(claim)
        environment = told(self._node, claim)
        self._node.rig.unprepare(claim)
        return environment

    def _planned(self, claim: Claim) -> dict[str, str]:
        rig = self._node.rig
        live = {gpu.uuid: rig.nvml.look(gpu.uuid) for gpu in rig.gpus}
        wanted = plan.grants(claim, rig.inventory)
        decision = plan.make(claim.ref, wanted, rig.inventory, rig.checkpoint.records().values(), live)
        assert isinstance(decision, Plan), decision
        ceilings = share.of(decision.grants[0])
        assert ceilings is not None
        memory, percent = str(ceilings.memory_mib), str(ceilings.percent)
        return {"GPUSLICE_GPU_MEMORY_MIB": memory, "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": percent}

    def _allocated(self, capacity: Mapping[str, str]) -> ReadOnlyBody:
        if self._type == "mps" and self._small is None and "requestPolicy" in self._device["capacity"]["memory"]:
            least = {name: min(edges(entry), key=exact) for name, entry in self._device["capacity"].items()}
            self._small = allocated(self._node, self._pool, self._name, least, uid="small")
            assert self._small is not None
            self._node.rig.prepare(read(self._small))
        beside = [] if self._small is None else [self._small]
        found = allocated(self._node, self._pool, self._name, capacity, beside)
        if found is None and beside:
            self.end()
            found = allocated(self._node, self._pool, self._name, capacity)
        assert found is not None, "its own policy does not allow it"
        return found


@pytest.mark.parametrize(("product", "policy"), CASES, ids=lambda value: str(value))
def test_what_a_request_policy_allows_is_prepared_as_asked(short: Path, product: str, policy: str) -> None:
    tried, wrong = 0, []
    with a_node(short, spec_of(product), POLICIES[policy], product) as node:
        for pool, name, device in kinds(node):
            promise = Promise(node, pool, name, device)
            for capacity in requests(device):
                tried += 1
                wrong.append(promise.broken(capacity))
            for capacity in each_edge(device) if product == "h100" else ():
                tried += 1
                wrong.append(promise.broken(capacity, only_planned=policy not in CARRIED_OUT))
            promise.end()
        node.rig.assert_empty()

    assert [sentence for sentence in wrong if sentence] == []
    assert tried > 5


@pytest.mark.parametrize("product", models.known())
@pytest.mark.parametrize("type_", ["gpu", "mig", "mps", "timeslice"])
def test_what_the_counters_allow_at_once_is_prepared_at_once(short: Path, product: str, type_: str) -> None:
    """As many claims as the scheduler can place, at random places, with the least of everything."""
    chance = random.Random(f"{product} {type_}")
    with a_node(short, spec_of(product), {"sharedPartitions": ["mps", "timeslice"]}, product) as node:
        bodies: list[ReadOnlyBody] = []
        while (found := some(node, type_, bodies, chance)) is not None and len(bodies) < 20:
            node.rig.prepare(read(found))
            bodies.append(found)
        node.rig.assert_agreed()
        for body in bodies:
            node.rig.unprepare(read(body))
        node.rig.assert_empty()


def some(node: Node, type_: str, beside: Sequence[ReadOnlyBody], chance: random.Random) -> ReadOnlyBody | None:
    """A claim for any device of this type, beside these claims."""
    places = [
        (body["spec"]["pool"]["name"], device["name"])
        for body in node.slices()
        for device in body["spec"].get("devices", ())
        if device["attributes"]["type"]["string"] == type_
    ]
    chance.shuffle(places)
    found = (allocated(node, *place, {}, beside, uid=f"uid-{len(beside)}") for place in places)
    return next((body for body in found if body is not None), None)
