"""A claim that waits for holders hears of their departure."""

from __future__ import annotations

import asyncio

import pytest
from gpuslice.core.model import ClaimUid
from gpuslice.errors import ClaimError
from gpuslice.plugin.releases import Releases

from tests.kit.waiting import settled

UID, OTHER = ClaimUid("u-1"), ClaimUid("u-2")


async def test_a_waiter_hears_of_a_departure_that_came_before_it_waited() -> None:
    releases = Releases()
    with releases.listening() as news:
        releases.notify([UID])

        assert await news.wait_any([UID, OTHER], 30)


async def test_a_waiter_gives_up_at_its_deadline() -> None:
    releases = Releases()
    with releases.listening() as news:
        releases.notify([OTHER])

        assert not await news.wait_any([UID], 0.01)


async def test_lost_news_wakes_everybody() -> None:
    releases = Releases()
    with releases.listening() as news:
        releases.notify([ClaimUid("")])

        assert await news.wait_any([UID], 30)


async def test_shutting_down_ends_every_wait() -> None:
    releases = Releases()
    with releases.listening() as news:
        waiting = asyncio.create_task(news.wait_any([UID], 30))
        await settled()
        releases.stop(ClaimError("shutting down"))

        with pytest.raises(ClaimError, match="shutting down"):
            await waiting
