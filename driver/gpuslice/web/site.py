"""What is answered at which path."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gpuslice import __version__
from gpuslice.core.health import NodeLook
from gpuslice.web.server import Answer, Answers

Check = Callable[[], str | None]  # None: fine; else a sentence that says what is wrong

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
    """The page of this node. `survey` looks at the cards, and is called by one thread at once."""
    turn = threading.Lock()

    def first() -> Answer:
        from gpuslice.web.page import PageFacts, page  # loaded for the first person who asks, as a rule for nobody

        if not turn.acquire(timeout=_TURN_S):
            return Answer("a look at the cards takes long just now; load the page again\n", status=503)
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
