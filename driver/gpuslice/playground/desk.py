"""The answers of a playground's background process: it makes, shows and releases claims."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Mapping
from typing import Any

from gpuslice.core.model import ClaimRef
from gpuslice.demo.screen import folded, map_lines
from gpuslice.demo.stage import Stage, card_rows
from gpuslice.errors import ConfigError
from gpuslice.playground.folder import PlaygroundError
from gpuslice.playground.wanted import Wanted
from gpuslice.standin import scheduler
from gpuslice.standin.cluster import NODE, StandInCluster, UnschedulableError
from gpuslice.standin.kubelet import KubeletError


class Desk:
    """Answers questions. `held` has the prepared claims by name."""

    def __init__(self, cluster: StandInCluster) -> None:
        self._cluster, self._stage = cluster, Stage(cluster)
        self._held: dict[str, ClaimRef] = {}

    async def answer(self, question: Mapping[str, Any]) -> tuple[int, str]:
        """Exit code and text to print."""
        try:
            match question:
                case {"do": "claim", "wanted": wanted}:
                    return 0, await self._claim(Wanted(**wanted))
                case {"do": "release", "name": name}:
                    return 0, await self._release(name)
                case _:
                    return 1, f"the playground does not know {question!r}; use the gpuslice that started it"
        except ConfigError as e:
            return 2, str(e)
        except (PlaygroundError, KubeletError, RuntimeError) as e:
            return 1, str(e) if self._cluster.drivers[-1].alive else self._dead()

    def _dead(self) -> str:
        log = self._cluster.drivers[-1].log
        return f"the driver of the playground has ended ({log} says why); start another playground after `down`"

    # ------------------------------------------------------------ claim

    async def _claim(self, wanted: Wanted) -> str:
        ref = self._allocated(self._name(wanted), wanted)
        begin = time.monotonic()
        try:
            cdi = await self._cluster.run(ref)
        except (RuntimeError, KubeletError):
            self._held.pop(ref.name)
            self._cluster.deallocate(ref)
            self._cluster.delete(ref)
            raise
        took_s = time.monotonic() - begin
        record = await asyncio.to_thread(self._stage.look, lambda node: node.records[ref.uid])
        lines = folded(f"claim {ref.name}: {wanted.words}", 0)
        for what, uuid in self._stage.got(record):
            lines += [*folded(f"has {what}"), *folded(uuid, 4)]
        lines += [f"  ready after {took_s:.2f} s; a container gets it by CDI as", *(f"    {name}" for name in cdi)]
        return "\n".join([*lines, *await self._map()])

    def _name(self, wanted: Wanted) -> str:
        if wanted.name in self._held:
            raise PlaygroundError(f"claim {wanted.name} exists already; release it, or choose another --name")
        names = (f"{wanted.short.replace('.', '-')}-{number}" for number in itertools.count(1))
        return wanted.name or next(name for name in names if name not in self._held)

    def _allocated(self, name: str, wanted: Wanted) -> ClaimRef:
        request = wanted.request()
        try:
            ref = self._cluster.claim(name, request)
        except UnschedulableError as e:
            slices = self._cluster.api.all("resourceslices")
            if scheduler.allocate(slices, (), [request], node=NODE) is None:
                raise PlaygroundError(
                    f"no card of {self._cluster.simulate} can ever give {wanted.words}; "
                    "`gpuslice devices` shows what the cards offer"
                ) from e
            raise PlaygroundError(
                f"nothing is free for {wanted.words}, so a pod would stay Pending; release one of {', '.join(self._held)}"
            ) from e
        self._held[name] = ref
        return ref

    # ------------------------------------------------------------ release

    async def _release(self, name: str) -> str:
        ref = self._held.get(name)
        if ref is None:
            raise PlaygroundError(f"there is no claim {name}; the claims are: {', '.join(self._held) or 'none'}")
        await self._cluster.end(ref)
        self._held.pop(name, None)
        return "\n".join([f"claim {name} is released", *await self._map()])

    async def _map(self) -> list[str]:
        return map_lines(await asyncio.to_thread(self._stage.look, card_rows))
