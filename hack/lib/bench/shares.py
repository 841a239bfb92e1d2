"""MPS and time-slicing shares: the first share of a card, each further share, and the memory of the supervisor."""

from __future__ import annotations

from collections.abc import Mapping

from hack.lib.bench.measures import Bench, Size, driver_bench, percentiles, resident_mb
from hack.lib.bench.subject import Subject
from hack.lib.bench.table import Figures

BY_MPS: Mapping[str, str] = {"type": "mps", "profile": ""}
BY_TIME: Mapping[str, str] = {"type": "timeslice", "profile": ""}


async def shares(subject: Subject, size: Size) -> Figures:
    """A card's first MPS share starts its daemon (the stand-in, a separate Python program); the start is part of the
    time. Then shares come and go while one share stays. The supervisor's memory is read with a daemon on each of eight
    cards."""
    figures: Figures = {}
    async with driver_bench(subject, supervised=True) as bench:
        by_mps = bench.allocations(BY_MPS)
        first = [bench.claim(gpu, device) for gpu, device in enumerate(by_mps)]
        took = [await bench.prepare(ref) for ref in first]
        figures |= percentiles("mps_first", took) | {"mps_supervisor_mb": resident_mb(bench.cluster.supervisors[0].pid)}
        for ref in first[1:]:
            await bench.unprepare(ref)
        figures |= await _further(bench, "mps", by_mps[0], size)
        await bench.unprepare(first[0])
        by_time = bench.allocations(BY_TIME)
        stays = bench.claim(0, by_time[0])
        await bench.prepare(stays)
        figures |= await _further(bench, "timeslice", by_time[0], size)
        await bench.unprepare(stays)
    return figures


async def _further(bench: Bench, name: str, device: Mapping[str, object], size: Size) -> Figures:
    times = []
    for number in range(size.calls):
        ref = bench.claim(100 + number, device)
        times.append((await bench.prepare(ref), await bench.unprepare(ref)))
    return percentiles(f"{name}_share", [one for one, _ in times]) | percentiles(
        f"{name}_share_back", [one for _, one in times]
    )
