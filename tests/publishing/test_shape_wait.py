"""The requests of a pool that waits to change its shape, and the rule that no pool changes under a claim."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core.model import PoolName
from gpuslice.core.pools.pool import PoolSlices
from gpuslice.core.record import Record
from gpuslice.errors import ApiError
from gpuslice.kube import Kube
from gpuslice.publishing.shapes import Shapes
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.builders import a_policy
from tests.kit.publishing import DRIVER, a_controller, an_api_server
from tests.kit.rig import NODE, Rig, a_claim

POOLS = (PoolName(f"{NODE}/a"), PoolName(f"{NODE}/b"))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path / "api") as server:
        yield server


class Wait:
    """Pools that are published with the device `old` and wanted with the device `new`."""

    def __init__(self, server: StandInApiServer, folder: Path, *, taints: bool = True) -> None:
        self.server, self.taints = server, taints
        self.shapes = Shapes(folder / "shapes.json", Kube(server.kubeconfig), DRIVER, NODE)
        self.shapes.admit([self.pool(name, "old") for name in POOLS], [], taints=taints, published=True)
        server.requests.clear()

    def look(self, records: Sequence[Record] = (), *, published: bool = True) -> set[PoolName]:
        """The pools that keep their old shape, after one more look."""
        wanted = [self.pool(name, "new") for name in POOLS]
        admitted = self.shapes.admit(wanted, records, taints=self.taints, published=published)
        return {pool.name for pool in admitted if _device(pool)["name"] == "old"}

    def asked(self) -> list[str]:
        """The requests for claims so far: "list", or the name of the one claim."""
        paths = [request.target for request in self.server.requests if "resourceclaims" in request.target]
        return ["list" if "limit=" in path else path.rpartition("/")[2] for path in paths]

    @staticmethod
    def pool(name: PoolName, device: str) -> PoolSlices:
        return PoolSlices(name, ({"devices": [{"name": device}]},))


def _device(pool: PoolSlices) -> dict[str, Any]:
    devices: Any = pool.specs[0]["devices"]
    device: dict[str, Any] = devices[0]
    return device


def allocate(server: StandInApiServer, name: str, *pools: PoolName, tolerations: Sequence[object] = ()) -> None:
    """Create a claim that is allocated and never prepared."""
    results = [{"driver": DRIVER, "pool": pool, "device": "old", "request": "r"} for pool in pools]
    body = {
        "metadata": {"name": name},
        "spec": {"devices": {"requests": [{"name": "r", "exactly": {"tolerations": list(tolerations)}}]}},
        "status": {"allocation": {"devices": {"results": results}}},
    }
    server.create("resourceclaims", body, "default")


def deallocate(server: StandInApiServer, name: str) -> None:
    server.update("resourceclaims", server.get("resourceclaims", name, "default") | {"status": {}})


def delete(server: StandInApiServer, name: str) -> None:
    server.delete("resourceclaims", name, "default")


def create_again(server: StandInApiServer, name: str) -> None:
    delete(server, name)
    allocate(server, name)


def allocate_elsewhere(server: StandInApiServer, name: str) -> None:
    body = server.get("resourceclaims", name, "default")
    body["status"]["allocation"]["devices"]["results"][0]["pool"] = "another-node/a"
    server.update("resourceclaims", body)


def records(folder: Path, *pools: PoolName) -> list[Record]:
    """Records of the driver that hold these pools."""
    rig = Rig(folder / "rig", "h100x2")
    for number in range(len(pools)):
        rig.prepare(a_claim(f"prepared-{number}", rig.device("gpu", number)))
    return [_moved(record, pool) for record, pool in zip(rig.checkpoint.records().values(), pools, strict=True)]


def _moved(record: Record, pool: PoolName) -> Record:
    (grant,) = record.plan.grants
    device = replace(grant.allocation.device, pool=pool)
    grant = replace(grant, allocation=replace(grant.allocation, device=device))
    return replace(record, plan=replace(record.plan, grants=(grant,)))


def test_a_pool_that_our_own_records_hold_costs_no_request(server: StandInApiServer, tmp_path: Path) -> None:
    wait, held = Wait(server, tmp_path), records(tmp_path, *POOLS)

    for _ in range(20):
        assert wait.look(held) == set(POOLS)

    assert wait.asked() == []


def test_a_pool_whose_taints_are_not_in_force_costs_no_request(server: StandInApiServer, tmp_path: Path) -> None:
    wait = Wait(server, tmp_path)

    for _ in range(20):
        assert wait.look(published=False) == set(POOLS)

    assert wait.asked() == []
    assert wait.shapes.only_taints_awaited


def test_a_wait_costs_one_list_of_all_claims_however_many_leave_and_however_long_it_is(
    server: StandInApiServer, tmp_path: Path
) -> None:
    """Otherwise every node would list each half minute, and after each holder that leaves."""
    wait = Wait(server, tmp_path)
    for number in range(5):
        allocate(server, f"on-a-{number}", POOLS[0])
    prepared = records(tmp_path, POOLS[1])
    assert wait.look(prepared) == set(POOLS)
    assert wait.asked() == []

    for number in range(5):
        for _ in range(10):
            assert wait.look(prepared) == set(POOLS)
        delete(server, f"on-a-{number}")
    assert wait.look(prepared) == {POOLS[1]}
    assert wait.look([]) == set()

    assert wait.asked().count("list") == 1
    assert wait.asked()[0] == "list"
    assert not wait.look([]), "the wait is over"
    assert len(wait.asked()) < 70


def test_only_the_first_claim_that_still_holds_a_pool_is_asked_for(server: StandInApiServer, tmp_path: Path) -> None:
    wait = Wait(server, tmp_path)
    for name in ("one", "three", "two"):
        allocate(server, name, POOLS[0])
    wait.look()
    wait.look()
    server.requests.clear()

    for _ in range(3):
        wait.look()
    delete(server, "one")
    wait.look()

    assert wait.asked() == ["one", "one", "one", "one", "three"]


@pytest.mark.parametrize("leave", [deallocate, delete, create_again, allocate_elsewhere])
@pytest.mark.parametrize("taints", [True, False])
def test_no_pool_changes_its_shape_under_a_claim_that_was_never_prepared(
    server: StandInApiServer, tmp_path: Path, leave: Any, taints: bool
) -> None:
    wait = Wait(server, tmp_path, taints=taints)
    allocate(server, "waits", *POOLS)
    for _ in range(5):
        assert wait.look() == set(POOLS)

    leave(server, "waits")

    assert wait.look() == (set() if leave is not allocate_elsewhere else {POOLS[1]})


def test_no_answer_is_no_departure(server: StandInApiServer, tmp_path: Path) -> None:
    wait = Wait(server, tmp_path)
    allocate(server, "waits", POOLS[0])
    wait.look()
    assert wait.look() == {POOLS[0]}

    for status in (404, 500, 503):
        server.fail(status, path="resourceclaims/waits")
        with pytest.raises(ApiError):
            wait.look()

    assert wait.look() == {POOLS[0]}


@pytest.mark.parametrize("why", ["no taints", "tolerated"])
def test_where_new_holders_can_come_one_more_list_decides_when_the_known_ones_have_left(
    server: StandInApiServer, tmp_path: Path, why: str
) -> None:
    wait = Wait(server, tmp_path, taints=why != "no taints")
    tolerations = [{"operator": "Exists"}] if why == "tolerated" else []
    allocate(server, "first", *POOLS, tolerations=tolerations)
    for _ in range(10):
        assert wait.look() == set(POOLS)
    before = wait.asked().count("list")
    allocate(server, "second", *POOLS, tolerations=tolerations)
    delete(server, "first")
    for _ in range(10):
        assert wait.look() == set(POOLS), "it would have changed under the second claim"

    delete(server, "second")
    assert wait.look() == set()

    assert (before, wait.asked().count("list")) == (1, 3)


def test_the_taints_of_an_upgraded_cluster_count_once_they_are_in_force(
    server: StandInApiServer, tmp_path: Path
) -> None:
    """The pool has waited without taints. A list before the taints are in force may miss a later holder."""
    wait = Wait(server, tmp_path, taints=False)
    allocate(server, "first", *POOLS)
    assert wait.look() == set(POOLS)
    wait.taints = True
    server.requests.clear()

    assert wait.look() == set(POOLS)  # the plan with taints is not published yet
    assert wait.asked() == []
    allocate(server, "second", *POOLS)
    delete(server, "first")

    assert wait.look() == set(POOLS)


def test_the_taints_of_a_downgraded_cluster_keep_nobody_away(server: StandInApiServer, tmp_path: Path) -> None:
    wait = Wait(server, tmp_path)
    allocate(server, "first", *POOLS)
    wait.look()
    assert wait.look() == set(POOLS)
    wait.taints = False
    allocate(server, "second", *POOLS)
    delete(server, "first")

    assert wait.look() == set(POOLS)


def test_a_wait_that_ended_leaves_nothing_for_the_next_one(server: StandInApiServer, tmp_path: Path) -> None:
    wait = Wait(server, tmp_path)
    allocate(server, "old", *POOLS)
    wait.look()
    assert wait.look() == set(POOLS)
    old = [wait.pool(name, "old") for name in POOLS]
    wait.shapes.admit(old, [], taints=True, published=True)  # the old policy is back
    delete(server, "old")
    allocate(server, "new", *POOLS)

    wait.look()

    assert wait.look() == set(POOLS)


def test_a_running_driver_lists_all_claims_once_for_a_new_policy(
    server: StandInApiServer, short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with a_controller(server, Rig(short / "rig", "l4", a_policy(modes=["gpu", "mps"])), short):
        server.wait(lambda: _shown(server) > {"mps"})
    (pool,) = {body["spec"]["pool"]["name"] for body in server.all("resourceslices")}
    allocate(server, "waits", pool)
    server.requests.clear()

    with a_controller(server, Rig(short / "rig", "l4", a_policy(modes=["gpu"])), short) as controller:
        server.wait(lambda: any("resourceclaims" in request.target for request in server.requests))
        for _ in range(5):
            seen = len(server.requests)
            controller.nudge()
            server.wait(lambda seen=seen: any("claims/waits" in r.target for r in server.requests[seen:]))  # type: ignore[misc]
        assert "mps" in _shown(server)
        delete(server, "waits")
        controller.nudge()
        server.wait(lambda: "mps" not in _shown(server))

    assert sum("resourceclaims?" in request.target for request in server.requests) == 1


def _shown(server: StandInApiServer) -> set[str]:
    return {device["name"] for body in server.all("resourceslices") for device in body["spec"].get("devices", ())}
