"""Reads the cards of a node in parallel, each in its own thread, so that one dead card hides no other."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

from gpuslice.errors import DeviceError, DriverError, HungError
from gpuslice.nvml.pulse import Pulse

LIMIT_S = 15.0  # as for looks and prepares: a call that takes longer counts as hung
Found = TypeVar("Found")


class Attempt(Generic[Found]):
    """A call for the whole node. While it hangs, there is no second call. A late answer still counts."""

    def __init__(self, name: str, call: Callable[[], Found]) -> None:
        """`name` begins the sentence about a call that hangs, unless a call inside it has its own name."""
        self._name, self._call = name, call
        self._answer: Future[Found] | None = None
        self._pulse = Pulse()

    @property
    def hangs(self) -> bool:
        return self._answer is not None and not self._answer.done()

    def result(self, limit_s: float) -> Found:
        """What the call returns. DriverError: what it raises. HungError if it does not return in time, DeviceError if no
        thread can start, or after an odd answer of NVML that raised something else.

        Only one caller at a time may wait.
        """
        if self._answer is None:
            self._answer, self._pulse = Future(), Pulse()
            context = contextvars.copy_context()
            self._pulse.listen(context)
            run = partial(context.run, self._run, self._answer)
            if refusal := _refusal(threading.Thread(target=run, name=self._name, daemon=True)):
                self._answer = None
                raise DeviceError(f"{self._name} cannot begin: {refusal}")
        try:
            error = self._answer.exception(limit_s)
        except TimeoutError:
            # The sentence has no number of seconds, because it becomes a taint, and each change of a taint is a write.
            raise HungError(
                f"{self._pulse.call or self._name} has not returned; look at the kernel log of the node, and restart the "
                "node if this does not end"
            ) from None
        answer, self._answer = self._answer, None
        if isinstance(error, Exception) and not isinstance(error, DriverError):
            raise DeviceError(f"{self._name} failed: {_bug(error)}") from error
        return answer.result()

    def _run(self, answer: Future[Found]) -> None:
        try:
            answer.set_result(self._call())
        except BaseException as e:  # noqa: BLE001 - handed to the caller
            answer.set_exception(e)


class Listing(Generic[Found]):
    """If the read of a card hangs, its thread is left behind. The card is not asked again before that thread ends."""

    def __init__(self, limit_s: float = LIMIT_S, *, name: Callable[[int], str] = "GPU {}".format) -> None:
        self._limit_s, self._name = limit_s, name
        self._stuck: dict[int, threading.Thread] = {}
        self._pulses: dict[int, Pulse] = {}

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
                sentences[index] = f"{self._name(index)}: cannot read it: {_bug(e)}"

        until = time.monotonic() + self._limit_s
        asked = {i: self._stuck.get(i) or self._thread(i, ask) for i in indexes}
        for index, thread in asked.items():
            if index not in self._stuck and (refusal := _refusal(thread)):
                lost[index] = f"{self._name(index)} cannot be read: {refusal}"
        for index, thread in asked.items():
            if index not in self._stuck and thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))
        self._stuck = {i: thread for i, thread in asked.items() if thread.is_alive()}
        found, lost = dict(found), dict(lost)  # later results of threads that were left behind do not count
        for index in indexes:
            if index not in found and index not in lost:
                lost[index] = self._hung(index)
        return (
            tuple(found[i] for i in indexes if i in found),
            tuple(lost[i] for i in indexes if i not in found),
        )

    def _thread(self, index: int, ask: Callable[[int], None]) -> threading.Thread:
        context, self._pulses[index] = contextvars.copy_context(), Pulse()
        self._pulses[index].listen(context)
        return threading.Thread(target=context.run, args=(ask, index), daemon=True)

    def _hung(self, index: int) -> str:
        return (
            f"{self._name(index)} cannot be read: {self._pulses[index].call or 'NVML'} has not returned for "
            f"{self._limit_s:g} s; look at the kernel log of the node, reset the GPU or restart the node if this does not end"
        )


def _bug(error: Exception) -> str:
    return f"{error!r}; this is a bug of gpuslice, report it"


def _refusal(thread: threading.Thread) -> str:
    """Start the thread. Returns the reason if the kernel refuses, or "" if the thread runs."""
    try:
        thread.start()
    except RuntimeError as e:
        return f"{e}; raise the limit of processes of this container"
    return ""
