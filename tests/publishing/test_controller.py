"""What is offered, kept up to date: shapes that outlive everything, looks that nobody waits for, a thread that never ends."""

from __future__ import annotations

import json
import logging
import queue
import sys
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
from gpuslice.mps.client import MpsClient
from gpuslice.nvml.session import Session
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.shapes import Shapes
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.system.threads import ThreadWatch

from tests.kit.builders import a_gpu
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


class Opener:
    """Opens the simulated NVML of a rig anew, and counts."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.opened = rig, list[SimNvml]()

    def __call__(self) -> SimNvml:
        self.opened.append(SimNvml(self.rig.folder / "node", latency="zero"))
        return self.opened[-1]


def over_a_session(rig: Rig, limit_s: float = 15.0) -> tuple[NodeHealth, Session, Opener]:
    opener = Opener(rig)
    session = Session(opener)
    health = NodeHealth(
        nvml=session, mps=rig.mps, checkpoint=rig.checkpoint, hung=dict, renew=session.renew, limit_s=limit_s
    )
    return health, session, opener


def on_cards(found: Mapping[DeviceRef, tuple[Taint, ...]]) -> set[tuple[str, str]]:
    return {(ref.pool, t.value) for ref, taints in found.items() for t in taints if t.key == "gpu"}


def test_a_session_through_which_no_card_can_be_read_is_opened_anew(short: Path) -> None:
    rig = Rig(short, "l4x2")
    health, session, opener = over_a_session(rig)
    opener.opened[0].close()  # every call fails from now on

    found = health.look(rig.inventory)

    assert on_cards(found) == set()
    assert health.unreadable == ""
    assert len(opener.opened) == 2
    session.close()


def test_a_card_that_comes_and_goes_never_costs_the_others_their_session(short: Path) -> None:
    rig = Rig(short, "l4x2")
    health, session, opener = over_a_session(rig)
    for _ in range(3):
        cue = rig.nvml.cue("fail", "look", rig.gpus[0].uuid, times=None)
        assert on_cards(health.look(rig.inventory)) == {(rig.inventory.pools[0].name, "lost")}
        assert health.unreadable == ""
        rig.nvml.withdraw(cue)
        assert on_cards(health.look(rig.inventory)) == set()

    assert len(opener.opened) == 1
    session.close()


def test_cards_that_stay_lost_are_told_and_need_no_session_at_each_look(short: Path) -> None:
    rig = Rig(short, "l4x2")
    health, session, opener = over_a_session(rig)
    for gpu in rig.gpus:
        rig.nvml.lose(gpu.uuid)

    for _ in range(3):
        assert len(on_cards(health.look(rig.inventory))) == 2
        assert health.unreadable.startswith("no card can be read: ")

    assert len(opener.opened) == 2
    session.close()


def test_a_session_in_which_a_call_hangs_is_not_pulled_away(short: Path) -> None:
    rig = Rig(short, "l4x2")
    health, session, opener = over_a_session(rig, limit_s=0.2)
    rig.nvml.lose(rig.gpus[1].uuid)
    rig.nvml.cue("hang", "look", rig.gpus[0].uuid, times=None)

    found = health.look(rig.inventory)

    assert {value for _, value in on_cards(found)} == {"hung", "lost"}
    assert len(opener.opened) == 1
    assert not session.renew()
    rig.nvml.withdraw(None)
    session.close()


# ---------------------------------------------------------------- the thread


class _Trouble(Checkpoint):
    """Records that cannot be listed for a while, as with too many open files."""

    trouble = True

    def records(self) -> dict[ClaimUid, Record]:
        if self.trouble:
            raise OSError(24, "Too many open files")
        return super().records()


def a_controller(server: StandInApiServer, folder: Path, **more: Any) -> SliceController:
    """Of a node with one L4."""
    nvml = SimNvml(folder / "node", "l4", latency="zero")
    found = Inventory.of(nvml.gpus(), Policy.default(), NODE)
    checkpoint = Checkpoint(folder / "claims", "boot")
    health = NodeHealth(nvml=nvml, mps=MpsClient(folder / "mps"), checkpoint=checkpoint, hung=dict)
    return SliceController(
        kube=Kube(server.kubeconfig),
        driver=DRIVER,
        node=NODE,
        dynamic=found,
        static=found,
        health=health,
        checkpoint=checkpoint,
        folder=folder,
        **more,
    )


@pytest.mark.parametrize("path", ["/version", "dryRun"])
@pytest.mark.parametrize("answer", ["refused", "cut off", "odd"])
def test_no_first_answer_of_the_api_server_ends_the_offering(
    server: StandInApiServer, short: Path, path: str, answer: str
) -> None:
    threads = ThreadWatch()
    controller = a_controller(server, short, threads=threads)
    match answer:
        case "refused":
            server.fail(500, path=path)
        case "cut off":
            server.cut(3, path=path)  # the client itself tries a dead connection again
        case _:
            server.fail(200, path=path)  # a Status object where another kind belongs
    try:
        controller.start()
        server.wait(lambda: bool(server.all("resourceslices")), 20)
        assert threads.problem() is None
    finally:
        controller.stop()


def test_a_thread_of_the_controller_that_ends_is_told(server: StandInApiServer, short: Path) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    threads = ThreadWatch(told.put)
    controller = a_controller(server, short, threads=threads, on_taints_changed=sys.exit)
    try:
        controller.start()
        server.wait(lambda: bool(server.all("resourceslices")), 20)
        node = SimNvml(short / "node", latency="zero")
        node.lose(node.gpus()[0].uuid)
        controller.nudge()
        assert "thread controller ended by SystemExit" in told.get(timeout=10)
        assert "thread controller ended" in (threads.problem() or "")
    finally:
        controller.stop()


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
