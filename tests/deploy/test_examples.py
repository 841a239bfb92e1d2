"""deploy/examples: each is scheduled, prepared, and gives what its text says."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core import claims
from gpuslice.core.model import INTERVALS, Claim, ClaimRef, ClaimUid
from gpuslice.standin import scheduler

from tests.kit.device_classes import request, slices
from tests.kit.manifests import DEPLOY, DRIVER, EXAMPLES, Body, documents
from tests.kit.rig import NODE, Rig
from tests.plugin.test_mps_shares import a_supervisor


@dataclass(frozen=True, slots=True)
class Example:
    """The claims of an example as the control plane makes them, and who of its pods names them."""

    path: Path

    def bodies(self, *kinds: str) -> list[dict[str, Any]]:
        return [body for body in documents(self.path) if body["kind"] in kinds]

    def claims(self) -> Iterator[dict[str, Any]]:
        """`devices` of every claim: of those made from a template, one for each pod that names it."""
        for pods, spec in self.pods():
            for entry in spec.get("resourceClaims", ()):
                if "resourceClaimTemplateName" in entry:
                    template = self._named("ResourceClaimTemplate", entry["resourceClaimTemplateName"])
                    yield from pods * [template["spec"]["spec"]["devices"]]
        for claim in self.bodies("ResourceClaim"):
            yield claim["spec"]["devices"]

    def pods(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every pod spec, with the number of pods that it makes."""
        for body in self.bodies("Pod"):
            yield 1, body["spec"]
        for body in self.bodies("Deployment", "DaemonSet"):  # of which a node has one
            yield body["spec"].get("replicas", 1), body["spec"]["template"]["spec"]

    def _named(self, kind: str, name: str) -> dict[str, Any]:
        (found,) = (body for body in self.bodies(kind) if body["metadata"]["name"] == name)
        return found


class Node:
    """A simulated node beside the stand-in scheduler, and the claims that it has placed there."""

    def __init__(self, folder: Path) -> None:
        self.rig = Rig(folder)
        self._slices = slices(self.rig.inventory)
        self._claims: list[dict[str, Any]] = []

    def allocate(self, body: Body) -> Claim:
        """One more claim with these `devices`, as the driver reads it."""
        requests = [request(entry) for entry in body["requests"]]
        configs = [{"source": "FromClaim", **entry} for entry in body.get("config", ())]
        allocation = scheduler.allocate(self._slices, self._claims, requests, node=NODE, configs=configs)
        assert allocation is not None
        uid = ClaimUid(f"claim-{len(self._claims)}")
        self._claims.append({"metadata": {"uid": uid}, "status": {"allocation": allocation}})
        return claims.parse(self._claims[-1], ClaimRef("default", str(uid), uid), DRIVER)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_scheduled_and_prepared_on_the_simulated_node(short: Path, path: Path) -> None:
    node, supervisor = Node(short), a_supervisor(short)
    supervisor.open()
    try:
        for body in Example(path).claims():
            assert node.rig.prepare(node.allocate(body)).devices
    finally:
        supervisor.close()
        node.rig.nvml.close()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_pods_of_an_example_use_each_claim_of_it_and_nothing_else(path: Path) -> None:
    example = Example(path)
    named = {
        (key, name)
        for _, spec in example.pods()
        for entry in spec.get("resourceClaims", ())
        for key, name in entry.items()
        if key != "name"
    }
    keys = {"ResourceClaimTemplate": "resourceClaimTemplateName", "ResourceClaim": "resourceClaimName"}

    assert named == {(keys[body["kind"]], body["metadata"]["name"]) for body in example.bodies(*keys)}
    for _, spec in example.pods():
        used = {claim["name"] for c in spec["containers"] for claim in c["resources"].get("claims", ())}
        assert used == {entry["name"] for entry in spec.get("resourceClaims", ())}


# ---------------------------------------------------------------- what the examples say of themselves


def example(name: str) -> list[dict[str, Any]]:
    return list(Example(DEPLOY / f"examples/{name}.yaml").claims())


def test_the_shares_that_are_asked_for_are_what_the_claims_are_charged(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (mps,), (turns,) = (node.allocate(*example(name)).allocations for name in ("mps-share", "time-slice-share"))

    assert (mps.device.device, mps.consumed["memory"], mps.consumed["smPercent"]) == ("mps", 9 << 30, 25)
    assert (turns.device.device, turns.consumed["memory"], turns.consumed["shares"]) == ("timeslice", 9 << 30, 1)


def test_nine_gibibytes_of_anything_are_a_partition_or_a_share_of_that_size(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (partition,) = node.allocate(*example("any-share-by-memory")).allocations

    assert partition.device.device.startswith("mig-1g-")
    assert partition.consumed == {}

    shared = Node(tmp_path / "shared")
    shared.allocate(*example("mps-share"))  # on the first card
    (share,) = shared.allocate(*example("any-share-by-memory")).allocations

    assert share.device.device == "mps"
    assert share.consumed["memory"] == 9 << 30


def test_four_claims_with_a_quarter_of_the_multiprocessors_each_fill_a_card(tmp_path: Path) -> None:
    node = Node(tmp_path)
    pools = [node.allocate(*example("mps-share")).allocations[0].device.pool for _ in range(5)]

    assert len(set(pools[:4])) == 1
    assert pools[4] != pools[0]


def test_seven_replicas_are_on_one_card(tmp_path: Path) -> None:
    node = Node(tmp_path)
    found = [node.allocate(body).allocations[0].device for body in example("seven-on-one-card")]

    assert len(set(found)) == 7
    assert len({device.pool for device in found}) == 1


def test_the_interval_is_set_on_the_card_of_the_claim(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.rig.prepare(node.allocate(*example("interval")))

    levels = [node.rig.nvml.time_slice(gpu.uuid) for gpu in node.rig.gpus]
    assert levels == [INTERVALS.index("long"), INTERVALS.index("default")]
