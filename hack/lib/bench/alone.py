"""The driver with stand-ins for API server and kubelet: one revision, or two that take turns."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence

from hack.lib.bench.machine import MachineLoad
from hack.lib.bench.measures import Size, calls, hang, memory, mig, start
from hack.lib.bench.rows import ROWS
from hack.lib.bench.shares import shares
from hack.lib.bench.subject import Subject, at_revision, here, with_byte_code
from hack.lib.bench.table import Figures, Report, Rounds, figures

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


def run(options: argparse.Namespace) -> Report:
    """Measure what the options name. BenchError if a measurement fails."""
    size = QUICK if options.quick else FULL
    size = Size(
        rounds=options.rounds or size.rounds, calls=options.calls or size.calls, claims=options.claims or size.claims
    )
    machine = MachineLoad()
    with contextlib.ExitStack() as stack:
        subjects = [stack.enter_context(at_revision(options.vs))] if options.vs else []
        subjects.append(here())
        notes = with_byte_code(subjects)
        found = asyncio.run(_measure(subjects, options.only or list(MEASURES), size))
    return Report(
        what="driver overhead, simulated",
        machine=machine.facts(),
        size={"rounds": size.rounds, "calls": size.calls, "claims": size.claims},
        extent=f"{size.rounds} round(s), {size.calls} calls of a kind, {size.claims} claims",
        notes=notes,
        figures=figures(ROWS, found),
    )


async def _measure(subjects: Sequence[Subject], names: Sequence[str], size: Size) -> Rounds:
    """All measures. The subjects take turns in each round, so that a slow moment of this machine affects both."""
    found: Rounds = {subject.name: [{} for _ in range(size.rounds)] for subject in subjects}
    for subject in subjects:
        await start(subject, size)  # not counted: it fills the page cache and compiles libraries
    for name in names:
        for number in range(size.rounds):
            print(f"{name}: round {number + 1} of {size.rounds}", file=sys.stderr)
            for subject in subjects if number % 2 else reversed(subjects):
                found[subject.name][number] |= await MEASURES[name](subject, size)
    return found
