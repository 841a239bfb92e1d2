"""What a person sees of a node: each GPU with a map of its memory slices, its claims, and what is free. Text only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from gpuslice.core import plan, share
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
    MigSlot,
    Monitor,
    Mps,
    Partition,
    TimeSlicing,
    WholeGpu,
)
from gpuslice.core.record import Grant, Record

_CELL = 9
_SHARED = {Exclusive: "", Monitor: "", Mps: " by MPS", TimeSlicing: " by time-slicing"}


def node(
    inventory: Inventory,
    live: Mapping[GpuUuid, LiveGpu],
    records: Iterable[Record],
    taints: Taints,
) -> str:
    """Every GPU of the node, with its map, its offers and its holders."""
    known = tuple(records)
    return "\n\n".join(gpu_report(pool, live.get(pool.gpu.uuid), known, taints) for pool in inventory.pools)


def gpu_report(pool: Pool, live: LiveGpu | None, records: Sequence[Record], taints: Taints) -> str:
    gpu = pool.gpu
    mode = "unreadable now" if live is None else f"MIG {'on' if live.mig else 'off'}" if gpu.profiles else "no MIG"
    lines = [f"GPU {gpu.index}  {gpu.product}  {gpu.memory_bytes // MIB} MiB  {gpu.bus_id}  {mode}  {gpu.uuid}"]
    grants = [(record, grant) for record in records for grant in record.plan.grants if grant.gpu == gpu.uuid]
    lines += memory_map(pool, live, [grant for _, grant in grants], records)
    lines.append(f"  offers  {_offers(pool)}")
    lines += [f"  {_holding(record, grant)}" for record, grant in grants] or ["  free"]
    lines += [
        f"  unavailable now: {reason}"
        for reason in sorted({t.reason for d in pool.devices for t in taints.get(d.ref, ())})
    ]
    return "\n".join(lines)


def memory_map(pool: Pool, live: LiveGpu | None, grants: Sequence[Grant], records: Sequence[Record]) -> list[str]:
    """The card's memory slices in order, each under its number, with what occupies them."""
    gpu = pool.gpu
    whole = [grant for grant in grants if grant.slot is None and not isinstance(grant.sharing, Monitor)]
    text = (share.usage(whole) or "whole card") if whole else ""
    if not gpu.profiles:
        return [f"  memory  [{(text or '.').center(4 * _CELL)}]"]
    width = max(place.start + place.size for profile in gpu.profiles for place in profile.placements)
    if whole:
        return _ruled(width, [(0, width, text)])
    foreign = () if live is None else plan.foreign_partitions(gpu.uuid, live, records)
    return _ruled(width, [_block(gpu, p, p in foreign, grants) for p in (live.partitions if live is not None else ())])


def _block(gpu: Gpu, partition: Partition, foreign: bool, grants: Sequence[Grant]) -> tuple[int, int, str]:
    place = partition.placement
    slot = MigSlot(gpu.uuid, partition.profile, place)
    profile = gpu.profile(partition.profile)
    name = profile.name if profile is not None else f"profile {partition.profile}"
    mark = " (foreign)" if foreign else "" if partition.uuid else " (incomplete)"
    shared = share.usage([grant for grant in grants if grant.slot == slot])
    return place.start, place.size, f"{name}{mark} {shared}".rstrip()


def claims(records: Mapping[ClaimUid, Record]) -> str:
    """Every prepared claim with its devices, one line a device, as a table."""
    rows = [("CLAIM", "UID", "STATE", "REQUEST", "DEVICE", "SHARE", "UUID")]
    for uid, record in sorted(records.items(), key=lambda item: item[1].plan.ref):
        ref = record.plan.ref
        state = "prepared" if record.prepared else "incomplete"
        made = record.prepared.devices if record.prepared else ()
        for number, grant in enumerate(record.plan.grants):
            found = made[number].uuid if made else "-"
            what = f"{grant.allocation.device}"
            rows.append(
                (
                    f"{ref.namespace}/{ref.name}",
                    uid,
                    state,
                    grant.allocation.request,
                    what,
                    share.describe(grant) or "-",
                    found,
                )
            )
        if not record.plan.grants:
            rows.append((f"{ref.namespace}/{ref.name}", uid, state, "-", "-", "-", "-"))
    return table(rows) if len(rows) > 1 else "no claim is prepared on this node"


def table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _ruled(width: int, blocks: Iterable[tuple[int, int, str]]) -> list[str]:
    ruler = "".join(str(number).center(_CELL) for number in range(width))
    cells = [f"[{'.'.center(_CELL - 2)}]"] * width
    for start, size, name in blocks:
        room = size * _CELL - 2
        cells[start : start + size] = [f"[{name[:room].center(room)}]", *[""] * (size - 1)]
    return [f"          {ruler}".rstrip(), f"  memory  {''.join(cells)}"]


def _offers(pool: Pool) -> str:
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
