"""The paths of the HTTP port and their answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gpuslice import __version__
from gpuslice.core.health import NodeLook
from gpuslice.web.server import Answer, Answers

Check = Callable[[], str | None]  # None: no problem; otherwise a sentence about the problem

_METRICS = "text/plain; version=0.0.4; charset=utf-8"
_TURN_S = 5.0


def public(*, metrics: Callable[[], bytes], healthy: Check, ready: Check) -> Answers:
    """The answer for every client. It has no names of claims."""
    return {
        "/metrics": lambda: Answer(metrics(), _METRICS),
        "/healthz": lambda: _probe(healthy),
        "/readyz": lambda: _probe(ready),
    }


def private(*, node: str, survey: Callable[[], NodeLook], healthy: Check, ready: Check) -> Answers:
    """The page of this node. `survey` looks at the cards. Only one thread at a time calls it."""
    turn = threading.Lock()

    def first() -> Answer:
        from gpuslice.web.page import PageFacts, page  # most processes never need it

        if not turn.acquire(timeout=_TURN_S):
            return Answer("a look at the cards takes long now; load the page again later\n", status=503)
        try:
            look = survey()
        finally:
            turn.release()
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        facts = PageFacts(node=node, version=__version__, time=now, unhealthy=healthy(), unready=ready(), look=look)
        return Answer(page(facts), "text/html; charset=utf-8")

    return {"/": first}


def _probe(check: Check) -> Answer:
    wrong = check()
    return Answer(f"{wrong or 'ok'}\n", status=503 if wrong else 200)
