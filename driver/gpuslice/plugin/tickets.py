"""The right to work on GPUs, in the order of arrival."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

from gpuslice.core.model import GpuUuid
from gpuslice.errors import HungError


class Ticket:
    """The right to work on some GPUs. It is released exactly once."""

    def __init__(self, gpus: Sequence[GpuUuid], arrival: int) -> None:
        self.gpus = tuple(gpus)
        self.arrival = arrival


class _Waiting(Ticket):
    """A ticket in the queue. `held` ends when it is granted."""

    def __init__(self, gpus: Sequence[GpuUuid], arrival: int) -> None:
        super().__init__(gpus, arrival)
        self.held: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Tickets:
    """First come, first served for each GPU. A claim with several GPUs gets all its places at once, or none yet.

    Only the event loop may call it, except for `take_now`, which any thread may call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._holders: dict[GpuUuid, Ticket] = {}
        self._hung: dict[GpuUuid, str] = {}
        self._arrivals = 0

    def arrive(self) -> int:
        """A number that keeps the place of a claim in the queue over several tries."""
        self._arrivals += 1
        return self._arrivals

    async def take(self, gpus: Sequence[GpuUuid], arrival: int) -> Ticket:
        """Wait for this claim's turn on all these GPUs. HungError at once if one of them hangs."""
        ticket = _Waiting(gpus, arrival)
        with self._lock:
            for gpu in gpus:
                if gpu in self._hung:
                    raise HungError(self._hung[gpu])
            self._waiting.append(ticket)
            self._waiting.sort(key=lambda t: t.arrival)
            self._grant()
        try:
            await ticket.held
        except BaseException:
            self.release(ticket)
            raise
        return ticket

    def take_now(self, gpus: Sequence[GpuUuid], arrival: int) -> Ticket | None:
        """A ticket for all these GPUs without waiting. None if a claim has one of them, or waits for one."""
        with self._lock:
            if self._holders.keys() & set(gpus) or any(set(waiting.gpus) & set(gpus) for waiting in self._waiting):
                return None
            ticket = Ticket(gpus, arrival)
            self._holders.update(dict.fromkeys(gpus, ticket))
            return ticket

    def release(self, ticket: Ticket) -> None:
        with self._lock:
            self._waiting = [waiting for waiting in self._waiting if waiting is not ticket]
            for gpu in ticket.gpus:
                if self._holders.get(gpu) is ticket:
                    del self._holders[gpu]
                    self._hung.pop(gpu, None)
            self._grant()

    def hang(self, ticket: Ticket, text: str) -> None:
        """Record that the work under this ticket hangs: refuse all present and later jobs for its GPUs."""
        with self._lock:
            for gpu in ticket.gpus:
                self._hung[gpu] = text
            for waiting in self._waiting:
                if set(waiting.gpus) & set(ticket.gpus) and not waiting.held.done():
                    waiting.held.set_exception(HungError(text))

    def hung(self) -> dict[GpuUuid, str]:
        with self._lock:
            return dict(self._hung)

    def _grant(self) -> None:
        """Give each waiting ticket its GPUs if they are free. The caller has the lock."""
        ahead: set[GpuUuid] = set(self._holders)
        for ticket in list(self._waiting):
            if ticket.held.done():
                continue
            if not ahead & set(ticket.gpus):
                self._waiting.remove(ticket)
                self._holders.update(dict.fromkeys(ticket.gpus, ticket))
                ticket.held.set_result(None)
            ahead |= set(ticket.gpus)
