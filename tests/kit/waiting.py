"""For tests of the event loop."""

from __future__ import annotations

import asyncio


async def settled() -> None:
    """Let every task that can run do so; the loop runs ready callbacks in order."""
    for _ in range(10):
        await asyncio.sleep(0)
