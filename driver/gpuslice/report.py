"""What a person sees of a node: each GPU with a map of its memory slices, its claims, and its free devices. Text only."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gpuslice.core import occupancy, share
from gpuslice.core.health import Taints
from gpuslice.core.inventory import Inventory, Pool
from gpuslice.core.model import (
    MIB,
    ClaimUid,
    Exclusive,
    Gpu,
    GpuUuid,
    LiveGpu,
    MigSlice,
    Monitor,
    Mps,
    TimeSlicing,
    WholeGpu,
)
from gpuslice.core.policy.rules import Policy
from gpuslice.core.record import Grant, Record

_CELL = 9
_MARGIN = 10  # columns before the map
_CUT = "…"
_NO_BREAK = "\xa0"
_TOGETHER = re.compile(r"\S+ at \d+ places|MIG (on|off)|no MIG|\d+ MiB|GPU \d+")  # not divided at the end of a line
_SHARED = {Exclusive: "", Monitor: "", Mps: " by MPS", TimeSlicing: " by time-slicing"}


def node(
    inventory: Inventory,
    live: Mapping[GpuUuid, LiveGpu],
    records: Iterable[Record],
    taints: Taints,
    columns: int | None = None,
) -> str:
    """Every GPU of the node, with its map, its offers and its holders. With `columns`, lines are at most so wide."""
    known = tuple(records)
    return "\n\n".join(gpu_report(pool, live.get(pool.gpu.uuid), known, taints, columns) for pool in inventory.pools)


def gpu_report(
    pool: Pool, live: LiveGpu | None, records: Sequence[Record], taints: Taints, columns: int | None = None
) -> str:
    gpu = pool.gpu
    grants = [(record, grant) for record in records for grant in record.plan.grants if grant.gpu == gpu.uuid]
    lines = (
        [_title(gpu, live)] if columns is None else [*_wrapped(_title(gpu, live, ""), columns), f"  uuid    {gpu.uuid}"]
    )
    lines += memory_map(pool, live, [grant for _, grant in grants], records, columns)
    rest = [f"  offers  {offers(pool)}"]
    rest += [f"  {_holding(record, grant)}" for record, grant in grants] or ["  free"]
    rest += [f"  unavailable now: {reason}" for reason in reasons(pool, taints)]
    return "\n".join([*lines, *(line for text in rest for line in _wrapped(text, columns))])


def offered(dynamic: Inventory, static: Inventory, policy: Policy, columns: int) -> str:
    """What each GPU would offer under this policy, with the part of the policy that counts for it."""
    cards = []
    for pool, cut in zip(dynamic.pools, static.pools, strict=True):
        gpu = pool.gpu
        title = f"GPU {gpu.index}  {gpu.product}  {gpu.memory_bytes // MIB} MiB  as {policy.path(gpu)} says"
        lines = [title, f"  offers  {offers(pool)}", f"  on Kubernetes 1.34 and 1.35  {offers(cut)}"]
        cards.append("\n".join(line for text in lines for line in _wrapped(text, columns)))
    return "\n\n".join(cards)


def mode(gpu: Gpu, live: LiveGpu | None) -> str:
    return "unreadable now" if live is None else f"MIG {'on' if live.mig else 'off'}" if gpu.profiles else "no MIG"


def reasons(pool: Pool, taints: Taints) -> list[str]:
    """Why devices of this card are unavailable now, each reason once."""
    return sorted({taint.reason for device in pool.devices for taint in taints.get(device.ref, ())})


def memory_map(
    pool: Pool,
    live: LiveGpu | None,
    grants: Sequence[Grant],
    records: Sequence[Record],
    columns: int | None = None,
) -> list[str]:
    """The card's memory slices in order, each below its number, with what occupies them."""
    gpu = pool.gpu
    whole = occupancy.whole(grants)
    text = (share.usage(whole) or "whole card") if whole else ""
    if not gpu.profiles:
        return [f"  memory  [{(text or '.').center(4 * _CELL)}]"]
    width = occupancy.width(gpu)
    cell, margin = _CELL, _MARGIN
    if columns is not None:
        margin = _MARGIN - 2  # eight slices of nine columns each then fit 80
        cell = max(4, min(_CELL, (columns - margin) // width))
    if whole:
        return _ruled(width, [(0, width, text)], cell, margin)
    blocks = occupancy.blocks(gpu, live, grants, records) if live is not None else ()
    return _ruled(
        width, [(b.start, b.size, f"{b.name} {share.usage(b.grants)}".rstrip()) for b in blocks], cell, margin
    )


_HEAD = ("CLAIM", "UID", "STATE", "REQUEST", "DEVICE", "SHARE", "UUID")
_NARROW = ("CLAIM", "STATE", "DEVICE", "SHARE")


def claims(records: Mapping[ClaimUid, Record], columns: int | None = None) -> str:
    """Every prepared claim with its devices, as a table with one line per device. With `columns`, only the main columns."""
    rows = [row for _, record in sorted(records.items(), key=lambda item: item[1].plan.ref) for row in _rows(record)]
    if not rows:
        return "no claim is prepared on this node"
    if columns is None:
        return table([_HEAD, *([row[name] for name in _HEAD] for row in rows)])
    for row in rows:
        row["DEVICE"] = row["DEVICE"].partition("/")[2] or row["DEVICE"]  # without the name of this node
    return table(_fitting([_NARROW, *([row[name] for name in _NARROW] for row in rows)], columns))


def state(record: Record) -> str:
    return "prepared" if record.prepared else "incomplete"


def _rows(record: Record) -> list[dict[str, str]]:
    ref = record.plan.ref
    common = {"CLAIM": f"{ref.namespace}/{ref.name}", "UID": ref.uid, "STATE": state(record)}
    made = record.prepared.devices if record.prepared else ()
    rows = []
    for number, grant in enumerate(record.plan.grants):
        allocation = grant.allocation
        own = {"REQUEST": allocation.request, "DEVICE": str(allocation.device), "SHARE": share.describe(grant) or "-"}
        rows.append({**common, **own, "UUID": made[number].uuid if number < len(made) else "-"})
    return rows or [{**common, **dict.fromkeys(("REQUEST", "DEVICE", "SHARE", "UUID"), "-")}]


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = _widths(rows)
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]


def _fitting(rows: Sequence[Sequence[str]], columns: int) -> list[list[str]]:
    """The same rows. Cells of the widest column are cut in the middle until each line fits."""
    widths = _widths(rows)
    while sum(widths) + 2 * (len(widths) - 1) > columns:
        widths[widths.index(max(widths))] -= 1
    return [[_cut(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}{_CUT}{text[len(text) - tail :]}"


def _title(gpu: Gpu, live: LiveGpu | None, uuid: str | None = None) -> str:
    shown = gpu.uuid if uuid is None else uuid
    facts = [f"GPU {gpu.index}", gpu.product, f"{gpu.memory_bytes // MIB} MiB", gpu.bus_id, mode(gpu, live), shown]
    return "  ".join(filter(None, facts))


def _wrapped(text: str, columns: int | None) -> list[str]:
    """The text in lines. Names are not broken, so that they can be copied."""
    if columns is None or len(text) <= columns:
        return [text]
    whole = _TOGETHER.sub(lambda match: match[0].replace(" ", _NO_BREAK), text)
    indent = " " * _MARGIN
    lines = textwrap.wrap(whole, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return [line.replace(_NO_BREAK, " ") for line in lines]


def _ruled(width: int, blocks: Iterable[tuple[int, int, str]], cell: int, margin: int) -> list[str]:
    ruler = "".join(str(number).center(cell) for number in range(width))
    cells = [f"[{'.'.center(cell - 2)}]"] * width
    for start, size, name in blocks:
        room = size * cell - 2
        fits = name if len(name) <= room else _short(name, room)
        cells[start : start + size] = [f"[{fits.center(room)}]", *[""] * (size - 1)]
    return [f"{' ' * margin}{ruler}".rstrip(), f"{'  memory'.ljust(margin)}{''.join(cells)}"]


def _short(name: str, room: int) -> str:
    """As much of a block's name as there is room for. For a profile's name, first the number of compute slices."""
    profile = name.partition(" ")[0]
    return profile if len(profile) <= room else name[:room] if room > len("1g.10gb") else profile.partition(".")[0]


def offers(pool: Pool) -> str:
    """What claims can get of this card, in the order of the scheduler."""
    counts: Counter[str] = Counter()
    for device in pool.devices:
        match device.offer.slice_:
            case MigSlice(profile=profile):
                counts[f"{profile.name}{_SHARED[type(device.offer.sharing)]}"] += 1
            case WholeGpu():
                counts[device.ref.device] += 1
    return (
        ", ".join(name if number == 1 else f"{name} at {number} places" for name, number in counts.items()) or "nothing"
    )


def _holding(record: Record, grant: Grant) -> str:
    verb = "monitored by" if isinstance(grant.sharing, Monitor) else "held by"
    state = "" if record.prepared else " (incomplete)"
    what = f"{grant.allocation.device.device}{state}"
    return f"{verb} {record.plan.ref.namespace}/{record.plan.ref.name} as {what} {share.describe(grant)}".rstrip()
