"""Threads that must not end unnoticed. Without the watch, what such a thread does would just not happen any more."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class ThreadWatch:
    """Starts threads, and says which of them ended too early: before `stopping`, and before their work was over."""

    def __init__(self, ended: Callable[[str], object] = lambda _: None) -> None:
        """`ended` is called, in the thread that ends, with a sentence."""
        self._ended = ended
        self._threads: set[threading.Thread] = set()
        self._stopping = False
        self._problem: str | None = None

    def start(self, name: str, body: Callable[[], object], *, over: Callable[[], bool] = lambda: False) -> None:
        """Run `body` in a daemon thread. The thread may end when `over` says that its work is over."""
        thread = threading.Thread(target=self._run, args=(name, body, over), name=name, daemon=True)
        thread.start()
        if thread.is_alive():
            self._threads.add(thread)

    def problem(self) -> str | None:
        """Which thread ended too early, and why. None if there is none."""
        return self._problem

    def alive(self) -> tuple[str, ...]:
        """The names of the threads that run."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        return tuple(sorted(thread.name for thread in self._threads))

    def stopping(self) -> None:
        """From now on each thread may end."""
        self._stopping = True

    def join(self, timeout_s: float) -> None:
        """Wait for the end of each. A thread that hangs in a call is left behind."""
        for thread in tuple(self._threads):
            thread.join(timeout_s)

    def _run(self, name: str, body: Callable[[], object], over: Callable[[], bool]) -> None:
        why = "without a word"
        try:
            body()
        except BaseException as e:
            log.exception("thread %s failed", name)
            why = f"by {type(e).__name__}: {e}"
        if not (self._stopping or over()):
            self._problem = f"thread {name} ended {why}; the process ends to be started again"
            self._ended(self._problem)
