"""What a program tells on /metrics (Prometheus' text format), as figures: totals, and quantiles out of buckets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Sample:
    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Exposition:
    samples: Sequence[Sample]

    @classmethod
    def of(cls, text: str, *families: str) -> Exposition:
        """Only what begins like one of the families: an API server has 20,000 lines."""
        lines = "\n".join(line for line in text.splitlines() if line.startswith(families))
        found = _SAMPLE.finditer(lines)
        return cls([Sample(one[1], dict(_LABEL.findall(one[2] or "")), float(one[3])) for one in found])

    def total(self, name: str, **labels: str) -> float:
        """The sum over all label sets that match, 0 where there is none. A value may have a `*` in it."""
        return sum(sample.value for sample in self._matching(name, labels))

    def histogram(self, name: str, **labels: str) -> Histogram:
        """All label sets that match, as one."""
        counts: dict[float, float] = {}
        for sample in self._matching(f"{name}_bucket", labels):
            bound = float(sample.labels["le"])
            counts[bound] = counts.get(bound, 0.0) + sample.value
        return Histogram(counts, self.total(f"{name}_sum", **labels), self.total(f"{name}_count", **labels))

    def _matching(self, name: str, labels: Mapping[str, str]) -> list[Sample]:
        return [
            sample
            for sample in self.samples
            if sample.name == name
            and all(fnmatchcase(sample.labels.get(label, ""), value) for label, value in labels.items())
        ]


@dataclass(frozen=True, slots=True)
class Histogram:
    counts: Mapping[float, float]  # upper bound → how many were at most that; cumulative, as Prometheus has it
    sum: float
    count: float

    def since(self, earlier: Histogram) -> Histogram:
        """What has been added. A label set that was not there yet counts as zeros."""
        counts = {bound: count - earlier.counts.get(bound, 0.0) for bound, count in self.counts.items()}
        return Histogram(counts, self.sum - earlier.sum, self.count - earlier.count)

    def mean(self) -> float:
        """ValueError where nothing was observed."""
        if not self.count:
            raise ValueError("a histogram without observations has no mean")
        return self.sum / self.count

    def quantile(self, q: float) -> float:
        """Interpolated within its bucket, as PromQL's histogram_quantile does it: no better than the buckets are.

        What lies above the last finite bound counts as that bound. ValueError where nothing was observed.
        """
        if not self.count:
            raise ValueError("a histogram without observations has no quantiles")
        rank, lower, below = q * self.count, 0.0, 0.0
        for bound, count in sorted(self.counts.items()):
            if count >= rank and count > below:
                return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / (count - below)
            lower, below = (lower if bound == float("inf") else bound), count
        return lower
