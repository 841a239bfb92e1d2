"""The cost of a fleet for the API server in each phase, as a report and as a table. Pure functions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"^(\w+)\{(.*)\} (\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_RESOURCES = ("resourceslices", "resourceclaims", "nodes")
_REQUESTS, _BYTES, _ETCD = (
    "apiserver_request_total",
    "apiserver_response_sizes_sum",
    "etcd_request_duration_seconds_count",
)
_ROWS = (
    ("list", "resourceslices"),
    ("watch", "resourceslices"),
    ("create", "resourceslices"),
    ("update", "resourceslices"),
    ("delete", "resourceslices"),
    ("list", "resourceclaims"),
    ("get", "resourceclaims"),
    ("get", "nodes"),
    ("get", "version"),
)

Usage = Counter[str]  # keys: "requests LIST resourceslices", "bytes LIST resourceslices", "etcd list resourceclaims"


@dataclass(frozen=True, slots=True)
class Stamp:
    """A request of the fleet, as its sender noted it: seconds of the wall clock, number of the node, verb, resource."""

    at: float
    node: int
    verb: str
    resource: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    name: str
    began: float  # seconds of the wall clock
    took_s: float | None  # until the fleet had published everything; None if the limit came first
    lasted_s: float  # until the figures were taken
    cpu_s: float  # processor time of the API server
    stamps: Sequence[Stamp]
    usage: Usage  # by all clients of the API server


def usage(text: str) -> Usage:
    """The figures of an API server (its /metrics) since its start, as far as they concern us."""
    found: Usage = Counter()
    for line in text.splitlines():
        if not line.startswith((_REQUESTS, _BYTES, _ETCD)) or (match := _LINE.match(line)) is None:
            continue
        labels = dict(_LABEL.findall(match[2]))
        resource = labels.get("resource") or labels.get("type", "").rpartition("/")[2]
        if resource not in _RESOURCES or labels.get("subresource"):
            continue
        kind = {_REQUESTS: "requests", _BYTES: "bytes"}.get(match[1], "etcd")
        verb = labels.get("operation", "") if kind == "etcd" else labels.get("verb", "")
        found[f"{kind} {verb} {resource}"] += round(float(match[3]))
    return found


def spent(before: Usage, after: Usage) -> Usage:
    """The usage in between. If a counter went back, the API server started again, and all of `after` counts."""
    again = any(after[key] < value for key, value in before.items())
    return after if again else after - before


def busiest(stamps: Iterable[Stamp]) -> int:
    """The number of requests in the busiest second."""
    return max(Counter(int(stamp.at) for stamp in stamps).values(), default=0)


def spread_s(stamps: Iterable[Stamp]) -> float:
    """The time from the first to the last request, without the first and the last twentieth of the requests."""
    times = sorted(stamp.at for stamp in stamps)
    cut = len(times) // 20
    return times[-1 - cut] - times[cut] if times else 0.0


def report(phases: Sequence[Phase], size: Mapping[str, object]) -> dict[str, Any]:
    return {"what": "publishers without kubelets", "size": dict(size), "phases": [_of(phase) for phase in phases]}


def _of(phase: Phase) -> dict[str, Any]:
    asked: dict[str, Any] = {}
    for verb, resource in sorted({(stamp.verb, stamp.resource) for stamp in phase.stamps}):
        stamps = [one for one in phase.stamps if (one.verb, one.resource) == (verb, resource)]
        asked[f"{verb} {resource}"] = {
            "requests": len(stamps),
            "busiest_second": busiest(stamps),
            "spread_s": spread_s(stamps),
        }
    return {
        "phase": phase.name,
        "took_s": phase.took_s,
        "lasted_s": phase.lasted_s,
        "api_server_cpu_s": phase.cpu_s,
        "requests": len(phase.stamps),
        "busiest_second": busiest(phase.stamps),
        "asked": asked,
        "api_server": dict(sorted(phase.usage.items())),
    }


def table(body: Mapping[str, Any]) -> str:
    phases, size = body["phases"], body["size"]
    lines = [["", *(phase["phase"] for phase in phases)]]
    lines.append(["until all is published", *(_until(phase) for phase in phases)])
    lines.append(["counted for", *(f"{phase['lasted_s']:.0f} s" for phase in phases)])
    lines.append(["API server CPU", *(f"{phase['api_server_cpu_s']:.1f} s" for phase in phases)])
    lines.append(["requests of the fleet", *(str(phase["requests"]) for phase in phases)])
    lines.append(["in the busiest second", *(str(phase["busiest_second"]) for phase in phases)])
    for verb, resource in _ROWS:
        lines.append([f"{verb} {resource}", *(_asked(phase, f"{verb} {resource}") for phase in phases)])
    for resource in ("resourceslices", "resourceclaims"):
        key = f"LIST {resource}"
        lines.append([f"bytes of {key}", *(_megabytes(phase, f"bytes {key}") for phase in phases)])
        lines.append([f"etcd lists of {resource}", *(str(_etcd(phase["api_server"], resource)) for phase in phases)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    what = (
        f"{body['what']}: {size['nodes']} of {size['cards']}, {size['claims']} claims, outage of {size['outage_s']} s"
    )
    return "\n".join([*text, "", what, "a/b: a requests, b of them in the busiest second; creates: dry runs too"])


def _until(phase: Mapping[str, Any]) -> str:
    return f"not in {phase['lasted_s']:.0f} s" if phase["took_s"] is None else f"{phase['took_s']:.0f} s"


def _asked(phase: Mapping[str, Any], key: str) -> str:
    found = phase["asked"].get(key)
    return "" if found is None else f"{found['requests']}/{found['busiest_second']} in {found['spread_s']:.0f} s"


def _megabytes(phase: Mapping[str, Any], key: str) -> str:
    return f"{phase['api_server'].get(key, 0) / 1e6:.1f} MB"


def _etcd(usage: Mapping[str, int], resource: str) -> int:
    return sum(count for key, count in usage.items() if key.startswith("etcd list") and key.endswith(resource))
