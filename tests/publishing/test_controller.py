"""What is offered, kept up to date: shapes that outlive everything, looks that nobody waits for, a thread that never ends."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpuslice.checkpoint import Checkpoint
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid, DeviceRef, Taint
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import pool
from gpuslice.core.pools.pool import Features, PoolSlices
from gpuslice.core.record import Record
from gpuslice.kube import Kube
from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.shapes import Shapes
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.builders import a_gpu, a_policy
from tests.kit.publishing import DRIVER, NODE, a_publisher, an_api_server
from tests.kit.rig import Rig, a_claim

FULL = Features(partitionable=True, consumable=True, taints=True)
PLAIN = Features(partitionable=False, consumable=False, taints=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path / "api") as server:
        yield server


def shapes(server: StandInApiServer, folder: Path) -> Shapes:
    return Shapes(folder / "shapes.json", Kube(server.kubeconfig), DRIVER, NODE)


def inventory(policy: dict[str, object] | None = None, *, static: bool = False) -> Inventory:
    body = {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": policy or {}}
    return Inventory.of([a_gpu("h100", 0)], Policy.parse(body), NODE, static=static)


def slices(found: Inventory, features: Features = FULL, tainted: bool = False) -> tuple[PoolSlices, ...]:
    refs = [device.ref for device in found.pools[0].devices] if tainted else []
    taints = {ref: (Taint("gpu", "hung", reason="it hangs"),) for ref in refs}
    held = frozenset({found.pools[0].devices[0].ref})
    return pool.resource_slices(found, taints, driver=DRIVER, features=features, held=held)


def record_on(found: Inventory, folder: Path) -> list[Record]:
    """The record of a claim that holds the whole card of the first pool."""
    rig = Rig(folder / "rig", "h100")
    rig.prepare(a_claim("one", rig.device("gpu")))
    (record,) = rig.checkpoint.records().values()
    ref = DeviceRef(found.pools[0].name, "gpu")
    (grant,) = record.plan.grants
    grant = replace(grant, allocation=replace(grant.allocation, device=ref))
    return [replace(record, plan=replace(record.plan, grants=(grant,)))]


def names(pool: PoolSlices) -> set[str]:
    bodies: tuple[Mapping[str, Any], ...] = pool.specs
    return {device["name"] for body in bodies for device in body.get("devices", ())}


def test_a_taint_that_came_and_went_leaves_nothing_to_settle(server: StandInApiServer, tmp_path: Path) -> None:
    """On an API server without taints the pool changes with them: once it spun at 18,000 looks a second after that."""
    kept, found = shapes(server, tmp_path), inventory(static=True)
    records = record_on(found, tmp_path)
    for tainted in (False, True, False):
        kept.admit(slices(found, PLAIN, tainted), records, taints=False, published=True)

    assert not kept.only_taints_awaited


@pytest.mark.parametrize("text", ["", '{"format": 1, "poo', "[]", '{"format": 1}'])
def test_a_torn_file_of_shapes_is_made_again_from_what_is_published(
    server: StandInApiServer, tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    wide, narrow = inventory(), inventory({"modes": ["mig"], "profiles": ["3g.40gb"]})
    with a_publisher(server) as publisher:
        publisher.publish(slices(wide))
        assert publisher.published.wait(10)
    (tmp_path / "shapes.json").write_text(text)

    (admitted,) = shapes(server, tmp_path).admit(
        slices(narrow), record_on(wide, tmp_path), taints=True, published=False
    )

    assert "gpu" in names(admitted), "a device that a claim may hold went from the pool"


def test_an_instance_that_is_replaced_does_not_write_its_shape_over_its_successor_s(
    server: StandInApiServer, tmp_path: Path
) -> None:
    old, new = inventory({"modes": ["gpu"]}), inventory()
    first, second = shapes(server, tmp_path), shapes(server, tmp_path)
    first.admit(slices(old), [], taints=True, published=True)
    for _ in range(2):  # the old shape is closed first
        second.admit(slices(new), [], taints=True, published=True)
    before = json.loads((tmp_path / "shapes.json").read_text())

    (admitted,) = first.admit(slices(old, tainted=True), record_on(new, tmp_path), taints=True, published=True)

    assert json.loads((tmp_path / "shapes.json").read_text()) == before
    assert names(admitted) > {"gpu", "monitor"}


# ---------------------------------------------------------------- the look


def a_surveyor(rig: Rig, limit_s: float = 0.2) -> NodeHealth:
    return NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=rig.checkpoint, hung=dict, limit_s=limit_s)


def test_a_card_that_hangs_is_told_and_hides_no_other(short: Path) -> None:
    rig = Rig(short, "l4x3")
    health = a_surveyor(rig)
    cue = rig.nvml.cue("hang", "look", rig.gpus[0].uuid, times=None)
    rig.nvml.lose(rig.gpus[2].uuid)

    for _ in range(2):  # the second time it is not asked again
        found = health.look(rig.inventory)
        told = {(ref.pool, t.key, t.value) for ref, taints in found.items() for t in taints if t.key == "gpu"}
        assert told == {(rig.inventory.pools[0].name, "gpu", "hung"), (rig.inventory.pools[2].name, "gpu", "lost")}

    rig.nvml.withdraw(cue)
    rig.nvml.close()


def test_a_card_that_answers_again_is_well_again(short: Path) -> None:
    rig = Rig(short, "l4")
    health, before = a_surveyor(rig), set(threading.enumerate())
    cue = rig.nvml.cue("hang", "look", rig.gpus[0].uuid, times=None)
    health.look(rig.inventory)
    (thread,) = set(threading.enumerate()) - before

    rig.nvml.withdraw(cue)
    thread.join(10)

    assert not any(t.key == "gpu" for taints in health.look(rig.inventory).values() for t in taints)


@pytest.mark.parametrize(
    ("product", "verb", "hit", "taint"),
    [
        ("l4", "minor", {"mps", "timeslice", "gpu"}, "device-node=none"),
        ("l4", "time_slice", {"timeslice"}, "time-slice=unsupported"),
        ("p4", "", {"timeslice"}, "time-slice=unsupported"),
        ("l4", "compute_mode", {"mps"}, "compute-mode=unsupported"),
    ],
)
def test_what_a_card_refuses_for_good_is_tainted_from_the_start_and_asked_once(
    short: Path, product: str, verb: str, hit: set[str], taint: str
) -> None:
    rig = Rig(
        short, f"{product}+l4" if product != "p4" else _with_a_p4(short), a_policy(timeslice={"interval": "short"})
    )
    if verb:
        rig.nvml.cue("fail", verb, rig.gpus[0].uuid, code=Code.NOT_SUPPORTED)
    health = a_surveyor(rig)

    for _ in range(2):  # the second time nothing fails any more, and it is not asked
        found = health.look(rig.inventory)
        told = {
            (ref.pool, ref.device) for ref, taints in found.items() for t in taints if f"{t.key}={t.value}" == taint
        }
        assert told == {(rig.inventory.pools[0].name, device) for device in hit}


def test_a_refusal_that_passes_taints_nothing(short: Path) -> None:
    rig = Rig(short, "l4", a_policy(timeslice={"interval": "short"}))
    rig.nvml.cue("fail", "time_slice", code=Code.UNKNOWN)

    assert not any(t.key == "time-slice" for taints in a_surveyor(rig).look(rig.inventory).values() for t in taints)


def _with_a_p4(folder: Path) -> str:
    p4 = {"name": "Tesla P4", "architecture": "Pascal", "compute_capability": "6.1", "memory_mib": 7680}
    body = p4 | {"reserved_mib": 0, "pci_device_id": "0x1BB310DE", "resetless": False, "profiles": []}
    path = folder / "node.json"
    path.write_text(json.dumps({"gpus": [{"product": "p4"}, {"product": "l4"}], "products": {"p4": body}}))
    return str(path)


# ---------------------------------------------------------------- the thread


class _Trouble(Checkpoint):
    """Records that cannot be listed for a while, as with too many open files."""

    trouble = True

    def records(self) -> dict[ClaimUid, Record]:
        if self.trouble:
            raise OSError(24, "Too many open files")
        return super().records()


def test_whatever_goes_wrong_in_a_plan_is_told_and_tried_again(
    server: StandInApiServer, short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = SimNvml(short / "node", "l4", latency="zero")
    found = Inventory.of(nvml.gpus(), Policy.default(), NODE)
    rig = Rig(short / "rig", "l4")
    checkpoint = _Trouble(short / "claims", "boot")
    health = NodeHealth(nvml=nvml, mps=rig.mps, checkpoint=checkpoint, hung=dict)
    controller = SliceController(
        kube=Kube(server.kubeconfig),
        driver=DRIVER,
        node=NODE,
        dynamic=found,
        static=found,
        health=health,
        checkpoint=checkpoint,
        folder=short,
    )
    told = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: told.set() if "cannot plan" in record.getMessage() else None  # type: ignore[method-assign]
    logging.getLogger("gpuslice.publishing.controller").addHandler(handler)
    try:
        controller.start()
        assert told.wait(10)
        assert "Too many open files" in (controller.problem() or "")
        checkpoint.trouble = False
        controller.nudge()
        server.wait(lambda: bool(server.all("resourceslices")), 10)
    finally:
        controller.stop()
        logging.getLogger("gpuslice.publishing.controller").removeHandler(handler)
