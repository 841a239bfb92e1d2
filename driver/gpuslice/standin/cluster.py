"""A cluster of one node in a folder: stand-in API server, kubelet and scheduler, and the real driver as a process.

The demo shows this driver process, tests ask it and the benchmark measures it, always through its real server.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from gpuslice.core.model import ClaimRef, ClaimUid
from gpuslice.errors import DeviceError
from gpuslice.mps.client import MpsClient
from gpuslice.nvml.sim import spec
from gpuslice.standin import scheduler
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.standin.kubelet import StandInKubelet
from gpuslice.standin.scheduler import Request
from gpuslice.system.folder_watch import FolderWatch

DRIVER = "gpuslice.dev"
NODE = "node-1"


class UnschedulableError(Exception):
    """No device of the node fits. The pod would stay Pending."""


class DriverProcess:
    """One driver process with its log in a file."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self.log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    async def kill(self) -> None:
        """SIGKILL: nothing cleans up."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()

    async def terminate(self, timeout_s: float = 30.0) -> int:
        """Send SIGTERM. Returns the exit code."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        return await asyncio.wait_for(self._process.wait(), timeout_s)

    async def wait(self, timeout_s: float = 30.0) -> int:
        return await asyncio.wait_for(self._process.wait(), timeout_s)


class StandInCluster:
    """Use it as `async with StandInCluster(folder) as cluster`, then `await cluster.start()`."""

    module = "gpuslice"  # the module that `python -m` starts

    def __init__(self, folder: Path, simulate: str = "h100x2", *, latency: str = "zero", version: str = "1.37") -> None:
        self.folder, self.simulate, self.latency = folder, simulate, latency
        self.api = StandInApiServer(folder / "api", version)
        # The folders have the kubelet's names, so that paths look like those of a node. Paths of sockets must be short.
        self.registry, self.plugins, self.cdi = folder / "registry", folder / "plugins", folder / "cdi"
        self.mps = folder / "mps"
        for path in (self.registry, self.plugins, self.cdi):
            path.mkdir(parents=True, exist_ok=True)
        self.kubelet = StandInKubelet(self.registry)
        self.drivers: list[DriverProcess] = []
        self.supervisors: list[DriverProcess] = []
        self._uids = itertools.count(1)

    @property
    def node_folder(self) -> Path:
        """The folder of the simulated node."""
        return self.plugins / DRIVER / "simulated"

    async def __aenter__(self) -> StandInCluster:
        self.api.start()
        self.api.add_node(NODE)
        await self.kubelet.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for driver in self.drivers:
            await driver.kill()
        for supervisor in self.supervisors:
            with contextlib.suppress(TimeoutError):
                await supervisor.terminate()  # the supervisor ends its daemons
            await supervisor.kill()
        await self.kubelet.__aexit__(kind, error, trace)
        self.api.stop()

    # ------------------------------------------------------------ the driver

    def arguments(self, *more: str) -> list[str]:
        return [
            "run",
            *("--simulate", self.simulate),
            *("--simulate-latency", self.latency),
            *("--node-name", NODE),
            *("--kubeconfig", str(self.api.kubeconfig)),
            *("--kubelet-plugins-directory-path", str(self.plugins)),
            *("--kubelet-registrar-directory-path", str(self.registry)),
            *("--cdi-root", str(self.cdi)),
            *("--mps-root", str(self.mps)),
            *more,
        ]

    async def supervise(self) -> DriverProcess:
        """Start the MPS supervisor like its DaemonSet. Return when it answers."""
        arguments = ["mps-supervisor", "--mps-root", str(self.mps), "--simulate", self.simulate]
        arguments += ["--kubelet-plugins-directory-path", str(self.plugins)]
        self.mps.mkdir(exist_ok=True)
        watch = FolderWatch(self.mps, arrivals=True)
        arrived = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(watch.fileno(), arrived.set)
        try:
            supervisor = await self._spawn(f"supervisor-{len(self.supervisors)}.log", arguments, {})
            self.supervisors.append(supervisor)
            await asyncio.wait_for(self._answers(arrived, watch), 20)
        finally:
            loop.remove_reader(watch.fileno())
            watch.close()
        return supervisor

    async def _answers(self, arrived: asyncio.Event, watch: FolderWatch) -> None:
        while True:
            with contextlib.suppress(DeviceError):
                await asyncio.to_thread(MpsClient(self.mps).incarnation)
                return
            await arrived.wait()
            arrived.clear()
            watch.read()

    async def _spawn(self, log_name: str, arguments: Sequence[str], environment: Mapping[str, str]) -> DriverProcess:
        log = self.folder / log_name
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.module,
                *arguments,
                stdout=output,
                stderr=output,
                env={**os.environ, **environment},
            )
        return DriverProcess(process, log)

    async def start(
        self, *more: str, environment: Mapping[str, str] | None = None, ready: bool = True
    ) -> DriverProcess:
        """Start a driver process. With `ready`, return when it is registered and its slices are published."""
        before = max((plugin.order for plugin in self.kubelet.plugins(DRIVER)), default=0)
        name = f"driver-{len(self.drivers)}.log"
        driver = await self._spawn(name, self.arguments(*more), environment or {})
        self.drivers.append(driver)
        if ready:
            await self.kubelet.wait_registered(DRIVER, after=before)
            await self.wait_published()
        return driver

    async def wait_published(self, timeout_s: float = 20.0) -> None:
        """Return when every card has its pool and each pool is complete."""
        cards = len(spec.parse(self.simulate).cards)
        await asyncio.to_thread(self.api.wait, lambda: complete(self.api.all("resourceslices"), cards), timeout_s)

    # ------------------------------------------------------------ claims, made like those of a user and the scheduler

    def claim(
        self,
        name: str,
        *requests: Request,
        namespace: str = "default",
        configs: Sequence[Mapping[str, Any]] = (),
    ) -> ClaimRef:
        """Create a ResourceClaim and let the scheduler allocate it. UnschedulableError if nothing fits,
        CapacityError if the scheduler ends its attempt."""
        slices, claims = self.api.all("resourceslices"), self.api.all("resourceclaims")
        fractional = int(self.api.version.split(".")[1]) >= 38  # in 1.37 only with --min-compatibility-version
        allocation = scheduler.allocate(slices, claims, requests, node=NODE, configs=configs, fractional=fractional)
        if allocation is None:
            raise UnschedulableError(f"no device of {NODE} fits claim {namespace}/{name}")
        return self.create_allocated(name, allocation, namespace=namespace, requests=requests)

    def create_allocated(
        self,
        name: str,
        allocation: Mapping[str, Any],
        *,
        namespace: str = "default",
        requests: Sequence[Request] = (),
    ) -> ClaimRef:
        """Create a ResourceClaim with this allocation. Nothing checks the allocation."""
        spec = {"devices": {"requests": [request.body() for request in requests]}}
        body = self.api.create("resourceclaims", {"metadata": {"name": name}, "spec": spec}, namespace)
        body["status"] = {"allocation": allocation, "reservedFor": [{"resource": "pods", "name": name, "uid": name}]}
        self.api.update("resourceclaims", body)
        return ClaimRef(namespace, name, ClaimUid(body["metadata"]["uid"]))

    def deallocate(self, ref: ClaimRef) -> None:
        """Do what happens to a claim after the end of its last pod. From now on the scheduler may use its devices."""
        body = self.api.get("resourceclaims", ref.name, ref.namespace)
        body["status"] = {}
        self.api.update("resourceclaims", body)

    def delete(self, ref: ClaimRef) -> None:
        self.api.delete("resourceclaims", ref.name, ref.namespace)

    async def run(self, ref: ClaimRef) -> tuple[str, ...]:
        """Prepare one claim as for a pod. Returns the CDI names. RuntimeError with the driver's sentence if it refuses."""
        answer = (await self.kubelet.prepare([ref]))[ref.uid]
        if answer.error:
            raise RuntimeError(answer.error)
        return tuple(name for device in answer.devices for name in device.cdi_ids)

    async def end(self, ref: ClaimRef) -> None:
        """Unprepare a claim and delete it, as after the end of its pod."""
        error = (await self.kubelet.unprepare([ref]))[ref.uid]
        if error:
            raise RuntimeError(error)
        self.delete(ref)


def end_once(*signals: signal.Signals) -> Callable[[], None]:
    """Cancel the current task at the first of these signals, or when the result is called. Later signals do not shorten the
    end of the task."""
    task, over = asyncio.current_task(), asyncio.Event()
    assert task is not None

    def end() -> None:
        if not over.is_set():
            over.set()
            task.cancel()

    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, end)
    return end


def complete(slices: Sequence[Mapping[str, Any]], least: int = 1) -> bool:
    """Whether there are at least `least` pools, each with as many slices of its newest generation as the pool says."""
    pools: dict[str, list[Mapping[str, Any]]] = {}
    for body in slices:
        pools.setdefault(body["spec"]["pool"]["name"], []).append(body["spec"]["pool"])
    newest = {name: max(pool["generation"] for pool in found) for name, found in pools.items()}
    return len(pools) >= least and all(
        sum(pool["generation"] == newest[name] for pool in found) == found[0]["resourceSliceCount"]
        for name, found in pools.items()
    )
