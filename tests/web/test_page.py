"""The page at `/` says what is so, and no text from outside becomes part of its HTML."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from gpuslice.core import health
from gpuslice.core.health import NodeLook
from gpuslice.core.model import MIB, ClaimRef, ClaimUid, LiveGpu, MigUuid, Placement, Taint
from gpuslice.core.record import Record
from gpuslice.mps import control
from gpuslice.mps.supervisor import Supervisor
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.web.html import Html, joined, tag
from gpuslice.web.page import PageFacts, page

from tests.kit.builders import a_gpu, a_policy, an_inventory
from tests.kit.rig import Rig, a_claim, a_share

GOLDEN = Path(__file__).parent.parent / "golden" / "pages" / "h100x8.html"
HOSTILE = "<script>alert(1)</script>\"'&\n\x1b[2K"


@pytest.fixture
def rig(short: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    numbers = iter(range(1, 1 << 20))  # every UUID that the simulated node draws is the next one of a count
    monkeypatch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers)))
    rig = Rig(short, "h100x8", a_policy(sharedPartitions=["mps", "timeslice"]))
    supervisor = Supervisor(short / "mps", control.stand_in(short / "node"))
    supervisor.open()
    yield rig
    supervisor.close()
    rig.nvml.close()


def survey(rig: Rig) -> NodeLook:
    return NodeHealth(nvml=rig.nvml, mps=rig.mps, checkpoint=rig.checkpoint, hung=dict).survey(rig.inventory)


def facts(look: NodeLook, *, unhealthy: str | None = None, unready: str | None = None) -> PageFacts:
    return PageFacts(
        node="node-1", version="0.1.0", time="2026-11-29 12:00:00 UTC", unhealthy=unhealthy, unready=unready, look=look
    )


def gib(number: int, **more: int) -> dict[str, int]:
    return {"memory": number * 1024 * MIB, **more}


def hold_something_of_every_kind(rig: Rig) -> None:
    """A card for each: whole and watched, partitions, MPS, time-slicing, shared partitions, foreign, lost, free."""
    rig.prepare(a_claim("training", rig.device("gpu", 0)))
    rig.prepare(a_claim("dashboard", rig.device("monitor", 0), rig.device("monitor", 1), admin=True))
    rig.prepare(a_claim("notebook", rig.device("mig-1g-19-6", 1)))
    rig.prepare(a_claim("batch", rig.device("mig-3g-9-0", 1)))
    rig.prepare(a_share("chat-a", rig.device("mps", 2), gib(10, smPercent=25, clients=2)))
    rig.prepare(a_share("chat-b", rig.device("mps", 2), gib(20, smPercent=50, clients=2)))
    rig.prepare(a_share("dev-a", rig.device("timeslice", 3), gib(8, shares=1)))
    rig.prepare(a_share("dev-b", rig.device("timeslice", 3), gib(16, shares=2)))
    rig.prepare(a_share("small-a", rig.device("mig-2g-14-0-mps", 4), gib(4, smPercent=25, clients=2)))
    rig.prepare(a_share("small-b", rig.device("mig-1g-15-6-timeslice", 4), gib(4, shares=1)))
    foreign = rig.gpus[5].uuid
    rig.nvml.set_mig_mode(foreign, True)
    rig.nvml.create_compute_instance(foreign, rig.nvml.create_gpu_instance(foreign, 14, Placement(2, 2)))
    rig.nvml.create_gpu_instance(foreign, 19, Placement(6, 1))
    rig.prepare(a_claim("unlucky", rig.device("mig-4g-5-0", 6)))
    rig.nvml.lose(rig.gpus[6].uuid)


def test_a_node_with_claims_of_every_mode_looks_as_the_golden_page(rig: Rig) -> None:
    hold_something_of_every_kind(rig)

    text = page(facts(survey(rig), unready="the kubelet has not asked yet"))

    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
        pytest.fail(f"{GOLDEN.name} was written anew; look at it and commit it")
    assert text.splitlines() == GOLDEN.read_text(encoding="utf-8").splitlines()


# ---------------------------------------------------------------- text from outside


class _Elements(HTMLParser):
    """Names of elements and attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names |= {tag, *(f"@{name}" for name, _ in attrs)}

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_no_text_from_outside_becomes_an_element(rig: Rig) -> None:
    """Names of claims and devices, reasons, products, UUIDs, the node's name and what the probes say."""
    hold_something_of_every_kind(rig)
    plain = survey(rig)
    before = _Elements(page(facts(plain, unready="x", unhealthy="y"))).names
    pools = tuple(replace(p, gpu=replace(p.gpu, product=HOSTILE, bus_id=HOSTILE)) for p in plain.inventory.pools)
    taints = {ref: tuple(replace(t, reason=HOSTILE) for t in found) for ref, found in plain.taints.items()}
    hostile = NodeLook(
        replace(plain.inventory, pools=pools),
        plain.live,
        {uid: _hostile(record) for uid, record in plain.records.items()},
        taints,
    )

    text = page(
        replace(facts(hostile, unready=HOSTILE, unhealthy=HOSTILE), node=HOSTILE, version=HOSTILE, time=HOSTILE)
    )

    seen = _Elements(text)
    assert seen.names == before
    assert sum(HOSTILE.partition("\n")[0] in part for part in seen.texts) > 30, "it is shown as text"
    assert "<script" not in text


def _hostile(record: Record) -> Record:
    ref = ClaimRef(HOSTILE, HOSTILE, ClaimUid(HOSTILE))
    grants = tuple(
        replace(g, allocation=replace(g.allocation, device=replace(g.allocation.device, device=HOSTILE)))
        for g in record.plan.grants
    )
    assert record.prepared is not None
    devices = tuple(replace(device, uuid=MigUuid(HOSTILE)) for device in record.prepared.devices)
    return replace(
        record,
        plan=replace(record.plan, ref=ref, grants=grants),
        prepared=replace(record.prepared, devices=devices),
    )


def test_only_finished_html_is_not_escaped() -> None:
    assert tag("td", "<b>", tag("b", "&"), title='"<') == '<td title="&quot;&lt;">&lt;b&gt;<b>&amp;</b></td>'
    assert joined("<", Html("<br>")) == "&lt;<br>"


# ---------------------------------------------------------------- facts


def test_a_card_that_cannot_be_read_shows_what_the_records_say(rig: Rig) -> None:
    rig.prepare(a_claim("one", rig.device("mig-3g-9-0", 0)))
    rig.nvml.lose(rig.gpus[0].uuid)

    text = page(facts(survey(rig)))

    assert "unreadable now" in text
    assert '<td colspan="4" class="held">3g.40gb</td>' in text
    assert "default/one" in text


def test_a_card_without_mig_is_one_cell_and_a_node_without_cards_is_a_page() -> None:
    inventory = an_inventory(a_gpu("l4"))
    live = {inventory.pools[0].gpu.uuid: LiveGpu(mig=False, mig_pending=False)}
    text = page(facts(NodeLook(inventory, live, {}, {})))

    assert "No claim holds anything of this card." in text
    assert '<table class="map"><tr><td>free</td></tr>' in text
    assert "0 cards" in page(facts(NodeLook(replace(inventory, pools=()), {}, {}, {})))


def test_what_cannot_be_used_is_said_once_a_card_with_its_reason() -> None:
    inventory = an_inventory(a_gpu("h100"))
    unwell = {inventory.pools[0].gpu.uuid: Taint("gpu", "hung", reason="it hangs")}
    taints = health.taints(inventory, {}, unwell, (), {})

    assert page(facts(NodeLook(inventory, {}, {}, taints))).count("devices unavailable now: it hangs") == 1
