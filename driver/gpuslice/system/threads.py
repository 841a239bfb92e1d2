"""Threads that live as long as the process. One that ends by itself is told, because it would be silence for ever."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)


class ThreadWatch:
    """Starts threads, and says which of them ended before `stopping`."""

    def __init__(self, ended: Callable[[str], object] = lambda _: None) -> None:
        """`ended` is called, in the thread that ends, with a sentence."""
        self._ended = ended
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._problem: str | None = None

    def start(self, name: str, body: Callable[[], None]) -> None:
        """Run `body` in a thread that keeps no process from ending."""
        thread = threading.Thread(target=self._run, args=(name, body), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def problem(self) -> str | None:
        """Which thread ended and why; None while all live."""
        return self._problem

    def stopping(self) -> None:
        """From now on a thread that ends does what it should."""
        self._stopping = True

    def join(self, timeout_s: float) -> None:
        """Wait for the end of each; one that hangs in a call is left behind."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout_s)

    def _run(self, name: str, body: Callable[[], None]) -> None:
        why = "without a word"
        try:
            body()
        except BaseException as e:
            log.exception("thread %s failed", name)
            why = f"by {type(e).__name__}: {e}"
        if not self._stopping:
            self._problem = f"thread {name} ended {why}; the process ends to be started again"
            self._ended(self._problem)
