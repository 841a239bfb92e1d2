"""Reading the cards of a node side by side, each in a thread of its own, so that one dead card hides no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from gpuslice.errors import DeviceError, HungError

LIMIT_S = 15.0  # as for looks and prepares: a call that takes longer counts as hung
Found = TypeVar("Found")


class Listing(Generic[Found]):
    """A card whose read hangs is left behind with its thread, and is not asked again before that thread ends."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._stuck: dict[int, threading.Thread] = {}

    def read(self, indexes: Iterable[int], read: Callable[[int], Found]) -> tuple[tuple[Found, ...], tuple[str, ...]]:
        """What was found, in order, and one sentence for each card that cannot be read."""
        indexes = tuple(indexes)
        found: dict[int, Found] = {}
        lost: dict[int, str] = {}

        def ask(index: int) -> None:
            try:
                found[index] = read(index)
            except DeviceError as e:
                lost[index] = str(e)
            except Exception as e:  # noqa: BLE001  whatever one card answers, the others are read
                lost[index] = f"GPU {index}: cannot read it: {e!r}; this is a bug of gpuslice, report it"

        asked = {i: self._stuck.get(i) or threading.Thread(target=ask, args=(i,), daemon=True) for i in indexes}
        self._wait(asked)
        hung = {i: thread for i, thread in asked.items() if thread.is_alive()}
        self._stuck = hung
        for index in indexes:
            if index not in found and index not in lost:
                lost[index] = str(HungError.overdue(f"reading GPU {index}", [str(index)], self._limit_s))
        return (
            tuple(found[i] for i in indexes if i in found and i not in hung),
            tuple(lost[i] for i in indexes if i in lost),
        )

    def _wait(self, asked: dict[int, threading.Thread]) -> None:
        until = time.monotonic() + self._limit_s
        new = [thread for thread in asked.values() if thread not in self._stuck.values()]
        for thread in new:
            thread.start()
        for thread in new:
            thread.join(max(0.0, until - time.monotonic()))
