"""The right to work on GPUs, in the order of arrival."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from gpuslice.core.model import GpuUuid
from gpuslice.errors import HungError


class Ticket:
    """The right to work on some GPUs. It is released exactly once."""

    def __init__(self, gpus: Sequence[GpuUuid], arrival: int) -> None:
        self.gpus = tuple(gpus)
        self.arrival = arrival
        self.held: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Tickets:
    """First come, first served for each GPU. A claim with several GPUs gets all its places at once, or none yet."""

    def __init__(self) -> None:
        self._waiting: list[Ticket] = []
        self._holders: dict[GpuUuid, Ticket] = {}
        self._hung: dict[GpuUuid, str] = {}
        self._arrivals = 0

    def arrive(self) -> int:
        """A number that keeps the place of a claim in the queue over several tries."""
        self._arrivals += 1
        return self._arrivals

    async def take(self, gpus: Sequence[GpuUuid], arrival: int) -> Ticket:
        """Wait for this claim's turn on all these GPUs. HungError at once if one of them hangs."""
        ticket = Ticket(gpus, arrival)
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

    def release(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        for gpu in ticket.gpus:
            if self._holders.get(gpu) is ticket:
                del self._holders[gpu]
                self._hung.pop(gpu, None)
        self._grant()

    def hang(self, ticket: Ticket, text: str) -> None:
        """Record that the work under this ticket hangs: refuse all present and later jobs for its GPUs."""
        for gpu in ticket.gpus:
            self._hung[gpu] = text
        for waiting in [t for t in self._waiting if set(t.gpus) & set(ticket.gpus)]:
            if not waiting.held.done():
                waiting.held.set_exception(HungError(text))

    def hung(self) -> dict[GpuUuid, str]:
        return dict(self._hung)

    def _grant(self) -> None:
        ahead: set[GpuUuid] = set(self._holders)
        for ticket in list(self._waiting):
            if ticket.held.done():
                continue
            if not ahead & set(ticket.gpus):
                self._waiting.remove(ticket)
                self._holders.update(dict.fromkeys(ticket.gpus, ticket))
                ticket.held.set_result(None)
            ahead |= set(ticket.gpus)
