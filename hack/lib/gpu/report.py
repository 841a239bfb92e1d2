"""`hack/gpu report`: the results of a run as a table for docs/on-a-gpu.md, and what the results prove."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hack.lib.gpu import results
from hack.lib.gpu.errors import GpuError
from hack.lib.gpu.results import LEFT_OUT, NO, YES, CheckResult

# The beginning of a line of docs/unproven.md → the checks that prove this line together.
PROVES = {
    "MPS: `-multiuser-server` with programs of several users": ("two users at once",),
    "`nvidia-smi` of the examples runs in the container": ("nvidia-smi of the driver runs in a container",),
}


def report(folder: Path) -> str:
    """GpuError if the folder has no results."""
    checks = results.read(folder)
    if not checks:
        raise GpuError(f"{folder} has no {results.FILE}; name the folder of the results of hack/gpu run")
    counts = {result: sum(check.result == result for check in checks) for result in (YES, NO, LEFT_OUT)}
    lines = [
        f"{len(checks)} checks: {counts[YES]} hold, {counts[NO]} do not, {counts[LEFT_OUT]} were left out.",
        "",
        "| stage | check | holds | seen |",
        "|---|---|---|---|",
        *(_row(check) for check in checks),
        "",
        *_proven(checks),
    ]
    return "\n".join(lines)


def _row(check: CheckResult) -> str:
    value = " ".join(check.value.replace("|", "/").split())
    return f"| {check.stage} | {check.name} | {check.result} | {value[:160]}{'…' if len(value) > 160 else ''} |"


def _proven(checks: Sequence[CheckResult]) -> Iterator[str]:
    held = {check.name for check in checks if check.result == YES}
    lines = [line for line, needed in PROVES.items() if held.issuperset(needed)]
    yield "Lines that may leave docs/unproven.md:" if lines else "No line of docs/unproven.md is proven by this run."
    yield from (f"* {line} …" for line in lines)
