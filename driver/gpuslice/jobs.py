"""The jobs of the driver's event loop, and how one of them ends the process: with an exit code and a sentence."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine

from gpuslice.errors import LastingApiError

log = logging.getLogger(__name__)

FAILED, API_REFUSES = 1, 4  # exit codes, as in `gpuslice --help`

Stop = asyncio.Future[tuple[int, str]]  # the exit code, and the reason


def call_in(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Make a call in the loop from another thread, which may live longer than the loop."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


async def guarded(job: Callable[[], Coroutine[None, None, str | None]], stop: Stop) -> None:
    """Run a background job. The process ends if the job fails or returns a reason, but not if it just finishes."""
    running = job()
    try:
        reason = await running
    except LastingApiError as e:
        end(stop, API_REFUSES, str(e))
        return
    except Exception as e:  # a bug, or a node without descriptors or memory: a new process is better than half a driver
        name = getattr(running, "__qualname__", "unnamed")
        if not isinstance(e, OSError):
            log.exception("a background job of the driver failed unexpectedly job=%s", name)
        reason = (
            f"background job {name} of the driver failed ({type(e).__name__}: {e}); "
            "the process ends, so that the kubelet starts a new one"
        )
    if reason:
        end(stop, FAILED, reason)


def end(stop: Stop, code: int, reason: str) -> None:
    if not stop.done():
        stop.set_result((code, reason))
