"""The results, as a report for machines and as a table for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_UNITS = {"mb": "MB", "ratio": "x", "count": "", "rate": "pods/s"}

Figures = dict[str, float]  # of one round, by a row's key
Rounds = dict[str, list[Figures]]  # one entry per round, by subject; targets are for the last subject


@dataclass(frozen=True, slots=True)
class Row:
    key: str  # ends in its unit
    text: str
    limit: float | None = None  # upper limit; None: for information

    @property
    def unit(self) -> str:
        unit = self.key.rsplit("_", 1)[-1]
        return _UNITS.get(unit, unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    what: str
    size: Mapping[str, float]  # how much was measured
    extent: str  # the same, as text for people
    machine: Mapping[str, object]
    notes: Sequence[str]
    figures: Sequence[Mapping[str, object]]

    def values(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("what", "machine", "size", "notes", "figures")}


def figures(rows: Sequence[Row], found: Rounds) -> list[Mapping[str, object]]:
    """The measured rows, with the median of their rounds."""
    rows_found: list[Mapping[str, object]] = []
    for row in rows:
        values = {name: [one[row.key] for one in rounds if row.key in one] for name, rounds in found.items()}
        if not all(values.values()):
            continue
        median = {name: statistics.median(numbers) for name, numbers in values.items()}
        latest = [*median.values()][-1]
        rows_found.append(
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
    return rows_found


def table(report: Report) -> str:
    names = list(report.figures[0]["median"]) if report.figures else []  # type: ignore[call-overload]
    lines = [["measure", "target", *names, *(["change"] if len(names) == 2 else []), "rounds", "reached"]]
    lines += [_line(figure, names) for figure in report.figures]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    what = (
        f"{report.what}: {report.machine['cpus']} CPUs, {report.machine['busy_with_others']} of them busy with others, "
        f"Python {report.machine['python']}; medians of {report.extent}"
    )
    return "\n".join([*text, "", what, *report.notes])


def _line(figure: Mapping[str, object], names: Sequence[str]) -> list[str]:
    median, rounds, unit, limit = figure["median"], figure["rounds"], figure["unit"], figure["limit"]
    assert isinstance(median, dict) and isinstance(rounds, dict)
    latest = rounds[names[-1]]
    return [
        str(figure["measure"]),
        "" if limit is None else f"<= {limit:g} {unit}".rstrip(),
        *(f"{median[name]:.2f} {unit}".rstrip() for name in names),
        *([f"{median[names[1]] - median[names[0]]:+.2f}"] if len(names) == 2 else []),
        f"{min(latest):.2f}-{max(latest):.2f}" if len(latest) > 1 else "",
        {None: "", True: "yes", False: "NO"}[figure["reached"]],  # type: ignore[index]
    ]
