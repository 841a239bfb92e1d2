"""Branch coverage by room, from the data of `hack/test --coverage`. The least covered room comes first."""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import coverage

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ROOT / "driver" / "gpuslice"
_KEPT = ROOT / ".coverage" / "report.json"


@dataclass(frozen=True, slots=True)
class Room:
    """A folder of the product, or its top. `points`: statements and branches. `taken`: those that a test has reached."""

    name: str
    points: int
    taken: int

    @property
    def percent(self) -> float:
        return 100 * self.taken / self.points if self.points else 100.0


def rooms(files: Mapping[str, Mapping[str, int]]) -> list[Room]:
    """Rooms from the summaries of files in coverage's JSON report, the least covered first."""
    points: collections.Counter[str] = collections.Counter()
    taken: collections.Counter[str] = collections.Counter()
    for file, summary in files.items():
        room = str(Path(file).parent)
        points[room] += summary["num_statements"] + summary["num_branches"]
        taken[room] += summary["covered_lines"] + summary["covered_branches"]
    return sorted((Room(name, points[name], taken[name]) for name in points), key=lambda room: room.percent)


def table(found: Iterable[Room]) -> str:
    """One line per room, and one for all rooms."""
    known = list(found)
    everything = Room("all", sum(room.points for room in known), sum(room.taken for room in known))
    lines = [f"{room.name:<24}{room.points:>8}{room.percent:>8.1f} %" for room in (*known, everything)]
    return "\n".join([f"{'room':<24}{'points':>8}{'taken':>10}", *lines])


def main() -> int:
    """Combine the data of all processes, print the table, and write coverage's own report beside the data."""
    measured = coverage.Coverage()
    measured.combine(strict=True)
    measured.save()
    measured.json_report(outfile=str(_KEPT))
    files = json.loads(_KEPT.read_text(encoding="utf-8"))["files"]
    named = {str((ROOT / file).relative_to(PRODUCT)): body["summary"] for file, body in files.items()}
    print(table(rooms(named)))
    print("each file: .venv/bin/coverage report --show-missing --skip-covered")
    return 0


if __name__ == "__main__":
    sys.exit(main())
