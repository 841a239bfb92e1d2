"""The values that a program has on /metrics (Prometheus' text format): totals, and quantiles from buckets."""

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
        """Only lines that begin with the name of one of the families, because an API server has 20,000 lines."""
        lines = "\n".join(line for line in text.splitlines() if line.startswith(families))
        found = _SAMPLE.finditer(lines)
        return cls([Sample(one[1], dict(_LABEL.findall(one[2] or "")), float(one[3])) for one in found])

    def total(self, name: str, **labels: str) -> float:
        """The sum over all label sets that match; 0 if none matches. A value may contain `*`."""
        return sum(sample.value for sample in self._matching(name, labels))

    def histogram(self, name: str, **labels: str) -> Histogram:
        """All label sets that match, as one histogram."""
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
    counts: Mapping[float, float]  # upper bound → observations up to it; cumulative, as in Prometheus
    sum: float
    count: float

    def since(self, earlier: Histogram) -> Histogram:
        """The observations since `earlier`. A label set that was not there yet counts as zeros."""
        counts = {bound: count - earlier.counts.get(bound, 0.0) for bound, count in self.counts.items()}
        return Histogram(counts, self.sum - earlier.sum, self.count - earlier.count)

    def mean(self) -> float:
        """ValueError without observations."""
        if not self.count:
            raise ValueError("a histogram without observations has no mean")
        return self.sum / self.count

    def quantile(self, q: float) -> float:
        """Interpolated within its bucket, like PromQL's histogram_quantile, so it is only as exact as the buckets.

        Observations above the last finite bound count as that bound. ValueError without observations.
        """
        if not self.count:
            raise ValueError("a histogram without observations has no quantiles")
        rank, lower, below = q * self.count, 0.0, 0.0
        for bound, count in sorted(self.counts.items()):
            if count >= rank and count > below:
                return lower if bound == float("inf") else lower + (bound - lower) * (rank - below) / (count - below)
            lower, below = (lower if bound == float("inf") else bound), count
        return lower
