"""One wrong value in a record, at any place, of any kind: only the claim itself may be refused, and no other claim
notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from gpuslice import node as node_module
from gpuslice import report
from gpuslice.config import Config
from gpuslice.core import codec, gpucodec
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import MIB, Claim, Settings
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import shape
from gpuslice.core.pools.pool import Features, PoolSlices, resource_slices
from gpuslice.core.record import PreparedClaim
from gpuslice.errors import DeviceError, DriverError, NotFoundError
from gpuslice.mps import control, daemon
from gpuslice.mps.paths import Paths
from gpuslice.mps.supervisor import Supervisor
from gpuslice.plugin.releases import Releases
from gpuslice.plugin.service import ClaimService
from gpuslice.publishing.node_health import NodeHealth

from tests.kit import mutation
from tests.kit.builders import a_gpu
from tests.kit.mps_node import MpsNode, a_node
from tests.kit.rig import Rig, a_claim, a_share

POLICY = Policy.parse(
    {
        "apiVersion": "gpuslice.dev/v1alpha1",
        "kind": "Policy",
        "default": {"timeslice": {"shares": 4, "interval": "short"}, "sharedPartitions": ["mps", "timeslice"]},
    }
)
GIB = 1024 * MIB


@dataclass(frozen=True)
class Case:
    """The claim whose record is edited, the claims beside it, and a later claim: devices as (name, card)."""

    victim: Callable[[Rig], Claim]
    others: Callable[[Rig], tuple[Claim, ...]]
    newcomer: str
    card: int = 0
    step: int = 4  # every fourth of the broken texts, because all have the same effect on other claims


def partitions(node: Rig) -> tuple[Claim, ...]:
    return a_claim("beside", node.device("mig-1g-19-1")), a_claim("elsewhere", node.device("gpu", 1))


def with_shares(device: str) -> Callable[[Rig], tuple[Claim, ...]]:
    """Two more shares of the victim's device, and a claim on the other card."""

    def others(node: Rig) -> tuple[Claim, ...]:
        sharers = [a_share(f"sharer-{n}", node.device(device), {"memory": 2 * GIB}) for n in range(2)]
        return (*sharers, a_claim("elsewhere", node.device("mig-1g-19-0", 1)))

    return others


CASES = {
    "partition": Case(lambda n: a_claim("victim", n.device("mig-1g-19-0")), partitions, "mig-1g-19-2", step=1),
    "two cards": Case(
        lambda n: a_claim("victim", n.device("mig-1g-19-0"), n.device("mig-2g-14-4"), n.device("mig-1g-19-3", 1)),
        lambda n: (a_claim("beside", n.device("mig-1g-19-1")), a_claim("there", n.device("mig-1g-19-0", 1))),
        "mig-1g-19-2",
    ),
    "whole card": Case(
        lambda n: a_share("victim", n.device("gpu"), settings=Settings("preferred", "long")),
        lambda n: (a_claim("elsewhere", n.device("mig-1g-19-0", 1)),),
        "mig-1g-19-1",
        1,
    ),
    "watcher": Case(lambda n: a_claim("victim", n.device("mig-1g-19-1"), admin=True), partitions, "mig-1g-19-2"),
    "time share": Case(
        lambda n: a_share("victim", n.device("timeslice"), {"memory": 2 * GIB, "shares": 1}),
        with_shares("timeslice"),
        "mig-1g-19-1",
        1,
    ),
    "time share of a partition": Case(
        lambda n: a_share("victim", n.device("mig-1g-19-0-timeslice"), {"memory": 2 * GIB, "shares": 1}),
        with_shares("mig-1g-19-0-timeslice"),
        "mig-1g-19-2",
    ),
    "MPS share of a partition": Case(
        lambda n: a_share("victim", n.device("mig-1g-19-0-mps"), {"memory": 2 * GIB, "smPercent": 10, "clients": 1}),
        with_shares("mig-1g-19-0-mps"),
        "mig-1g-19-2",
    ),
}


class Api:
    """The API server after the end of the victim's pod. The claims beside it keep their allocations."""

    def __init__(self, claims: tuple[Claim, ...]) -> None:
        self._claims = {claim.ref.name: claim for claim in claims}

    def claim(self, namespace: str, name: str) -> dict[str, object]:
        if name not in self._claims:
            raise NotFoundError("gone", 404)
        claim = self._claims[name]
        results = [
            {"driver": "gpuslice.dev", "request": a.request, "pool": a.device.pool, "device": a.device.device}
            for a in claim.allocations
        ]
        return {"metadata": {"uid": claim.ref.uid}, "status": {"allocation": {"devices": {"results": results}}}}


class Node:
    """A node that can return to its state after the prepares of its claims."""

    def __init__(self, folder: Path, case: Case) -> None:
        self.folder, self.case = folder, case
        rig = Rig(folder, policy=POLICY)
        self.others = case.others(rig)
        self.given = {claim.ref.uid: rig.prepare(claim) for claim in self.others}
        self.victim = case.victim(rig)
        rig.prepare(self.victim)
        self.newcomer = a_claim("newcomer", rig.device(case.newcomer, case.card))
        self.record = rig.checkpoint.folder / f"{self.victim.ref.uid}.json"
        self.body: Any = json.loads(self.record.read_text().splitlines()[-1])
        rig.nvml.close()
        for part in ("node", "claims", "cdi"):
            shutil.copytree(folder / part, folder / "kept" / part)

    def again(self) -> Rig:
        for part in ("node", "claims", "cdi"):
            shutil.rmtree(self.folder / part)
            shutil.copytree(self.folder / "kept" / part, self.folder / part)
        return Rig(self.folder, policy=POLICY)


def harm(node: Node, text: str) -> list[str]:
    """The harm to other claims in a new process that finds this text as the record of the victim."""
    node.again().nvml.close()
    node.record.write_text(text + "\n", encoding="utf-8", errors="surrogatepass")
    rig = Rig(node.folder, policy=POLICY)
    wrong: list[str] = []

    def trying(what: str, call: Callable[[], object]) -> object:
        try:
            return call()
        except Exception as e:  # noqa: BLE001 - each is a harm, whatever it is
            wrong.append(f"{what}: {type(e).__name__}: {e}"[:300])
            return None

    trying("a newcomer at once", partial(rig.prepare, node.newcomer))
    trying("the end of the newcomer", partial(rig.unprepare, node.newcomer))
    trying("the node's life", lambda: asyncio.run(life(rig, Api(node.others))))
    for uid, before in node.given.items():
        again = trying(f"prepare of {uid}", partial(rig.prepare, _of(node, uid)))
        if isinstance(again, PreparedClaim) and again != before:
            wrong.append(f"{uid} was given {again.devices}, and had {before.devices}")
    trying("a newcomer", lambda: rig.prepare(node.newcomer))
    health = NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=rig.checkpoint, hung=dict)
    taints = trying("the look at the node", lambda: health.look(rig.inventory))
    live = {gpu.uuid: rig.nvml.look(gpu.uuid) for gpu in rig.gpus}
    records = rig.checkpoint.records()
    trying("the report", lambda: report.node(rig.inventory, live, records.values(), taints or {}))  # type: ignore[arg-type]
    trying("the table", lambda: report.claims(records))
    for claim in (*node.others, node.newcomer):
        trying(f"unprepare of {claim.ref.uid}", partial(rig.unprepare, claim))
    _own_claim(rig, node.victim, wrong)
    rig.nvml.close()
    return wrong


def _of(node: Node, uid: str) -> Claim:
    return next(claim for claim in node.others if claim.ref.uid == uid)


def _own_claim(rig: Rig, victim: Claim, wrong: list[str]) -> None:
    """The claim itself may be refused, with a sentence."""
    for ask in (rig.ask, rig.unprepare):
        try:
            ask(victim)
        except DriverError:
            continue
        except Exception as e:  # noqa: BLE001 - anything else would end a thread or the process
            wrong.append(f"the claim itself: {type(e).__name__}: {e}"[:300])


async def life(rig: Rig, api: Api) -> None:
    """The process's own work: recovery at the start, the daemons, the collector until it counts a claim as gone."""
    with ThreadPoolExecutor(1) as executor:
        service = ClaimService(
            api=api, driver="gpuslice.dev", preparer=rig.preparer, releases=Releases(), executor=executor
        )
        await service.recover()
        await service.ensure_daemons()
        await service.mend()
        for now in (0.0, 700.0):
            await service.collect(now)
        await service.close(1)


@pytest.fixture
def node(request: pytest.FixtureRequest, short: Path) -> Iterator[Node]:
    supervisor = Supervisor(short / "mps", control.stand_in(short / "node"))
    supervisor.open()
    yield Node(short, CASES[request.param])
    supervisor.close()


LIVES = 1  # of a value that may be several things, such as a name, one of them is lived with
BROKEN = ("", "{", "[]", "{}", "null", '"x"', "\x00", "[" * 5_000 + "]" * 5_000, '{"format": 99}')


@pytest.mark.parametrize("node", list(CASES), indirect=True)
def test_no_value_of_a_record_harms_another_claim_or_ends_the_process(node: Node) -> None:
    """For other claims, a text that the reader refuses is the same as the `BROKEN` texts. So only accepted texts run."""
    before = codec.decode(node.body)
    harmed = {text[:20]: wrong for text in BROKEN[:: node.case.step] if (wrong := harm(node, text))}
    tried, read = 0, Counter[str]()

    for path, wrong_value, body in mutation.edits(node.body):
        tried += 1
        try:
            record = codec.decode(body)
        except ValueError:
            continue
        if record != before and read[path] < LIVES:
            read[path] += 1
            if wrong := harm(node, json.dumps(body)):
                harmed[f"{path} = {wrong_value}"] = wrong

    assert harmed == {}
    assert tried > 400
    assert read
    print(f"{tried} edits, {read.total()} lives")  # noqa: T201 - pytest -s shows the figures


# ---------------------------------------------------------------- what a supervisor leaves for the next one


def test_no_value_of_a_daemons_file_harms_another_daemon_or_ends_the_supervisor(short: Path, unmeasured: None) -> None:
    with a_node(short) as node:
        lived = live_with_a_daemons_file(node, Paths(node.root))
    assert lived >= 6


def live_with_a_daemons_file(node: MpsNode, paths: Paths) -> int:
    """Start a supervisor with each of several wrong texts of the file. Returns the number of texts."""
    supervisor = node.supervise_in_process()
    beside = node.client.ensure(node.daemon(1))
    node.client.ensure(node.daemon(0))
    record = paths.record("gpu-0")
    before, lives = daemon.left(paths, "gpu-0"), list[tuple[tuple[str | int, ...], object]]()
    text = record.read_text()

    for path in mutation.values(json.loads(text)):
        for wrong in mutation.WRONG:
            record.write_text(json.dumps(mutation.edited(json.loads(text), path, wrong)))
            with contextlib.suppress(DeviceError):
                if daemon.left(paths, "gpu-0") != before and path not in {known for known, _ in lives}:
                    lives.append((path, wrong))
    record.write_text(text)

    lives += [((), BROKEN[1]), (("daemon",), None)]  # these stand for all texts that a supervisor refuses to read
    for path, wrong in lives:
        body = json.loads(record.read_text())
        record.write_text(json.dumps(mutation.edited(body, path, wrong)) if path else str(wrong))
        supervisor = node.outlive(supervisor)
        assert beside in node.client.statuses(), f"{path} = {wrong!r}"
        mended = node.client.ensure(node.daemon(0))
        assert (mended.problem, node.daemons_of("gpu-0")) == ("", [mended.pid]), f"{path} = {wrong!r}"
    return len(lives)


# ---------------------------------------------------------------- the other files of the plugin's folder


@pytest.mark.parametrize("product", ["h100", "a100-40g", "l4"])
def test_no_value_of_the_cards_that_were_seen_last_takes_another_card_or_the_start(product: str) -> None:
    lost, here = a_gpu(product, 0), a_gpu("h100", 1)
    body = json.loads(json.dumps(gpucodec.encode([lost, here])))
    tried = 0

    assert gpucodec.decode(body) == (lost, here)
    for path, what, changed in mutation.edits(body[:1]):
        cards = (*gpucodec.decode(changed), *gpucodec.decode(body[1:]))
        assert here in cards, f"{path} = {what}"
        tried += 1
        for static in (False, True) if len(cards) > 1 else ():
            pools = Inventory.of(cards, POLICY, "node-1", static=static).pools
            assert here.uuid in {pool.gpu.uuid for pool in pools}, f"{path} = {what}"

    assert tried > 200


def test_no_value_of_the_shapes_is_published_as_no_shape(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    pools = resource_slices(
        rig.inventory, {}, driver="gpuslice.dev", features=Features(partitionable=True, consumable=True, taints=True)
    )
    small = [PoolSlices(pool.name, tuple({k: v[:2] for k, v in spec.items()} for spec in pool.specs)) for pool in pools]
    body = json.loads(json.dumps(shape.encode(small)))

    assert shape.decode(body) == {pool.name: pool for pool in small}
    for path, what, changed in mutation.edits(body):
        try:
            read = shape.decode(changed)
        except ValueError:
            continue
        for name, kept in read.items():
            for wanted in small:
                shape.allows(kept, wanted)
                shape.same(kept, wanted)
            assert shape.cordoned(kept, "gpuslice.dev").name == name, f"{path} = {what}"


def test_no_value_of_the_settings_of_the_driver_is_more_than_a_sentence(tmp_path: Path) -> None:
    config = Config(kubelet_plugins_directory_path=tmp_path)
    config.plugin_folder.mkdir()
    node_module.save_settings(replace(config, node_name="n", policy=tmp_path / "p", simulate="h100"))
    path = config.plugin_folder / "running.json"

    for _, _, changed in mutation.edits(json.loads(path.read_text())):
        path.write_text(json.dumps(changed))
        with contextlib.suppress(DriverError), node_module.snapshot(config):
            pass
