"""The figures of all rounds as a report, and the report as a table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from hack.lib.scale.measure import WHOLE, Figure, RequestKind

BASELINE = "whole GPUs only"
OURS = "our driver"
TARGET = 0.5  # part of the baseline's pods per second

Found = dict[tuple[str, RequestKind], list[Figure]]  # by published slices and kind of request; one figure per round


def report(found: Mapping[tuple[str, RequestKind], Sequence[Figure]], size: Mapping[str, object]) -> dict[str, Any]:
    """Medians over the rounds. A ratio compares a figure with the baseline of the same round."""
    base = found[BASELINE, WHOLE]
    rows = []
    for (published, kind), figures in found.items():
        ratios = [one.pods_per_s / other.pods_per_s for one, other in zip(figures, base, strict=True)]
        ratio = statistics.median(ratios)
        rows.append(
            {
                "published": published,
                "request": kind.text,
                "pods_per_s": statistics.median(one.pods_per_s for one in figures),
                "scheduler_cpu_ms": statistics.median(one.cpu_ms for one in figures),
                "ratio": ratio,
                "target": None if published == BASELINE else TARGET,
                "reached": None if published == BASELINE else ratio >= TARGET,
                "rounds": [{"pods_per_s": one.pods_per_s, "scheduler_cpu_ms": one.cpu_ms} for one in figures],
                "ratios": ratios,
            }
        )
    return {"what": "the scheduler on nodes without kubelets", "size": dict(size), "figures": rows}


def table(body: Mapping[str, Any]) -> str:
    lines = [["published", "request", "pods/s", "scheduler CPU a pod", "ratio", "rounds", "target", "reached"]]
    lines += map(_line, body["figures"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    size = body["size"]
    what = (
        f"{body['what']}: {size['nodes']} of {size['cards']}, {size['pods']} pods of a kind, {size['rounds']} round(s)"
    )
    return "\n".join([*text, "", what])


def _line(row: Mapping[str, Any]) -> list[str]:
    return [
        row["published"],
        row["request"],
        f"{row['pods_per_s']:.1f}",
        f"{row['scheduler_cpu_ms']:.1f} ms",
        f"{row['ratio']:.2f}",
        f"{min(row['ratios']):.2f}-{max(row['ratios']):.2f}" if len(row["ratios"]) > 1 else "",
        "" if row["target"] is None else f">= {row['target']:g}",
        {None: "", True: "yes", False: "NO"}[row["reached"]],
    ]
