"""`python -m tests.kit.dead_thread run …`: the command, with one thread that dies as it starts. A planted fault.

DEAD names the thread. With SURVIVE set, the process does not end of it, so that its probes can be asked.
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
