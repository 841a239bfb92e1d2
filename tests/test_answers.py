"""The driver concludes nothing from an answer that does not say so: every verb, every odd answer, over a running driver.

A claim is prepared and idle. For a while the API server gives odd answers about the claim, its node and its slices.
Afterwards the claim is as before, the slices are right, and all threads run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from gpuslice import connections
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimRef
from gpuslice.errors import ApiError, ConflictError, ExpiredError, LastingApiError, NotFoundError
from gpuslice.kube import Kube
from gpuslice.plugin.service import ClaimService
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.system.threads import ThreadWatch

from tests.kit.publishing import FAST
from tests.kit.rig import NODE
from tests.kit.running import DRIVER, World

HELD = "mig-1g-19-0"
STATUS = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": "odd", "details": {}}
CODES = (300, 400, 401, 403, 404, 409, 410, 422, 429, 500, 503)


def a_status(code: int, **more: object) -> bytes:
    return json.dumps(STATUS | {"code": code} | more).encode()


SUCCESS = json.dumps(STATUS | {"status": "Success", "code": 200}).encode()
OTHER = json.dumps(
    {"kind": "Pod", "metadata": {"name": "p", "namespace": "default", "uid": "u", "resourceVersion": "1"}}
)
ANSWERS: dict[str, tuple[int, bytes]] = {
    **{f"page {code}": (code, b"<html>odd</html>") for code in (200, *CODES)},
    **{f"empty {code}": (code, b"") for code in (200, *CODES)},
    **{f"status {code}": (code, a_status(code)) for code in CODES if code not in (401, 409, 410)},
    "status 404 of another": (404, a_status(404, details={"name": "other", "kind": "resourceclaims"})),
    "success": (200, SUCCESS),
    "nothing in it": (200, b"{}"),
    "null": (200, b"null"),
    "another object": (200, OTHER.encode()),
    "another list": (200, b'{"kind": "PodList", "metadata": {"resourceVersion": "1"}, "items": []}'),
    "nested": (200, b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "cut off": (200, OTHER[:-3].encode()),
    "no text": (200, b"\xff\xfe\x00"),
}


@dataclass(frozen=True, slots=True)
class Verb:
    """A verb of the API client: the form of its requests, for the stand-in, and the call."""

    method: str
    path: str
    call: Callable[[Kube, StandInApiServer], object]


def a_slice(server: StandInApiServer) -> dict[str, Any]:
    return server.all("resourceslices")[0]


VERBS = {
    "version": Verb("GET", "/version", lambda kube, _: kube.version()),
    "node": Verb("GET", "/nodes/", lambda kube, _: kube.node_uid(NODE)),
    "claim": Verb("GET", "/resourceclaims/", lambda kube, _: kube.claim("default", "idle")),
    "claims": Verb("GET", "/resourceclaims?", lambda kube, _: list(kube.claims())),
    "slices": Verb("GET", "resourceslices?limit", lambda kube, _: kube.resource_slices(DRIVER, NODE)),
    "watch": Verb("GET", "watch=true", lambda kube, _: list(kube.watch_resource_slices(DRIVER, NODE, "1000", 1))),
    "dry run": Verb("POST", "dryRun", lambda kube, api: kube.create_resource_slice(fresh(api), dry_run=True)),
    "create": Verb("POST", "/resourceslices", lambda kube, api: kube.create_resource_slice(fresh(api))),
    "update": Verb("PUT", "/resourceslices/", lambda kube, api: kube.update_resource_slice(a_slice(api))),
    "delete": Verb("DELETE", "/resourceslices/", lambda kube, api: deleted(kube, a_slice(api))),
}


def fresh(server: StandInApiServer) -> dict[str, Any]:
    return {"metadata": {"generateName": "x-"}, "spec": a_slice(server)["spec"]}


def deleted(kube: Kube, body: dict[str, Any]) -> None:
    meta = body["metadata"]
    kube.delete_resource_slice(meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"])


class Driver:
    """The claim side of `World`, and a controller that publishes for the same node."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world, self.api, self.threads = world, world.api, ThreadWatch()
        rig = world.rig
        self.kube = Kube(world.api.kubeconfig)
        self.controller = SliceController(
            kube=self.kube,
            driver=DRIVER,
            node=NODE,
            dynamic=rig.inventory,
            static=Inventory.of(rig.gpus, rig.policy, NODE, static=True),
            health=NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=rig.checkpoint, hung=dict),
            checkpoint=rig.checkpoint,
            folder=folder,
            backoff=replace(FAST, hopeless_s=0.05),
            threads=self.threads,
        )
        self.rounds = 0

    @property
    def service(self) -> ClaimService:
        return self.world.instances[0].service

    def settled(self) -> bool:
        """Whether the API has one good set of slices and the claim's device among them."""
        bodies = self.api.all("resourceslices")
        pools = [body["spec"]["pool"] for body in bodies]
        whole = len(bodies) == 4 and all(pool["resourceSliceCount"] == 2 for pool in pools)
        fields = {key for body in bodies for key in body["spec"]}
        return whole and HELD in devices(bodies) and "allNodes" not in fields and self.controller.problem() is None

    def disturb(self) -> None:
        """Give each verb of the publisher something to do."""
        self.rounds += 1
        bodies = self.api.all("resourceslices")
        for body in bodies:
            if "sharedCounters" in body["spec"]:  # the publisher creates it again
                self.api.delete("resourceslices", body["metadata"]["name"])
            else:  # the publisher updates it
                self.api.update("resourceslices", body | {"spec": body["spec"] | {"allNodes": True}})
        stray = {"metadata": {"name": f"stray-{self.rounds}"}, "spec": bodies[0]["spec"]}
        self.api.create("resourceslices", stray)  # the publisher deletes it
        self.api.become("1.36" if self.rounds % 2 else "1.37")  # the controller probes again


def devices(bodies: list[dict[str, Any]]) -> set[str]:
    return {device["name"] for body in bodies for device in body["spec"].get("devices", ())}


@pytest.fixture
async def driver(short: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Driver]:
    monkeypatch.setattr(connections, "_CALL_S", 0.2)
    async with World(short) as world:
        driver = Driver(world, short)
        driver.controller.start()
        await asyncio.to_thread(world.api.wait, driver.settled)
        yield driver
        world.api.release()
        driver.controller.stop()
        driver.kube.close()


def said_too_much(driver: Driver, verb: Verb) -> str:
    """The wrong conclusion of the API client from an answer that says nothing. "" if it only raises a plain ApiError."""
    try:
        if verb.call(driver.kube, driver.api) == []:
            return ""  # a watch that ended without an event
    except (NotFoundError, ConflictError, ExpiredError, LastingApiError) as e:
        return f"{type(e).__name__}: {e}"[:200]
    except ApiError:
        return ""
    except Exception as e:  # noqa: BLE001 - it would end a thread
        return f"{type(e).__name__}: {e}"[:200]
    return "an answer"


@pytest.mark.parametrize("name", list(VERBS))
async def test_the_door_concludes_nothing_from_an_odd_answer(driver: Driver, name: str) -> None:
    driver.controller.stop()
    driver.world.claim("idle", driver.world.device(HELD))
    verb, wrong = VERBS[name], dict[str, str]()
    for what, (status, data) in ANSWERS.items():
        if (name, what) == ("delete", "success"):
            continue  # here it is the right answer
        driver.api.answer(status, data, times=9, method=verb.method, path=verb.path)
        if found := await asyncio.to_thread(said_too_much, driver, verb):
            wrong[what] = found
        driver.api.release()
    for what, odd in {"byte by byte": driver.api.drip, "cut": driver.api.cut}.items():
        odd(9, method=verb.method, path=verb.path)
        if name != "watch" and (found := await asyncio.to_thread(said_too_much, driver, verb)):
            wrong[what] = found
        driver.api.release()

    assert wrong == {}


async def harm(driver: Driver, idle: ClaimRef, before: object, verb: Verb, odd: Callable[[], None]) -> list[str]:
    """The damage after a while of odd answers to this verb, one sentence each."""
    world, wrong = driver.world, []
    now = driver.rounds * 5000.0
    odd()
    driver.disturb()
    for at in (now, now + 601, now + 1300):
        await driver.service.collect(at)
    refused = (await world.prepare(idle)).error
    if "delete the pod" in refused or "delete this pod" in refused:
        wrong.append(f"advice to delete the pod: {refused}")
    if verb.path in ("/nodes/", "watch=true", "resourceslices?limit"):
        driver.api.away()
        odd()
        driver.api.back()
    if HELD not in devices(driver.api.all("resourceslices")):
        wrong.append("the device of the claim is no longer published")
    driver.api.release()
    if idle.uid not in world.rig.records() or not world.rig.partitions():
        wrong.append("the claim was collected")
    elif await world.prepare(idle) != before:
        wrong.append("the claim is another one")
    try:
        await asyncio.to_thread(driver.api.wait, driver.settled, 10)
    except TimeoutError:
        wrong.append(f"not published again: {driver.controller.problem()}")
    if problem := driver.threads.problem():
        wrong.append(f"a thread was lost: {problem}")
    if driver.controller.refused.done():
        wrong.append("the driver gave up")
    return wrong


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", [name for name in VERBS if name != "claims"])
async def test_odd_answers_leave_claim_slices_and_threads_as_they_were(driver: Driver, name: str) -> None:
    idle = driver.world.claim("idle", driver.world.device(HELD))
    before = await driver.world.must_prepare(idle)
    verb, wrong, tried = VERBS[name], dict[str, list[str]](), 0
    chosen = [
        what for what in ANSWERS if what.split()[-1] in ("200", "401", "404", "409", "422", "503") or "200" not in what
    ]
    odds: dict[str, Callable[[], None]] = {
        what: lambda what=what: driver.api.answer(*ANSWERS[what], times=3, method=verb.method, path=verb.path)  # type: ignore[misc]
        for what in chosen
        if not what.startswith(("empty", "page 3", "page 4", "page 5"))
    }
    odds |= {
        "byte by byte": lambda: driver.api.drip(2, method=verb.method, path=verb.path),
        "cut": lambda: driver.api.cut(4, method=verb.method, path=verb.path),
    }
    for what, odd in odds.items():
        tried += 1
        if found := await harm(driver, idle, before, verb, odd):
            wrong[what] = found

    assert wrong == {}
    assert tried >= 15


async def test_versions_that_go_back_leave_claim_slices_and_threads_as_they_were(driver: Driver) -> None:
    idle = driver.world.claim("idle", driver.world.device(HELD))
    before = await driver.world.must_prepare(idle)
    backup = driver.api.store.snapshot()

    def restore() -> None:
        driver.api.away()
        driver.api.store.restore(backup)
        driver.api.back()

    wrong = [await harm(driver, idle, before, VERBS["claim"], restore) for _ in range(3)]

    assert wrong == [[], [], []]
