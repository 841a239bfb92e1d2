"""The measures. Each one runs its own driver on a fresh node and returns the figures of one round.

All times are taken outside the driver process, at the place of a kubelet. The stand-ins (API server over TLS, kubelet)
share one process, so their own time is in every figure.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
from gpuslice.core.model import ClaimRef
from gpuslice.nvml.sim.node import SimNode
from gpuslice.pb import registration_v1_pb2, registration_v1_pb2_grpc
from gpuslice.standin import scheduler
from gpuslice.standin.cluster import DRIVER, NODE, DriverProcess, StandInCluster, complete
from gpuslice.standin.kubelet import KubeletError
from gpuslice.standin.scheduler import Request

from hack.lib.bench.machine import cpu_s
from hack.lib.bench.subject import BenchError, Subject
from hack.lib.bench.table import Figures

GPUS = 8
CARD: Mapping[str, str] = {"type": "gpu"}
PARTITION: Mapping[str, str] = {"type": "mig", "profile": "1g.10gb"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """The size of a measurement. calls: timed prepares of each kind per round. claims: number of claims before memory is
    read for the last time."""

    rounds: int
    calls: int
    claims: int


@dataclass(frozen=True, slots=True)
class Bench:
    """A driver that has published its slices, and its cluster."""

    cluster: StandInCluster
    driver: DriverProcess
    published_s: float

    def allocations(self, where: Mapping[str, str]) -> list[Mapping[str, Any]]:
        """One allocation of such a device on each card."""
        slices = self.cluster.api.all("resourceslices")
        wanted = [Request(name="r", where={**where, "index": index}) for index in range(GPUS)]
        found = [scheduler.allocate(slices, [], [request], node=NODE) for request in wanted]
        if None in found:
            raise BenchError(
                f"the driver did not publish a device with {dict(where)} on each of {GPUS} cards; see its log"
            )
        return [allocation for allocation in found if allocation is not None]

    def claim(self, number: int, allocation: Mapping[str, Any]) -> ClaimRef:
        return self.cluster.create_allocated(f"claim-{number}", allocation)

    async def prepare(self, ref: ClaimRef) -> float:
        """Seconds of one NodePrepareResources call that succeeds."""
        return await _time_of(self.cluster.run(ref))

    async def unprepare(self, ref: ClaimRef) -> float:
        began = time.perf_counter()
        error = (await self.cluster.kubelet.unprepare([ref]))[ref.uid]
        seconds = time.perf_counter() - began
        if error:
            raise BenchError(f"an unprepare failed: {error}")
        self.cluster.delete(ref)
        return seconds

    async def wave(self, refs: Sequence[ClaimRef]) -> tuple[list[float], list[float]]:
        """Prepare all claims at the same time, then unprepare them. Returns the seconds of each call."""
        prepared = await asyncio.gather(*map(self.prepare, refs))
        return prepared, await asyncio.gather(*map(self.unprepare, refs))

    def resident_mb(self, field: str = "VmRSS") -> float:
        """Megabytes (10^6 bytes) of the driver process as the kernel counts them, shared libraries included."""
        return resident_mb(self.driver.pid, field)


def resident_mb(pid: int, field: str = "VmRSS") -> float:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024 / 1e6


class _BenchCluster(StandInCluster):
    """The stand-ins are always those of this tree, so that two revisions are measured under the same conditions."""

    def __init__(self, subject: Subject, folder: Path, simulate: str, latency: str) -> None:
        super().__init__(folder, simulate, latency=latency)
        self._subject, self.module = subject, subject.module

    def arguments(self, *more: str) -> list[str]:
        return self._subject.known(super().arguments(*more))


@contextlib.asynccontextmanager
async def driver_bench(
    subject: Subject, simulate: str = f"h100x{GPUS}", *, latency: str = "zero", supervised: bool = False
) -> AsyncIterator[Bench]:
    """Start a driver on a fresh node and wait for its last slice. BenchError with the end of the driver's log if this
    fails."""
    with tempfile.TemporaryDirectory(prefix="gs-") as folder:
        async with _BenchCluster(subject, Path(folder), simulate, latency) as cluster:
            try:
                if supervised:
                    await cluster.supervise()
                began = time.perf_counter()
                driver = await cluster.start(environment=subject.environment(), ready=False)
                ended = await asyncio.to_thread(_all_published, cluster)
                await cluster.kubelet.wait_registered(DRIVER)
                yield Bench(cluster, driver, ended - began)
            except (RuntimeError, KubeletError, TimeoutError) as e:
                end = _end_of(Path(folder, "driver-0.log"))
                raise BenchError(f"the driver of {subject.name} could not be measured: {e}\n{end}") from e


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8").splitlines()[-15:])


def _all_published(cluster: StandInCluster) -> float:
    """Wait for the last slice of the last card. Returns when it was stored. Reads the store itself, because copies take
    time."""

    def there() -> bool:
        bodies = [body for _, body in cluster.api.store.items("resourceslices", "", lambda _: True)[0]]
        return len({body["spec"]["pool"]["name"] for body in bodies}) == GPUS and complete(bodies)

    cluster.api.wait(there, 30.0)
    return time.perf_counter()


async def _time_of(work: Awaitable[object]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


def percentiles(name: str, seconds: Sequence[float]) -> Figures:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {f"{name}_p50_ms": cuts[49] * 1e3, f"{name}_p99_ms": cuts[98] * 1e3}


# ---------------------------------------------------------------- the measures


async def start(subject: Subject, size: Size) -> Figures:
    """From exec of the process until the last slice of eight cards is stored."""
    async with driver_bench(subject) as bench:
        return {"start_s": bench.published_s}


async def calls(subject: Subject, size: Size) -> Figures:
    """NodePrepareResources and NodeUnprepareResources with one claim per call: one by one, then eight at once on eight
    cards."""
    figures: Figures = {}
    async with driver_bench(subject) as bench:
        for kind, where in (("card", CARD), ("mig", PARTITION)):
            devices = bench.allocations(where)
            await bench.wave([bench.claim(gpu, device) for gpu, device in enumerate(devices)])  # opens connections
            cpu, single = cpu_s(bench.driver.pid), []
            for number in range(size.calls):
                ref = bench.claim(number, devices[number % GPUS])
                single.append((await bench.prepare(ref), await bench.unprepare(ref)))
            waves = [
                await bench.wave([bench.claim(gpu, device) for gpu, device in enumerate(devices)])
                for _ in range(max(1, size.calls // GPUS))
            ]
            spent = (cpu_s(bench.driver.pid) - cpu) / (len(single) + len(waves) * GPUS)
            figures[f"cpu_{kind}_ms"] = spent * 1e3
            figures |= percentiles(f"prepare_{kind}", [one for one, _ in single])
            figures |= percentiles(f"unprepare_{kind}", [one for _, one in single])
            figures |= percentiles(f"prepare_{kind}_eight", [one for wave, _ in waves for one in wave])
            figures |= percentiles(f"unprepare_{kind}_eight", [one for _, wave in waves for one in wave])
    return figures


async def mig(subject: Subject, size: Size) -> Figures:
    """One partition, then one on each of eight cards at once, with the times of real NVML (a creation: 1.1 s)."""
    async with driver_bench(subject, f"h100x{GPUS}:mig", latency="realistic") as bench:
        refs = [bench.claim(gpu, device) for gpu, device in enumerate(bench.allocations(PARTITION))]
        one = await bench.prepare(refs[0])
        await bench.cluster.kubelet.unprepare(refs[:1])
        eight = await _time_of(asyncio.gather(*map(bench.prepare, refs)))
        return {"mig_one_s": one, "mig_eight_s": eight, "mig_ratio": eight / one}


async def memory(subject: Subject, size: Size) -> Figures:
    """Resident memory after the start, after 100 claims and after all claims. Claims of both kinds come and go, eight
    at once."""
    async with driver_bench(subject) as bench:
        devices = [bench.allocations(CARD), bench.allocations(PARTITION)]
        figures = {"rss_start_mb": bench.resident_mb()}
        for number in range(max(1, size.claims // GPUS)):
            if number * GPUS >= 100 and "rss_100_mb" not in figures:
                figures["rss_100_mb"] = bench.resident_mb()
            await bench.wave([bench.claim(gpu, device) for gpu, device in enumerate(devices[number % 2])])
        figures["rss_end_mb"] = bench.resident_mb()
        figures["rss_growth_mb"] = figures["rss_end_mb"] - figures.get("rss_100_mb", figures["rss_start_mb"])
        return figures | {"rss_peak_mb": bench.resident_mb("VmHWM")}


async def hang(subject: Subject, size: Size) -> Figures:
    """While a prepare hangs in NVML: the slowest GetInfo, and the slowest prepare on another card."""
    async with driver_bench(subject) as bench:
        devices, node = bench.allocations(CARD), SimNode(bench.cluster.node_folder)
        cue = node.cue("hang", "*", node.cards[0].uuid, times=None)
        hanging = asyncio.create_task(bench.prepare(bench.claim(0, devices[0])))
        if not await asyncio.to_thread(node.wait_hung, cue, 10.0):
            raise BenchError(
                "the prepare did not hang in NVML as ordered, so the other cards cannot be measured; see the driver's log"
            )
        asked, prepared = [], []
        for gpu in range(1, GPUS):
            ref = bench.claim(gpu, devices[gpu])
            asked.append(await _time_of(_get_info(_socket_in(bench.cluster.registry))))
            prepared.append(await bench.prepare(ref))
            await bench.unprepare(ref)
        if hanging.done():
            raise BenchError("the prepare that had to hang in NVML ended too early; look at the driver's hang limit")
        node.withdraw(cue)
        await hanging
        node.close()
        return {"hang_get_info_ms": max(asked) * 1e3, "hang_prepare_ms": max(prepared) * 1e3}


def _socket_in(registry: Path) -> Path:
    return next(path for path in registry.iterdir() if path.is_socket())


async def _get_info(socket: Path) -> None:
    """Ask like the kubelet's plugin watcher: on a new connection."""
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        stub: Any = registration_v1_pb2_grpc.RegistrationStub(channel)  # type: ignore[no-untyped-call]
        await stub.GetInfo(registration_v1_pb2.InfoRequest(), timeout=10.0)
