"""`hack/bench`: measure, and show a table or JSON. What the figures mean: docs/performance.md."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from machine import Machine
from measures import Figures, Size, calls, hang, memory, mig, start
from shares import shares
from subject import BenchError, Subject, at_revision, here, with_byte_code

MEASURES: Mapping[str, Callable[[Subject, Size], Awaitable[Figures]]] = {
    "start": start,
    "calls": calls,
    "shares": shares,
    "mig": mig,
    "memory": memory,
    "hang": hang,
}
FULL = Size(rounds=3, calls=200, claims=1000)
QUICK = Size(rounds=1, calls=40, claims=200)


@dataclass(frozen=True, slots=True)
class Row:
    key: str
    text: str
    limit: float | None = None  # at most; None: for information

    @property
    def unit(self) -> str:
        unit = self.key.rsplit("_", 1)[-1]
        return {"mb": "MB", "ratio": "x"}.get(unit, unit)


def _call_rows() -> list[Row]:
    limits = {"prepare": 10.0, "prepare_eight": 40.0}
    rows = []
    for eight, how in (("", "one by one"), ("_eight", "eight at once, eight GPUs")):
        for call, verb in (("prepare", "NodePrepareResources"), ("unprepare", "NodeUnprepareResources")):
            for kind, what in (("card", "whole card"), ("mig", "MIG partition")):
                for percentile in ("p50", "p99"):
                    limit = limits.get(call + eight) if percentile == "p50" else None
                    key = f"{call}_{kind}{eight}_{percentile}_ms"
                    rows.append(Row(key, f"{verb}, {what}, {how}, {percentile}", limit))
    for kind, what in (("card", "whole card"), ("mig", "MIG partition")):
        rows.append(Row(f"cpu_{kind}_ms", f"CPU time of the driver for a claim's way, {what}"))
    return rows


ROWS = [
    Row("start_s", "exec to all slices of 8 GPUs stored", 1.0),
    *_call_rows(),
    Row("mps_first_p50_ms", "NodePrepareResources, a card's first MPS share, its daemon's start included, p50", 500.0),
    Row("mps_first_p99_ms", "NodePrepareResources, a card's first MPS share, its daemon's start included, p99"),
    Row("mps_share_p50_ms", "NodePrepareResources, each further MPS share, p50", 15.0),
    Row("mps_share_p99_ms", "NodePrepareResources, each further MPS share, p99"),
    Row("mps_share_back_p50_ms", "NodeUnprepareResources, an MPS share that is not the last, p50"),
    Row("timeslice_share_p50_ms", "NodePrepareResources, each further share by time, p50", 15.0),
    Row("timeslice_share_p99_ms", "NodePrepareResources, each further share by time, p99"),
    Row("timeslice_share_back_p50_ms", "NodeUnprepareResources, a share by time that is not the last, p50"),
    Row("mps_supervisor_mb", "resident memory of the MPS supervisor, eight daemons", 30.0),
    Row("mig_one_s", "one MIG creation, NVML taking its time"),
    Row("mig_eight_s", "eight MIG creations at once, eight GPUs, the same"),
    Row("mig_ratio", "eight MIG creations against one", 1.3),
    Row("rss_start_mb", "resident memory, 8 GPUs, at start"),
    Row("rss_100_mb", "resident memory after 100 claims"),
    Row("rss_end_mb", "resident memory after all claims", 75.0),
    Row("rss_peak_mb", "its peak"),
    Row("rss_growth_mb", "its growth since 100 claims", 1.0),
    Row("hang_get_info_ms", "slowest GetInfo while a prepare hangs in NVML", 1000.0),
    Row("hang_prepare_ms", "slowest prepare on another GPU, the same", 1000.0),
]

Rounds = dict[str, list[Figures]]  # one entry a round, by the subject's name


def main(arguments: Sequence[str] | None = None) -> int:
    """0 once everything was measured, targets reached or not; 1 with a sentence where it could not be."""
    options = _options(arguments)
    size = QUICK if options.quick else FULL
    size = Size(
        rounds=options.rounds or size.rounds, calls=options.calls or size.calls, claims=options.claims or size.claims
    )
    machine = Machine()
    try:
        with contextlib.ExitStack() as stack:
            subjects = [stack.enter_context(at_revision(options.vs))] if options.vs else []
            subjects.append(here())
            notes = with_byte_code(subjects)
            found = asyncio.run(_measured(subjects, options.only or list(MEASURES), size))
    except BenchError as e:
        print(f"hack/bench: {e}", file=sys.stderr)
        return 1
    report = _report(found, size, notes, machine)
    print(json.dumps(report, indent=1) if options.json else _table(report))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hack/bench", description="Measure the driver: driver overhead, simulated.")
    parser.add_argument("--quick", action="store_true", help="a short run, good for a first look")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--vs", metavar="REV", help="measure this git revision too, round by round beside this tree")
    parser.add_argument("--only", action="append", choices=list(MEASURES), help="this measure only; may be repeated")
    parser.add_argument(
        "--rounds", type=_positive, help=f"rounds of each measure ({FULL.rounds}, quick {QUICK.rounds})"
    )
    parser.add_argument("--calls", type=_positive, help=f"timed calls in a round ({FULL.calls}, quick {QUICK.calls})")
    parser.add_argument("--claims", type=_positive, help=f"claims for memory ({FULL.claims}, quick {QUICK.claims})")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


async def _measured(subjects: Sequence[Subject], names: Sequence[str], size: Size) -> Rounds:
    """All measures, the subjects taking turns within each round: what slows this machine down meets both."""
    found: Rounds = {subject.name: [{} for _ in range(size.rounds)] for subject in subjects}
    for subject in subjects:
        await start(subject, size)  # not counted: fills the page cache, and compiles libraries that were not
    for name in names:
        for number in range(size.rounds):
            print(f"{name}: round {number + 1} of {size.rounds}", file=sys.stderr)
            for subject in subjects if number % 2 else reversed(subjects):
                found[subject.name][number] |= await MEASURES[name](subject, size)
    return found


def _report(found: Rounds, size: Size, notes: list[str], machine: Machine) -> dict[str, object]:
    figures = []
    for row in ROWS:
        values = {name: [one[row.key] for one in rounds if row.key in one] for name, rounds in found.items()}
        if not all(values.values()):
            continue
        median = {name: statistics.median(numbers) for name, numbers in values.items()}
        latest = median[here().name]
        figures.append(
            {
                "key": row.key,
                "measure": row.text,
                "unit": row.unit,
                "limit": row.limit,
                "reached": None if row.limit is None else latest <= row.limit,
                "median": median,
                "rounds": values,
            }
        )
    sizes = {"rounds": size.rounds, "calls": size.calls, "claims": size.claims}
    return {
        "what": "driver overhead, simulated",
        "machine": machine.facts(),
        "size": sizes,
        "notes": notes,
        "figures": figures,
    }


def _table(report: Mapping[str, object]) -> str:
    figures, machine, size = report["figures"], report["machine"], report["size"]
    assert isinstance(figures, list) and isinstance(machine, dict) and isinstance(size, dict)
    names = list(figures[0]["median"]) if figures else []
    lines = [["measure", "target", *names, *(["change"] if len(names) == 2 else []), "rounds", "reached"]]
    for figure in figures:
        median, unit, limit = figure["median"], figure["unit"], figure["limit"]
        rounds = figure["rounds"][names[-1]]
        change = [f"{median[names[1]] - median[names[0]]:+.2f}"] if len(names) == 2 else []
        lines.append(
            [
                figure["measure"],
                "" if limit is None else f"<= {limit:g} {unit}",
                *(f"{median[name]:.2f} {unit}" for name in names),
                *change,
                f"{min(rounds):.2f}-{max(rounds):.2f}" if len(rounds) > 1 else "",
                {None: "", True: "yes", False: "NO"}[figure["reached"]],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    what = (
        f"{report['what']}: {machine['cpus']} CPUs, {machine['busy_with_others']} of them busy with others, Python "
        f"{machine['python']}; medians of {size['rounds']} round(s), {size['calls']} calls of a kind, "
        f"{size['claims']} claims"
    )
    notes = report["notes"]
    assert isinstance(notes, list)
    return "\n".join([*text, "", what, *notes])


if __name__ == "__main__":
    sys.exit(main())
