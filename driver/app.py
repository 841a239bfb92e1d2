"""The wiring: everything is chosen and built here, once; below there are no modes and no "if simulated"."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import yaml

from driver import files, libc
from driver.checkpoint import Checkpoint
from driver.config import Config
from driver.core import cdi, gpucodec, health
from driver.core.health import Taints
from driver.core.inventory import Inventory
from driver.core.model import ClaimUid, Gpu, GpuUuid, LiveGpu, Record
from driver.core.policy import Policy
from driver.errors import ConfigError, DeviceError, StateError
from driver.gate import Departures
from driver.host import Host, RealHost, SimHost
from driver.injection import Injector
from driver.kube import Kube
from driver.kubelet import Doors
from driver.nvml.api import Nvml
from driver.nvml.real import RealNvml
from driver.nvml.sim import Latency, SimNvml
from driver.offering import Offering
from driver.prepare import Preparer
from driver.service import ClaimService
from driver.survey import Surveyor
from driver.telemetry import Check, HttpServer, Telemetry, setup_logging

log = logging.getLogger(__name__)

_COLLECT_PERIOD_S = 60.0
_DRAIN_S = 10.0  # running work is let finish for so long; the DaemonSet's grace period is longer
_FETCHES_AT_ONCE = 8


def run(config: Config) -> int:
    """Run the kubelet plugin until it is told to stop; the exit code."""
    setup_logging(config.log_level)
    libc.use_one_arena()
    app = App(config)
    code = asyncio.run(app.serve())
    if app.hanging:
        # A thread that hangs in NVML would keep the interpreter from ending, and the DaemonSet from starting anew.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return code


# ---------------------------------------------------------------- parts that depend on the node


def build_node(config: Config) -> tuple[Nvml, Host]:
    """The GPUs and the machine around them, real or simulated."""
    if config.simulate:
        folder = files.ensure_folder(config.simulated_node)
        return SimNvml(folder, config.simulate, latency=cast(Latency, config.simulate_latency)), SimHost(folder)
    host = RealHost(
        config.driver_root_ctr_path, host_root=config.nvidia_driver_root, cdi_hook=config.nvidia_cdi_hook_path
    )
    return RealNvml(config.driver_root_ctr_path), host


def read_policy(path: Path | None) -> Policy:
    """The policy file, or the default of everything. ConfigError names the file."""
    if path is None:
        return Policy.default()
    try:
        body = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"policy file {path} cannot be read ({' '.join(str(e).split())}); see docs/policy.md") from e
    try:
        return Policy.parse({} if body is None else body)
    except ConfigError as e:
        raise ConfigError(f"policy file {path}: {e}") from e


def known_gpus(nvml: Nvml, host: Host, path: Path) -> tuple[Gpu, ...]:
    """The node's cards in bus order; one that cannot be read now is as it was when last seen, so that its pool stays."""
    seen = tuple(host.locate(gpu) for gpu in nvml.gpus())
    lost = nvml.lost()
    for sentence in (*lost, *nvml.notes()):
        log.warning("%s", sentence)
    before = {gpu.bus_id: gpu for gpu in _last_seen(path)}
    here = {gpu.bus_id: gpu for gpu in seen}
    # Drivers of about 535 list no profiles while MIG mode is off (NVML field 199): then the list of last time counts.
    for bus_id, gpu in here.items():
        if not gpu.profiles and bus_id in before and before[bus_id].uuid == gpu.uuid:
            here[bus_id] = replace(gpu, profiles=before[bus_id].profiles)
    gpus = tuple(gpu for _, gpu in sorted({**(before if lost else {}), **here}.items()))
    files.write_atomic(path, json.dumps(gpucodec.encode(gpus)))
    return gpus


def _last_seen(path: Path) -> tuple[Gpu, ...]:
    try:
        return gpucodec.decode(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return ()  # the first start, or a torn file of a power loss: then only what is here now is known


# ---------------------------------------------------------------- the driver process


class App:
    """One driver process, built but not yet running."""

    def __init__(self, config: Config) -> None:
        """Build all that needs no event loop. ConfigError, StateError or DeviceError where the node is not ready for us."""
        if not config.node_name:
            raise ConfigError("the node has no name; give --node-name or NODE_NAME (in a pod: fieldRef spec.nodeName)")
        self._config = config
        self.hanging = False
        kind = cdi.kind_of(config.driver_name)
        folder = files.ensure_folder(config.plugin_folder)
        files.ensure_folder(config.kubelet_registrar_directory_path)
        policy = read_policy(config.policy)
        self._kube = Kube(config.kubeconfig)
        self._telemetry = Telemetry()
        self._departures = Departures()
        self._nvml, host = build_node(config)
        gpus = known_gpus(self._nvml, host, folder / "gpus.json")
        for sentence in (*policy.unused(gpus), *host.advice()):
            log.warning("%s", sentence)
        inventory = Inventory.of(gpus, policy, config.node_name)
        self._checkpoint = Checkpoint(folder / "claims", host.boot_id())
        for sentence in self._checkpoint.broken():
            log.error("%s", sentence)
        injector = Injector(host=host, nvml=self._nvml, inventory=inventory, folder=config.cdi_root, kind=kind)
        self._preparer = Preparer(
            nvml=self._nvml,
            checkpoint=self._checkpoint,
            inventory=inventory,
            injector=injector,
            locks=folder / "locks",
        )
        self._inventories = (inventory, Inventory.of(gpus, policy, config.node_name, static=True))
        _note_running(config)

    async def serve(self) -> int:
        """Run until SIGTERM or SIGINT (0), or until a door or a background job is lost (1)."""
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[str] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, stop, "")
        with ThreadPoolExecutor(_FETCHES_AT_ONCE, "claims") as executor, contextlib.ExitStack() as stack:
            service = ClaimService(
                api=self._kube,
                driver=self._config.driver_name,
                preparer=self._preparer,
                departures=self._departures,
                executor=executor,
            )
            offering = self._build_offering(service)
            stack.callback(self._hear_of_departures(loop, offering))
            doors = self._build_doors(service)
            work = (service.recover(), self._collect(service))
            jobs = [loop.create_task(_guarded(job, stop)) for job in work]
            try:
                await asyncio.sleep(0)  # recovery queues for its GPUs before a door can let anybody in
                await doors.open()
                offering.start()
                stack.callback(self._serve_http(doors, offering, service))
                jobs.append(loop.create_task(_guarded(_lost(doors), stop)))
                reason = await stop
            finally:
                for job in jobs:
                    job.cancel()
                await doors.close(0)
                await asyncio.gather(*jobs, return_exceptions=True)
                self.hanging = not await service.close(_DRAIN_S)
                offering.stop()
                self._nvml.close()
        if reason:
            log.error("%s", reason)
        return 1 if reason else 0

    def _build_doors(self, service: ClaimService) -> Doors:
        config = self._config
        return Doors(
            driver=config.driver_name,
            registry=config.kubelet_registrar_directory_path,
            plugin_folder=config.plugin_folder,
            pod_uid=config.pod_uid,
            registration_socket=config.registration_socket,
            claims=service,
            telemetry=self._telemetry,
        )

    def _build_offering(self, service: ClaimService) -> Offering:
        dynamic, static = self._inventories
        surveyor = Surveyor(nvml=self._nvml, checkpoint=self._checkpoint, hung=service.tickets.hung)
        return Offering(
            kube=self._kube,
            driver=self._config.driver_name,
            node=self._config.node_name,
            dynamic=dynamic,
            static=static,
            surveyor=surveyor,
            checkpoint=self._checkpoint,
            folder=self._config.plugin_folder,
        )

    def _hear_of_departures(self, loop: asyncio.AbstractEventLoop, offering: Offering) -> Callable[[], None]:
        """Tell waiting claims, and pools that wait to change, which records were dropped, by whichever instance; returns
        how to stop that."""
        watch = files.FolderWatch(self._checkpoint.folder)

        def heard() -> None:
            self._departures.left([ClaimUid(name.removesuffix(".json")) for name in watch.read()])
            offering.nudge()

        loop.add_reader(watch.fileno(), heard)

        def stop() -> None:
            loop.remove_reader(watch.fileno())
            watch.close()

        return stop

    def _serve_http(self, doors: Doors, offering: Offering, service: ClaimService) -> Callable[[], None]:
        gauge = self._telemetry.gauge
        gauge("gpuslice_prepared_claims", "Claims with a record.", lambda: len(self._checkpoint.records()))
        gauge("gpuslice_hung_gpus", "GPUs with a call that does not come back.", lambda: len(service.tickets.hung()))
        gauge("gpuslice_published", "1 while the API shows what the node offers.", lambda: not offering.problem())
        if not self._config.http_endpoint:
            return lambda: None
        ready: Check = lambda: offering.problem() or doors.status.refusal  # noqa: E731
        server = HttpServer(self._config.http_endpoint, self._telemetry, healthy=doors.probe, ready=ready)
        log.info("metrics and probes on %s", server.address)
        return server.close

    async def _collect(self, service: ClaimService) -> str:
        """Give back what vanished claims hold, once a minute."""
        while True:
            await asyncio.sleep(_COLLECT_PERIOD_S)
            await service.collect(time.monotonic())


async def _lost(doors: Doors) -> str:
    return await doors.lost()


async def _guarded(job: Coroutine[None, None, str | None], stop: asyncio.Future[str]) -> None:
    """A background job that ends with a reason, or fails, ends the process; a finished one does not."""
    try:
        reason = await job
    except Exception as e:  # a bug: better a new process than half a driver
        log.exception("a background job failed")
        reason = f"a background job failed ({type(e).__name__}: {e}); the process ends to be started again"
    if reason:
        _end(stop, reason)


def _end(stop: asyncio.Future[str], reason: str) -> None:
    if not stop.done():
        stop.set_result(reason)


# ---------------------------------------------------------------- a look from outside


@dataclass(frozen=True, slots=True)
class Node:
    """What `devices` and `claims` show."""

    inventory: Inventory
    live: Mapping[GpuUuid, LiveGpu]
    records: Mapping[ClaimUid, Record]
    taints: Taints


@contextlib.contextmanager
def looked_at(config: Config) -> Iterator[Node]:
    """One look at the node beside a driver that may run; changes nothing. What is not said is as `run` had it."""
    config = _as_running(config)
    nvml, host = build_node(config)
    try:
        inventory = Inventory.of(nvml.gpus(), read_policy(config.policy), config.node_name)
        folder = config.plugin_folder / "claims" / host.boot_id()
        checkpoint = Checkpoint(folder.parent, folder.name) if folder.is_dir() else None
        live: dict[GpuUuid, LiveGpu] = {}
        for pool in inventory.pools:
            with contextlib.suppress(DeviceError):
                live[pool.gpu.uuid] = nvml.look(pool.gpu.uuid)
        records = checkpoint.records() if checkpoint is not None else {}
        yield Node(inventory, live, records, health.taints(inventory, live, {}, records.values()))
    finally:
        nvml.close()


def _note_running(config: Config) -> None:
    """Leave a note for `devices` and `claims`, so that they need no flags on the node of a running driver."""
    note = {
        "node_name": config.node_name,
        "policy": str(config.policy or ""),
        "simulate": config.simulate,
        "simulate_folder": str(config.simulate_folder or ""),
        "simulate_latency": config.simulate_latency,
    }
    files.write_atomic(config.plugin_folder / "running.json", json.dumps(note))


def _as_running(config: Config) -> Config:
    path = config.plugin_folder / "running.json"
    if config.node_name or config.simulate or not path.exists():
        return replace(config, node_name=config.node_name or "this-node")
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise StateError(f"{path} cannot be read ({e}); give --node-name, and --simulate if it is simulated") from e
    return replace(
        config,
        node_name=note["node_name"],
        policy=config.policy or (Path(note["policy"]) if note["policy"] else None),
        simulate=note["simulate"],
        simulate_folder=Path(note["simulate_folder"]) if note["simulate_folder"] else None,
        simulate_latency=note.get("simulate_latency", config.simulate_latency),
    )
