"""The offer is kept up to date: shapes survive everything, no claim waits for a look, and the thread never ends."""

from __future__ import annotations

import json
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
from gpuslice.core.model import ClaimUid, DeviceRef, GpuUuid, Taint
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import pool
from gpuslice.core.pools.pool import Features, PoolSlices
from gpuslice.core.record import Record
from gpuslice.errors import DeviceError
from gpuslice.kube import Kube
from gpuslice.nvml.api import Code, ComputeMode
from gpuslice.nvml.session import Session
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.publishing.shapes import Shapes
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.system.threads import ThreadWatch

from tests.kit.builders import a_gpu, a_policy
from tests.kit.publishing import DRIVER, NODE, a_controller, a_line, a_publisher, an_api_server
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


def a_surveyor(rig: Rig, limit_s: float = 15.0) -> NodeHealth:
    return NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=rig.checkpoint, hung=dict, limit_s=limit_s)


def test_a_card_that_hangs_is_told_and_hides_no_other(short: Path) -> None:
    rig = Rig(short, "l4x3")
    health = a_surveyor(rig, limit_s=1.0)
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
    health, before = a_surveyor(rig, limit_s=1.0), set(threading.enumerate())
    cue = rig.nvml.cue("hang", "look", rig.gpus[0].uuid, times=None)
    health.look(rig.inventory)
    (thread,) = set(threading.enumerate()) - before

    rig.nvml.withdraw(cue)
    thread.join(10)

    assert not any(t.key == "gpu" for taints in health.look(rig.inventory).values() for t in taints)


def test_a_card_with_a_call_that_hangs_is_tainted_and_not_asked(short: Path) -> None:
    rig = Rig(short, "l4x2", a_policy(modes=["gpu"]))
    rig.nvml.cue("hang", "look", rig.gpus[0].uuid, times=None)
    hung = {rig.gpus[0].uuid: "prepare of claim one hangs"}
    health = NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=rig.checkpoint, hung=lambda: hung)

    found = health.look(rig.inventory)

    assert {(ref.pool, t.value, t.reason) for ref, taints in found.items() for t in taints} == {
        (rig.inventory.pools[0].name, "hung", "prepare of claim one hangs")
    }
    rig.nvml.withdraw()
    rig.nvml.close()


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
        nvml=session,
        mps=rig.mps,
        checkpoint=rig.checkpoint,
        hung=dict,
        renew=session.renew,
        refused=session.refused,
        limit_s=limit_s,
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
    health, session, opener = over_a_session(rig, limit_s=1.0)
    rig.nvml.lose(rig.gpus[1].uuid)
    rig.nvml.cue("hang", "look", rig.gpus[0].uuid, times=None)

    found = health.look(rig.inventory)

    assert {value for _, value in on_cards(found)} == {"hung", "lost"}
    assert len(opener.opened) == 1
    assert not session.renew()
    rig.nvml.withdraw(None)
    session.close()


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


@pytest.mark.parametrize(
    ("product", "call", "wanted", "back", "hit", "taint"),
    [
        ("l4", "set_compute_mode", ComputeMode.EXCLUSIVE_PROCESS, ComputeMode.DEFAULT, {"mps"}, "compute-mode"),
        ("l4", "set_time_slice", 1, 0, {"timeslice"}, "time-slice"),
        ("h100", "set_mig_mode", True, False, {"mig"}, "mig-mode"),
    ],
)
def test_a_setting_that_a_card_refuses_for_good_is_tainted_after_the_first_refusal(
    short: Path, product: str, call: str, wanted: object, back: object, hit: set[str], taint: str
) -> None:
    rig = Rig(short, f"{product}x2", a_policy(timeslice={"interval": "short"}))
    health, session, _ = over_a_session(rig)
    first, second = (gpu.uuid for gpu in rig.gpus)
    rig.nvml.cue("fail", call, code=Code.NOT_SUPPORTED, times=3)

    def told() -> set[tuple[str, str]]:
        found = health.look(rig.inventory).items()
        return {(ref.pool, ref.device) for ref, taints in found for t in taints if t == Taint(taint, "unsupported")}

    def setting(gpu: GpuUuid, value: object) -> None:
        getattr(session, call)(gpu, value)

    with pytest.raises(DeviceError):  # as in an undo in MIG mode: nothing was set before
        setting(second, back)
    assert told() == set()
    for _ in range(2):
        with pytest.raises(DeviceError):
            setting(first, wanted)
        assert {device.partition("-")[0] for _, device in told()} == hit
        assert {pool for pool, _ in told()} == {rig.inventory.pools[0].name}

    setting(first, wanted)

    assert told() == set()
    session.close()


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


PUBLISHED = "published the ResourceSlices"  # all that is wanted is in force


def devices(server: StandInApiServer, tainted: bool = False) -> set[str]:
    """Names of the devices that the API shows; of those with a taint only, or of all."""
    found = [device for body in server.all("resourceslices") for device in body["spec"].get("devices", ())]
    return {device["name"] for device in found if not tainted or device.get("taints")}


@pytest.mark.parametrize("path", ["/version", "dryRun"])
@pytest.mark.parametrize("answer", ["refused", "cut off", "odd"])
def test_no_first_answer_of_the_api_server_ends_the_offering(
    server: StandInApiServer, short: Path, path: str, answer: str
) -> None:
    threads = ThreadWatch()
    match answer:
        case "refused":
            server.fail(500, path=path)
        case "cut off":
            server.cut(3, path=path)  # the client itself tries a dead connection again
        case _:
            server.fail(200, path=path)  # a Status object where another kind belongs
    with a_controller(server, Rig(short / "rig", "l4"), short, threads=threads):
        server.wait(lambda: bool(server.all("resourceslices")), 20)
        assert threads.problem() is None


def test_a_thread_of_the_controller_that_ends_is_told(server: StandInApiServer, short: Path) -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    rig, threads = Rig(short / "rig", "l4"), ThreadWatch(told.put)
    with a_controller(server, rig, short, on_taints_changed=sys.exit, threads=threads) as controller:
        server.wait(lambda: bool(server.all("resourceslices")), 20)
        rig.nvml.lose(rig.gpus[0].uuid)
        controller.nudge()
        assert "thread controller ended by SystemExit" in told.get(timeout=10)
        assert "thread controller ended" in (threads.problem() or "")


def test_whatever_goes_wrong_in_a_plan_is_told_and_tried_again(server: StandInApiServer, short: Path) -> None:
    rig = Rig(short / "rig", "l4")
    checkpoint = _Trouble(short / "claims", "boot")
    with a_line("cannot plan") as told, a_controller(server, rig, short, checkpoint=checkpoint) as controller:
        assert told.wait(10)
        assert "Too many open files" in (controller.problem() or "")
        checkpoint.trouble = False
        controller.nudge()
        server.wait(lambda: bool(server.all("resourceslices")), 10)


def test_an_api_server_that_cannot_be_probed_is_told_and_asked_again(server: StandInApiServer, short: Path) -> None:
    server.fail(500, times=99, path="dryRun")
    rig = Rig(short / "rig", "l4")
    with (
        a_line("cannot find out what the API server supports") as told,
        a_line(PUBLISHED) as published,
        a_controller(server, rig, short) as controller,
    ):
        assert told.wait(10)
        assert "refused on cue" in (controller.problem() or "")
        assert not server.all("resourceslices"), "something was written before it was known what the server keeps"

        server.release()
        controller.nudge()

        assert published.wait(10)
        assert controller.problem() is None
        assert "gpu" in devices(server)


def test_a_driver_that_ends_before_it_could_probe_the_api_server_ends_at_once(
    server: StandInApiServer, short: Path
) -> None:
    server.fail(500, times=99, path="dryRun")
    before = set(threading.enumerate())
    with a_line("cannot find out") as told, a_controller(server, Rig(short / "rig", "l4"), short):
        assert told.wait(10)

    assert not [thread for thread in set(threading.enumerate()) - before if thread.name == "controller"]


def test_without_the_published_shapes_nothing_is_planned_until_the_api_server_shows_them(
    server: StandInApiServer, short: Path
) -> None:
    """Else a device of a pool of the last release could go while a claim holds it."""
    server.fail(500, times=99, method="GET", path="/resourceslices")
    rig = Rig(short / "rig", "l4")
    with (
        a_line("cannot plan") as told,
        a_line(PUBLISHED) as published,
        a_controller(server, rig, short) as controller,
    ):
        assert told.wait(10)
        assert "list resourceslices" in (controller.problem() or "")

        server.release()
        controller.nudge()

        assert published.wait(10)
        assert controller.problem() is None
        assert "gpu" in devices(server)


def test_a_card_that_is_lost_and_comes_back_is_tainted_and_told_each_time(
    server: StandInApiServer, short: Path
) -> None:
    rig, changed = Rig(short / "rig", "l4"), threading.Event()
    with (
        a_line(PUBLISHED) as published,
        a_controller(server, rig, short, on_taints_changed=changed.set) as controller,
    ):
        assert published.wait(10)
        assert not changed.is_set()

        rig.nvml.lose(rig.gpus[0].uuid)
        controller.nudge()
        server.wait(lambda: "gpu" in devices(server, tainted=True))
        assert changed.is_set()
        changed.clear()

        rig.nvml.reset(rig.gpus[0].uuid)
        controller.nudge()
        server.wait(lambda: "gpu" not in devices(server, tainted=True))
        assert changed.is_set()


def test_a_new_policy_is_in_force_once_the_old_devices_were_tainted_even_where_a_write_fails(
    server: StandInApiServer, short: Path
) -> None:
    old = Rig(short / "rig", "l4", a_policy(modes=["gpu", "mps"]))
    with a_line(PUBLISHED) as published, a_controller(server, old, short):
        assert published.wait(10)
        assert "mps" in devices(server)
    new = Rig(short / "rig", "l4", a_policy(modes=["gpu"]))
    server.fail(500, times=2, method="PUT", path="/resourceslices")

    with a_controller(server, new, short):
        server.wait(lambda: "mps" in devices(server, tainted=True))
        server.wait(lambda: "gpu" in devices(server) and "mps" not in devices(server))

    assert devices(server, tainted=True) == set()
