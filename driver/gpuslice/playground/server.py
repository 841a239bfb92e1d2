"""The background process of a playground: the stand-in cluster with the driver, and a socket for the commands.

Each question is one line of JSON, and so is the answer: {"code": 0, "said": text}. Only `client.up` starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TextIO

from gpuslice.errors import DriverError
from gpuslice.playground.desk import Desk
from gpuslice.playground.folder import PlaygroundFolder
from gpuslice.standin.cluster import StandInCluster, end_once
from gpuslice.standin.kubelet import KubeletError


def main(arguments: list[str]) -> None:
    path, simulate, latency, ready = arguments
    folder = PlaygroundFolder(Path(path))
    with os.fdopen(int(ready), "w", encoding="utf-8") as voice:
        try:
            with contextlib.suppress(asyncio.CancelledError):
                asyncio.run(_serve(folder, simulate, latency, voice))
        except (DriverError, KubeletError, RuntimeError, TimeoutError, OSError) as e:
            _say(voice, 1, f"the playground did not start: {str(e) or type(e).__name__}")
            return  # `up` removes the rest
    folder.clear()


async def _serve(folder: PlaygroundFolder, simulate: str, latency: str, voice: TextIO) -> None:
    end = end_once(signal.SIGTERM, signal.SIGINT)
    async with StandInCluster(folder.path, simulate, latency=latency) as cluster:
        await cluster.supervise()
        await cluster.start()
        desk = Desk(cluster)
        server = await asyncio.start_unix_server(partial(_answer, desk, end), folder.socket)
        try:
            _say(voice, 0, "")
            await asyncio.Event().wait()  # until this task is cancelled
        finally:
            server.close()  # without a wait for its connections, because a hung claim would block the end


async def _answer(
    desk: Desk, end: Callable[[], None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    question = json.loads(await reader.readline() or "{}")
    if question.get("do") == "down":
        code, said = 0, ""
    else:
        code, said = await desk.answer(question)
    with contextlib.suppress(ConnectionError):  # the command was interrupted
        writer.write(json.dumps({"code": code, "said": said}).encode() + b"\n")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    if question.get("do") == "down":
        end()


def _say(voice: TextIO, code: int, said: str) -> None:
    with contextlib.suppress(OSError):  # `up` was killed
        print(json.dumps({"code": code, "said": said}), file=voice, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
