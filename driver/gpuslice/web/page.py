"""The page at `/`: the health of the node, the use of its cards, the claims. A pure function of facts, without scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gpuslice import report
from gpuslice.core import occupancy, share
from gpuslice.core.health import NodeLook, Taints
from gpuslice.core.inventory import Pool
from gpuslice.core.model import MIB, Gpu, LiveGpu
from gpuslice.core.record import Grant, Record
from gpuslice.web.html import Html, joined, tag

_STYLE = Html("""
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2933; background: #fff; max-width: 70rem; margin: 1.5rem auto }
body { padding: 0 1rem } h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 }
th, td { text-align: left; vertical-align: top; padding: .2rem .6rem; border-bottom: 1px solid #d9e2ec }
td:first-child { overflow-wrap: anywhere } .facts { color: #627d98; margin: 0 }
.map { table-layout: fixed } .map th, .map td { text-align: center; border: 2px solid #fff; color: #627d98 }
.map th { font-weight: normal; padding: 0 } .map td { border-radius: 6px; padding: .4rem .2rem; background: #f0f4f8 }
.map td.held { background: #bae3ff; color: #003e6b } .map td.shared { background: #c6f7e2; color: #014d40 }
.map td.unheld, .map td.foreign { background: #ffe8d9; color: #610316 } .map small { display: block }
.well { color: #014d40 } .wrong { color: #ab091e; font-weight: bold }
""")

_LEGEND = "the memory slices of each card, by number; blue: one claim, green: shared by claims, red: no claim of ours"


@dataclass(frozen=True, slots=True, kw_only=True)
class PageFacts:
    node: str
    version: str
    time: str  # of the look
    unhealthy: str | None  # the answer of /healthz; None: healthy
    unready: str | None  # the answer of /readyz; None: ready
    look: NodeLook


def page(facts: PageFacts) -> str:
    """The whole document."""
    records = tuple(sorted(facts.look.records.values(), key=lambda record: record.plan.ref))
    title = f"gpuslice on {facts.node}"
    head = joined(
        tag("title", title), Html('<meta name="viewport" content="width=device-width">'), tag("style", _STYLE)
    )
    cards = (_card(pool, facts.look, records) for pool in facts.look.inventory.pools)
    body = joined(tag("h1", title), _health(facts, records), *cards)
    return f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{head}</head>\n<body>{body}</body></html>\n'


def _health(facts: PageFacts, records: Sequence[Record]) -> Html:
    cards = len(facts.look.inventory.pools)
    incomplete = sum(record.prepared is None for record in records)
    links = joined(*_between(" · ", (tag("a", path, href=path) for path in ("/metrics", "/healthz", "/readyz"))))
    rows = (
        ("Driver", _verdict(facts.unhealthy, "answers the kubelet")),
        ("Ready", _verdict(facts.unready, "the kubelet knows the driver, and the API shows what this node offers")),
        ("Node", joined(f"{_count(cards, 'card')}, {_count(len(records), 'claim')}, {incomplete} incomplete")),
        ("Map", joined(_LEGEND)),
        ("As of", joined(f"{facts.time}, gpuslice {facts.version}; load the page again to update it")),
        ("More", links),
    )
    return tag("table", *(tag("tr", tag("th", name), tag("td", text)) for name, text in rows))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _verdict(wrong: str | None, well: str) -> Html:
    return tag("span", wrong, class_="wrong") if wrong else tag("span", well, class_="well")


def _card(pool: Pool, look: NodeLook, records: Sequence[Record]) -> Html:
    gpu, live = pool.gpu, look.live.get(pool.gpu.uuid)
    held = [(record, number) for record in records for number, g in enumerate(record.plan.grants) if g.gpu == gpu.uuid]
    return joined(
        tag("h2", f"GPU {gpu.index} · {gpu.product} · {gpu.memory_bytes // MIB} MiB · {report.mode(gpu, live)}"),
        tag("p", f"{gpu.bus_id} · ", tag("code", gpu.uuid), class_="facts"),
        _map(gpu, live, [record.plan.grants[number] for record, number in held], records),
        _holders(held),
        *(tag("p", sentence, class_="wrong") for sentence in _tainted(pool, look.taints)),
    )


def _tainted(pool: Pool, taints: Taints) -> Iterator[str]:
    counts = Counter(reason for device in pool.devices for reason in {t.reason for t in taints.get(device.ref, ())})
    for reason, number in sorted(counts.items()):
        yield f"{number} of {_count(len(pool.devices), 'device')} unavailable now: {reason}"


# ---------------------------------------------------------------- the map


def _map(gpu: Gpu, live: LiveGpu | None, grants: Sequence[Grant], records: Sequence[Record]) -> Html:
    """The card's memory slices in order, each below its number, with what occupies them. One cell for a card without
    slices."""
    width, whole = occupancy.width(gpu), occupancy.whole(grants)
    if whole:
        cells = {0: (width, _cell("whole card", whole, width))}
    else:
        seen = occupancy.recorded_blocks(gpu, grants) if live is None else occupancy.blocks(gpu, live, grants, records)
        cells = {b.start: (b.size, _cell(b.name, b.grants, b.size, foreign=b.marked)) for b in seen}
    row, at = [], 0
    while at < width:
        size, cell = cells.get(at, (1, tag("td", "free" if live is not None else "not known")))
        row.append(cell)
        at += max(1, size)
    numbers = tag("tr", *(tag("th", str(number)) for number in range(width))) if gpu.profiles else Html()
    return tag("table", numbers, tag("tr", *row), class_="map")


def _cell(name: str, grants: Sequence[Grant], size: int, *, foreign: bool = False) -> Html:
    used = share.usage(grants)
    look = "foreign" if foreign else "shared" if used else "held" if grants else "unheld"
    return tag("td", name, *([tag("small", used)] if used else []), colspan=size, class_=look)


# ---------------------------------------------------------------- holders


def _holders(held: Sequence[tuple[Record, int]]) -> Html:
    if not held:
        return tag("p", "No claim holds anything of this card.", class_="facts")
    head = tag("tr", *(tag("th", name) for name in ("Claim", "Device", "Use", "Share", "UUID")))
    return tag("table", head, *(_holder(record, number) for record, number in held))


def _holder(record: Record, number: int) -> Html:
    grant, ref = record.plan.grants[number], record.plan.ref
    uuid = record.prepared.devices[number].uuid if record.prepared else "incomplete"
    use = share.mode(grant.sharing, grant.slot)
    cells = (f"{ref.namespace}/{ref.name}", grant.allocation.device.device, use, share.describe(grant) or "–", uuid)
    return tag("tr", *(tag("td", cell) for cell in cells))


def _between(text: str, parts: Iterable[Html]) -> Iterator[str]:
    for number, part in enumerate(parts):
        if number:
            yield text
        yield part
