"""Threads that live as long as the process. If one ends by itself, its owner is called, because its work would stop
silently."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class ThreadWatch:
    """Starts threads, and names a thread that ended before `stopping`."""

    def __init__(self, ended: Callable[[str], object] = lambda _: None) -> None:
        """`ended` is called with a sentence, in the thread that ends."""
        self._ended = ended
        self._threads: set[threading.Thread] = set()
        self._stopping = False
        self._problem: str | None = None

    def start(self, name: str, body: Callable[[], object], *, over: Callable[[], bool] = lambda: False) -> None:
        """Run `body` in a daemon thread. The thread may end when `over` returns True."""
        thread = threading.Thread(target=self._run, args=(name, body, over), name=name, daemon=True)
        thread.start()
        if thread.is_alive():
            self._threads.add(thread)

    def problem(self) -> str | None:
        """A sentence with the thread that ended and the reason. None if all threads run."""
        return self._problem

    def alive(self) -> tuple[str, ...]:
        """The names of the threads that run."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        return tuple(sorted(thread.name for thread in self._threads))

    def stopping(self) -> None:
        """Call this before the threads are asked to end. From then on, the end of a thread is no problem."""
        self._stopping = True

    def join(self, timeout_s: float) -> None:
        """Wait for the end of each thread. A thread that hangs in a call is left behind."""
        for thread in tuple(self._threads):
            thread.join(timeout_s)

    def _run(self, name: str, body: Callable[[], object], over: Callable[[], bool]) -> None:
        why = "without an error"
        try:
            body()
        except BaseException as e:
            log.exception("thread %s failed", name)
            why = f"by {type(e).__name__}: {e}"
        if not (self._stopping or over()):
            self._problem = f"thread {name} ended {why}; the process ends, so that it is started again"
            self._ended(self._problem)
