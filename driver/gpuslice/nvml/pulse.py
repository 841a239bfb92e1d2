"""The call of NVML that a thread is in, and its start. Another thread reads both, to name a call that hangs."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Iterator


class Pulse:
    """When the calls of one thread last began or ended, and which call is under way."""

    def __init__(self) -> None:
        self.beat = time.monotonic()
        self.call = ""

    @contextlib.contextmanager
    def during(self, call: str) -> Iterator[None]:
        outer = self.call
        self.call, self.beat = call, time.monotonic()
        try:
            yield
        finally:
            self.call, self.beat = outer, time.monotonic()

    def listen(self, context: contextvars.Context) -> None:
        """Follow the calls in this context."""
        context.run(_pulse.set, self)


_pulse: contextvars.ContextVar[Pulse] = contextvars.ContextVar("pulse")


def during(call: str) -> contextlib.AbstractContextManager[None]:
    """Tell the pulse of this thread, if there is one, that this call is under way in the block."""
    pulse = _pulse.get(None)
    return contextlib.nullcontext() if pulse is None else pulse.during(call)
