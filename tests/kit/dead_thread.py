"""`python -m tests.kit.dead_thread run …`: the command with a planted fault: one thread dies at its start.

DEAD names the thread. With SURVIVE the process stays alive, so that a test can call its probes.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from gpuslice import app, cli
from gpuslice.system.threads import ThreadWatch

_start = ThreadWatch.start


def start(
    self: ThreadWatch, name: str, body: Callable[[], object], *, over: Callable[[], bool] = lambda: False
) -> None:
    _start(self, name, dies if name == os.environ["DEAD"] else body, over=over)


def dies() -> None:
    raise ValueError("planted")


if __name__ == "__main__":
    ThreadWatch.start = start  # type: ignore[method-assign]
    if "SURVIVE" in os.environ:
        setattr(app, "call_in", lambda *_: None)  # noqa: B010 - it is no part of what the module offers
    cli.main()
