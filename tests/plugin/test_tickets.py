"""Claims wait for GPUs in the order of their arrival."""

from __future__ import annotations

import asyncio

from gpuslice.core.model import GpuUuid
from gpuslice.plugin.tickets import Tickets

from tests.kit.waiting import settled

A, B = GpuUuid("GPU-a"), GpuUuid("GPU-b")


async def test_a_gpu_is_handed_out_in_the_order_of_arrival() -> None:
    tickets = Tickets()
    first = await tickets.take([A], tickets.arrive())
    early, late = tickets.arrive(), tickets.arrive()
    order: list[str] = []

    async def wait(name: str, arrival: int) -> None:
        ticket = await tickets.take([A], arrival)
        order.append(name)
        tickets.release(ticket)

    waiting = [asyncio.create_task(wait("late", late)), asyncio.create_task(wait("early", early))]
    await settled()
    assert order == []
    tickets.release(first)
    await asyncio.gather(*waiting)

    assert order == ["early", "late"]


async def test_another_gpu_is_free_while_one_is_held() -> None:
    tickets = Tickets()
    await tickets.take([A], tickets.arrive())

    assert (await tickets.take([B], tickets.arrive())).gpus == (B,)


async def test_a_claim_over_two_gpus_gets_both_or_none_and_is_not_overtaken() -> None:
    tickets = Tickets()
    held = await tickets.take([A], tickets.arrive())
    both = asyncio.create_task(tickets.take([A, B], tickets.arrive()))
    await settled()
    later = asyncio.create_task(tickets.take([B], tickets.arrive()))
    await settled()
    assert not both.done()
    assert not later.done()

    tickets.release(held)
    tickets.release(await both)

    assert (await later).gpus == (B,)


async def test_a_caller_that_leaves_the_queue_blocks_nobody() -> None:
    tickets = Tickets()
    held = await tickets.take([A], tickets.arrive())
    leaves = asyncio.create_task(tickets.take([A], tickets.arrive()))
    stays = asyncio.create_task(tickets.take([A], tickets.arrive()))
    await settled()
    leaves.cancel()
    await settled()

    tickets.release(held)

    assert (await stays).gpus == (A,)
