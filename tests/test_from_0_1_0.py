"""Today's driver on a node of release 0.1.0: its files are frozen in tests/golden/0.1.0, and its README says how."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from gpuslice.core.model import ClaimRef
from gpuslice.mps.client import MpsClient
from gpuslice.standin.cluster import DRIVER, NODE, StandInCluster
from gpuslice.standin.scheduler import Request

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden/0.1.0"
COMMIT = "68236a9"
NODES = ("apart", "shared")  # between them a claim of each mode


@dataclass
class OldNode:
    """A cluster with the files of 0.1.0 in their places. `refs` and `answers` are by the name of the claim."""

    cluster: StandInCluster
    refs: dict[str, ClaimRef]
    answers: dict[str, list[dict[str, Any]]]
    slices: list[dict[str, Any]]

    @property
    def plugin(self) -> Path:
        return self.cluster.plugins / DRIVER

    def record(self, claim: str) -> Path:
        (found,) = self.plugin.glob(f"claims/*/{self.refs[claim].uid}.json")
        return found

    def devices(self, claim: str) -> object:
        """What the CDI file of the claim gives to a container."""
        return json.loads((self.cluster.cdi / f"{DRIVER}-claim_{self.refs[claim].uid}.json").read_text())["devices"]


async def restored(cluster: StandInCluster, name: str) -> OldNode:
    """Put the files into the folder of the cluster, and the objects into its API server. The API server gives its objects
    new UIDs, and the folder has another name, so the texts get these."""
    frozen = GOLDEN / name
    text = (frozen / "api.json").read_text(encoding="utf-8")
    seen = json.loads(text)
    names = {seen["folder"]: str(cluster.folder)}
    refs = {}
    for body in seen["claims"]:
        meta = body["metadata"]
        status = body.pop("status")
        made = cluster.api.create("resourceclaims", body, meta["namespace"])
        cluster.api.update("resourceclaims", {**made, "status": status})
        names[meta["uid"]] = made["metadata"]["uid"]
        refs[meta["name"]] = ClaimRef(meta["namespace"], meta["name"], made["metadata"]["uid"])
    (owner,) = {body["metadata"]["ownerReferences"][0]["uid"] for body in seen["slices"]}
    names[owner] = cluster.api.get("nodes", NODE)["metadata"]["uid"]
    seen = json.loads(replaced(text, names))
    for body in seen["slices"]:
        cluster.api.create("resourceslices", body)
    for folder, target in ((frozen / "plugin", cluster.plugins / DRIVER), (frozen / "cdi", cluster.cdi)):
        copy(folder, target, names)
    for empty in ("cues", "events"):  # git keeps no empty folders
        (cluster.node_folder / empty).mkdir()
    return OldNode(cluster, refs, seen["answers"], seen["slices"])


def copy(folder: Path, target: Path, names: dict[str, str]) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            there = target / replaced(str(path.relative_to(folder)), names)
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_text(replaced(path.read_text(encoding="utf-8"), names), encoding="utf-8")
            shutil.copymode(path, there)


def replaced(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        text = text.replace(old, new)
    return text


@pytest.fixture
async def node(short: Path, request: pytest.FixtureRequest) -> AsyncIterator[OldNode]:
    async with StandInCluster(short) as cluster:
        found = await restored(cluster, request.param)
        if request.param == "shared":
            await cluster.supervise()
        await cluster.start()
        yield found


@pytest.mark.parametrize("node", NODES, indirect=True)
async def test_claims_that_0_1_0_prepared_get_the_same_devices_again_and_leave_nothing(node: OldNode) -> None:
    before = {claim: node.devices(claim) for claim in node.refs}

    answers = {claim: await prepared(node.cluster, ref) for claim, ref in node.refs.items()}
    assert answers == node.answers
    assert {claim: node.devices(claim) for claim in node.refs} == before

    for ref in node.refs.values():
        await node.cluster.end(ref)
    assert_free(node)


@pytest.mark.parametrize("node", NODES, indirect=True)
async def test_a_record_of_today_has_the_text_that_0_1_0_wrote(node: OldNode) -> None:
    """So 0.1.0 reads it after a rollback. A partition has a new UUID, and the MIG mode of its card is on already."""
    before = {claim: lasting(node.record(claim)) for claim in node.refs}

    assert set((await node.cluster.kubelet.unprepare(node.refs.values())).values()) == {""}
    for ref in node.refs.values():
        await prepared(node.cluster, ref)

    assert {claim: lasting(node.record(claim)) for claim in node.refs} == before


@pytest.mark.parametrize("node", NODES[:1], indirect=True)
async def test_every_device_that_0_1_0_published_is_published_still(node: OldNode) -> None:
    """Claims name their devices. A device that is not published any more cannot be prepared again."""
    assert names(node.slices) <= names(node.cluster.api.all("resourceslices"))


def names(slices: list[dict[str, Any]]) -> set[tuple[str, str]]:
    specs = [body["spec"] for body in slices]
    return {(spec["pool"]["name"], device["name"]) for spec in specs for device in spec.get("devices", ())}


def lasting(record: Path) -> str:
    """The last state in a record, without what differs between two prepares of one claim."""
    body = json.loads(record.read_text(encoding="utf-8").splitlines()[-1])
    body["steps"] = [step for step in body["steps"] if step["do"] != "setMigMode"]
    return re.sub("MIG-[0-9a-f-]{36}", "MIG-…", json.dumps(body))


async def prepared(cluster: StandInCluster, ref: ClaimRef) -> list[dict[str, Any]]:
    answer = (await cluster.kubelet.prepare([ref]))[ref.uid]
    assert not answer.error
    return [{"pool": found.pool, "device": found.device, "cdi": list(found.cdi_ids)} for found in answer.devices]


def assert_free(node: OldNode) -> None:
    assert [*node.plugin.glob("claims/*/*.json")] == []
    assert [*node.cluster.cdi.iterdir()] == []
    for path in node.cluster.node_folder.glob("gpu?.json"):
        state = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        assert (state["partitions"], state["computeMode"], state["timeSlice"]) == ([], 0, 0)


# ---------------------------------------------------------------- the values of the chart


def test_every_value_of_the_chart_of_0_1_0_is_there_still_with_the_same_default() -> None:
    """If this must change, docs/upgrade.md has to say what a user of 0.1.0 does."""
    old, new = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (GOLDEN / "values.yaml", ROOT / "deploy/chart/values.yaml")
    )

    assert {key: value for key, value in flat(old).items() if flat(new).get(key) != value} == {}


def flat(body: object, path: str = "") -> dict[str, object]:
    """ "image.tag" → its value, for all values. Lists are values."""
    if not isinstance(body, dict) or not body:
        return {path: body}
    return {key: value for name, part in body.items() for key, value in flat(part, f"{path}.{name}").items()}


# ---------------------------------------------------------------- beside processes of 0.1.0


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m driver` is the driver of 0.1.0, and `python -m gpuslice` today's."""
    archive = subprocess.run(["git", "archive", COMMIT, "driver"], cwd=ROOT, capture_output=True, check=False)
    if archive.returncode:
        pytest.skip(f"this clone has no commit {COMMIT}, so the driver of 0.1.0 cannot be started")
    subprocess.run(["tar", "-x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT / 'driver'}")


OLD, NEW = "driver", "gpuslice"


def wanted(node: str) -> dict[str, dict[str, Any]]:
    """The claims of the frozen node."""
    return dict(runpy.run_path(str(GOLDEN / "make.py"))["NODES"][node])


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(("before", "after"), [(OLD, NEW), (NEW, OLD)], ids=["upgrade", "rollback"])
@pytest.mark.parametrize("node", NODES)
async def test_a_driver_of_the_other_release_serves_what_was_prepared_and_the_supervisor_stays(
    short: Path, node: str, before: str, after: str
) -> None:
    async with StandInCluster(short) as cluster:
        cluster.module = before
        await cluster.supervise()
        driver = await cluster.start()
        refs = [
            cluster.claim(claim, Request(name="gpu", driver=DRIVER, **asked)) for claim, asked in wanted(node).items()
        ]
        answers = [await prepared(cluster, ref) for ref in refs]
        daemons = MpsClient(cluster.mps).statuses()
        await driver.terminate()
        for path in cluster.node_folder.glob("gpu?.json"):  # the simulator of 0.1.0 takes one state only
            path.write_text(path.read_text(encoding="utf-8").splitlines()[-1])

        cluster.module = after
        await cluster.start()

        assert [await prepared(cluster, ref) for ref in refs] == answers
        assert MpsClient(cluster.mps).statuses() == daemons
        for ref in refs:
            await cluster.end(ref)
        assert_free(OldNode(cluster, {}, {}, []))
        assert MpsClient(cluster.mps).statuses() == ()
