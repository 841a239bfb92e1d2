"""The signs of the driver for an operator: logs with one `op=` id for each request, and metrics.

A log line is a plain sentence followed by key=value. Warning: someone should look soon. Error: something was refused or lost.
Metric names begin with `gpuslice_`; the `dra_` family belongs to the kubelet.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gpuslice.system import logs

_op: contextvars.ContextVar[str] = contextvars.ContextVar("op", default="-")
_numbers = itertools.count(1)


def _set_op(record: logging.LogRecord) -> bool:
    record.op = _op.get()
    return True


def setup_logging(level: str) -> None:
    """Log to standard error at `level` ("debug" … "error")."""
    logs.setup(level, "op={op} ", _set_op)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # our own sentences explain its retries
    logging.getLogger("asyncio").setLevel(logging.WARNING)


class Telemetry:
    """Counters and the timing of requests. One registry per instance, so that tests may build many."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "gpuslice_requests_total", "Requests by outcome.", ("operation", "result"), registry=self.registry
        )
        self._seconds = Histogram(
            "gpuslice_request_duration_seconds",
            "Time a request took, waiting included.",
            ("operation",),
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40),
            registry=self.registry,
        )
        self._inflight = Gauge(
            "gpuslice_requests_inflight", "Requests under way.", ("operation",), registry=self.registry
        )

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A metric whose value is read at each scrape."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, Callable[[], float]]) -> None:
        """Several values under one name, distinguished by a label."""
        family = Gauge(name, text, (label,), registry=self.registry)
        for key, value in values.items():
            family.labels(key).set_function(value)

    @contextlib.contextmanager
    def request(self, operation: str) -> Iterator[str]:
        """Time a request and give it an `op=` id. An exception counts as a failure and is raised again."""
        token = _op.set(f"{next(_numbers):x}")
        begin = time.monotonic()
        result = "error"
        self._inflight.labels(operation).inc()
        try:
            yield _op.get()
            result = "ok"
        finally:
            self._inflight.labels(operation).dec()
            self._requests.labels(operation, result).inc()
            self._seconds.labels(operation).observe(time.monotonic() - begin)
            _op.reset(token)
