"""Reads the cards of a node in parallel, each in its own thread, so that one dead card hides no other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from gpuslice.errors import DeviceError

LIMIT_S = 15.0  # as for looks and prepares: a call that takes longer counts as hung
Found = TypeVar("Found")


class Listing(Generic[Found]):
    """If the read of a card hangs, its thread is left behind. The card is not asked again before that thread ends."""

    def __init__(self, limit_s: float = LIMIT_S, *, name: Callable[[int], str] = "GPU {}".format) -> None:
        self._limit_s, self._name = limit_s, name
        self._stuck: dict[int, threading.Thread] = {}

    def read(self, indexes: Iterable[int], read: Callable[[int], Found]) -> tuple[tuple[Found, ...], tuple[str, ...]]:
        """The results in order, and one sentence for each card that cannot be read."""
        indexes = tuple(indexes)
        found: dict[int, Found] = {}
        lost: dict[int, str] = {}
        into, sentences = found, lost

        def ask(index: int) -> None:
            try:
                into[index] = read(index)
            except DeviceError as e:
                sentences[index] = str(e)
            except Exception as e:  # noqa: BLE001  an odd answer of one card must not stop the others
                sentences[index] = f"{self._name(index)}: cannot read it: {e!r}; this is a bug of gpuslice, report it"

        asked = {i: self._stuck.get(i) or threading.Thread(target=ask, args=(i,), daemon=True) for i in indexes}
        self._wait(asked)
        self._stuck = {i: thread for i, thread in asked.items() if thread.is_alive()}
        found, lost = dict(found), dict(lost)  # later results of threads that were left behind do not count
        for index in indexes:
            if index not in found and index not in lost:
                lost[index] = self._hung(index)
        return (
            tuple(found[i] for i in indexes if i in found),
            tuple(lost[i] for i in indexes if i not in found),
        )

    def _hung(self, index: int) -> str:
        return (
            f"{self._name(index)} cannot be read: NVML has not answered for {self._limit_s:g} s; look at the kernel log of the"
            " node, reset the GPU or restart the node if this does not end"
        )

    def _wait(self, asked: dict[int, threading.Thread]) -> None:
        until = time.monotonic() + self._limit_s
        new = [thread for thread in asked.values() if thread not in self._stuck.values()]
        for thread in new:
            thread.start()
        for thread in new:
            thread.join(max(0.0, until - time.monotonic()))
