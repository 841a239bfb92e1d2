"""The driver's output stays the same, byte for byte: published slices, CDI files and records, for three kinds of node.

Each node is planned dynamically and statically, with every mode. The golden files were written by the code of commit
68236a9. A change of one is a change of format: name it in CHANGELOG.md, and remove the file to write it again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.core.model import MIB, Claim, DeviceRef
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools.pool import Features, resource_slices
from gpuslice.errors import DeviceError
from gpuslice.mps import control
from gpuslice.mps.supervisor import Supervisor

from tests.kit.builders import a_policy
from tests.kit.rig import Rig, a_claim, a_share

GOLDEN = Path(__file__).parent / "golden" / "nodes"
NODES = ("h100x8", "a100-40gx2+l4", "a100-40g:mig", "h200")
DYNAMIC = Features(partitionable=True, consumable=True, taints=True)
STATIC = Features(partitionable=False, consumable=False, taints=False)
PLANS: dict[str, tuple[Features, Policy]] = {
    "dynamic": (DYNAMIC, Policy.default()),
    "static": (STATIC, Policy.default()),
    "static-mps": (STATIC, a_policy(static={"mps": 4})),
    "static-timeslice": (STATIC, a_policy(static={"timeslice": 4})),
}
EVERYTHING = "everything"  # partitions shared in both ways, every suffix; for one card only, because it is long
PLANS_OF_ONE = PLANS | {EVERYTHING: (DYNAMIC, a_policy(sharedPartitions=["mps", "timeslice"], suffixes=["+me", "-me"]))}


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every UUID of the simulated node is the next number of a count."""
    numbers = iter(range(1, 1 << 20))
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers)))


@pytest.fixture(params=[*((node, plan) for node in NODES for plan in PLANS), ("h200", EVERYTHING)], ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    node, plan = request.param
    return node, plan


@pytest.fixture
def rig(case: tuple[str, str], short: Path) -> Iterator[Rig]:
    node, plan = case
    features, policy = PLANS_OF_ONE[plan]
    there = Rig(short, node, policy, static=not features.partitionable)
    supervisor = Supervisor(short / "mps", control.stand_in(short / "node"))
    supervisor.open()
    yield there
    supervisor.close()
    there.nvml.close()


def slices(rig: Rig, features: Features) -> Iterator[str]:
    for pool in resource_slices(rig.inventory, {}, driver="gpuslice.dev", features=features, held=frozenset()):
        yield f"pool {pool.name}"
        yield from (json.dumps(spec) for spec in pool.specs)


def one_of_each(rig: Rig) -> Iterator[DeviceRef]:
    """The first device of each kind on the node's first and last card."""
    seen = set()
    for pool in dict.fromkeys((rig.inventory.pools[0], rig.inventory.pools[-1])):
        for device in pool.devices:
            kind = (pool.name, device.ref.device.rpartition("-")[0] or device.ref.device, type(device.offer.sharing))
            if kind not in seen:
                seen.add(kind)
                yield device.ref


def claimed(ref: DeviceRef, sharing: str) -> Claim:
    if sharing in ("Mps", "TimeSlicing"):
        charged = {"memory": 4096 * MIB}
        return a_share(
            "one", ref, {**charged, "clients": 2, "smPercent": 25} if sharing == "Mps" else {**charged, "shares": 1}
        )
    return a_claim("one", ref, admin=sharing == "Monitor")


def prepared(rig: Rig) -> Iterator[str]:
    """Record and CDI file of a claim for each device. The claims are prepared and unprepared one after the other."""
    for ref in one_of_each(rig):
        offer = rig.inventory.offer(ref)
        assert offer is not None
        claim = claimed(ref, type(offer.sharing).__name__)
        yield f"claim {ref.pool}/{ref.device}"
        try:
            answer = rig.prepare(claim)
        except DeviceError:  # an A100 does not switch its MIG mode
            yield "refused"
            continue
        yield f"answer {[(d.request, d.device.pool, d.device.device, d.share_id, d.cdi_ids) for d in answer.devices]}"
        for path in sorted(path for name in ("claims", "cdi") for path in (rig.folder / name).rglob("*.json")):
            text = path.read_text(encoding="utf-8").replace(str(rig.folder), "<folder>")
            yield f"{path.relative_to(rig.folder)} {text}"
        rig.unprepare(claim)
    rig.assert_empty()


def test_slices_records_and_cdi_files_are_the_golden_ones(rig: Rig, case: tuple[str, str]) -> None:
    node, plan = case
    features, _ = PLANS_OF_ONE[plan]
    text = "".join(f"{line}\n" for line in (*slices(rig, features), *prepared(rig)))

    golden = GOLDEN / f"{node.replace(':', '-')}-{plan}.txt"
    if not golden.exists():
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
        pytest.fail(f"{golden.name} was written anew; look at it and commit it")
    assert text.splitlines() == golden.read_text(encoding="utf-8").splitlines()
