"""The wiring: everything is chosen and built here, once; below there are no modes and no "if simulated"."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from gpuslice import node
from gpuslice.checkpoint import Checkpoint
from gpuslice.config import Config
from gpuslice.core import cdi, share
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid
from gpuslice.errors import ConfigError, DeviceError, DriverError
from gpuslice.kube import Kube
from gpuslice.mps.client import MpsClient
from gpuslice.plugin.cdi_writer import Injector
from gpuslice.plugin.claim_queue import Departures
from gpuslice.plugin.prepare import Preparer
from gpuslice.plugin.server import Doors
from gpuslice.plugin.service import ClaimService
from gpuslice.plugin.steps import Steps
from gpuslice.publishing.controller import Offering
from gpuslice.publishing.node_health import Surveyor
from gpuslice.system import files, libc
from gpuslice.telemetry import Check, HttpServer, Telemetry, setup_logging

log = logging.getLogger(__name__)

_MpsState = tuple[str, frozenset[str]]
_AWAY: _MpsState = ("", frozenset())

_COLLECT_PERIOD_S = 60.0
_MPS_PERIOD_S, _MPS_MOST_S = 2.0, 60.0
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
        policy = node.read_policy(config.policy)
        self._kube = Kube(config.kubeconfig)
        self._telemetry = Telemetry()
        self._departures = Departures()
        self._nvml, host = node.build(config)
        gpus = node.known_gpus(self._nvml, host, folder / "gpus.json")
        for sentence in (*policy.unused(gpus), *host.advice()):
            log.warning("%s", sentence)
        static = Inventory.of(gpus, policy, config.node_name, static=True)
        dynamic = Inventory.of(gpus, policy, config.node_name)
        inventory = dynamic.knowing(static)  # a claim is served under whichever plan it was made
        self._checkpoint = Checkpoint(folder / "claims", host.boot_id())
        for sentence in self._checkpoint.broken():
            log.error("%s", sentence)
        self._mps = MpsClient(config.mps_root)
        injector = Injector(
            host=host, nvml=self._nvml, mps=self._mps, inventory=inventory, folder=config.cdi_root, kind=kind
        )
        self._preparer = Preparer(
            nvml=self._nvml,
            checkpoint=self._checkpoint,
            inventory=inventory,
            steps=Steps(self._nvml, self._mps),
            injector=injector,
            locks=folder / "locks",
        )
        self._inventories = (dynamic, static)
        node.note_running(config)

    async def serve(self) -> int:
        """Run until SIGTERM or SIGINT (0), or until a door or a background job is lost (1)."""
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[str] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, stop, "")
        with ThreadPoolExecutor(_FETCHES_AT_ONCE, "claims") as executor, contextlib.ExitStack() as stack:
            service = self._build_service(executor)
            changed = asyncio.Event()
            offering = self._build_offering(service, partial(_set, loop, changed))
            stack.callback(self._hear_of_departures(loop, offering))
            doors = self._build_doors(service)
            work = (
                service.recover(),
                _take_up(service, changed),
                self._collect(service),
                self._keep_mps(service, offering),
            )
            jobs = [loop.create_task(_guarded(job, stop)) for job in work]
            try:
                await asyncio.sleep(0)  # recovery queues for its GPUs before a door can let anybody in
                await doors.open()
                offering.start()
                stack.callback(self._serve_http(doors, offering, service))
                jobs.append(loop.create_task(_guarded(_lost(doors), stop)))
                reason = await stop
            finally:
                await self._close(jobs, doors, service, offering)
        if reason:
            log.error("%s", reason)
        return 1 if reason else 0

    async def _close(
        self, jobs: Sequence[asyncio.Task[None]], doors: Doors, service: ClaimService, offering: Offering
    ) -> None:
        for job in jobs:
            job.cancel()
        await doors.close(0)
        await asyncio.gather(*jobs, return_exceptions=True)
        self.hanging = not await service.close(_DRAIN_S)
        offering.stop()
        self._nvml.close()

    def _build_service(self, executor: Executor) -> ClaimService:
        return ClaimService(
            api=self._kube,
            driver=self._config.driver_name,
            preparer=self._preparer,
            departures=self._departures,
            executor=executor,
        )

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

    def _build_offering(self, service: ClaimService, otherwise: Callable[[], object]) -> Offering:
        dynamic, static = self._inventories
        surveyor = Surveyor(nvml=self._nvml, mps=self._mps, checkpoint=self._checkpoint, hung=service.tickets.hung)
        return Offering(
            kube=self._kube,
            driver=self._config.driver_name,
            node=self._config.node_name,
            dynamic=dynamic,
            static=static,
            surveyor=surveyor,
            checkpoint=self._checkpoint,
            folder=self._config.plugin_folder,
            otherwise=otherwise,
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
        self._telemetry.gauges(
            "gpuslice_prepared_devices",
            "Devices that claims hold.",
            "type",
            {m: partial(self._held, m) for m in share.MODES},
        )
        gauge("gpuslice_mps_daemons_unwell", "MPS daemons in trouble; -1 without supervisor.", self._mps_unwell)
        if not self._config.http_endpoint:
            return lambda: None
        ready: Check = lambda: offering.problem() or doors.status.refusal  # noqa: E731
        server = HttpServer(self._config.http_endpoint, self._telemetry, healthy=doors.probe, ready=ready)
        log.info("metrics and probes on %s", server.address)
        return server.close

    def _held(self, mode: str) -> int:
        records = self._checkpoint.records().values()
        return sum(share.mode(grant) == mode for record in records for grant in record.plan.grants)

    def _mps_unwell(self) -> int:
        try:
            return sum(bool(daemon.problem) for daemon in self._mps.running())
        except DeviceError:
            return -1

    async def _keep_mps(self, service: ClaimService, offering: Offering) -> str:
        """Look after the MPS daemons: where one was lost, or the whole supervisor is another process than before, have
        them ensured again from the records. What is wrong meanwhile is told, and tainted, by the survey.

        What stays wrong is tried after pauses that double: each try holds the card, and a daemon that hangs at its start
        takes ten seconds.
        """
        known, pause_s, due, pending = _AWAY, _MPS_PERIOD_S, 0.0, False
        while True:
            now = await asyncio.to_thread(self._mps_state)
            if now != known:
                for problem in sorted(now[1] - known[1]):
                    log.warning("MPS: %s", problem)
                offering.nudge()
                pause_s, due = _MPS_PERIOD_S, 0.0
            pending = pending or now[0] != known[0] or bool(now[1])
            known = now
            if pending and now != _AWAY and time.monotonic() >= due:
                pause_s, due = min(2 * pause_s, _MPS_MOST_S), time.monotonic() + pause_s
                pending = not await self._mended(service)
            await asyncio.sleep(_MPS_PERIOD_S)

    async def _mended(self, service: ClaimService) -> bool:
        try:
            await service.mend()
        except DriverError as e:  # the daemon's own problem is told and tainted
            log.debug("MPS daemons cannot be mended yet: %s", e)
            return False
        return True

    def _mps_state(self) -> _MpsState:
        """Which supervisor it is, and what is wrong with its daemons; `_AWAY` where none answers."""
        try:
            problems = frozenset(daemon.problem for daemon in self._mps.running() if daemon.problem)
            return self._mps.incarnation(), problems
        except DriverError:
            return _AWAY

    async def _collect(self, service: ClaimService) -> str:
        """Give back what vanished claims hold, and what lost cards kept, once a minute."""
        while True:
            await asyncio.sleep(_COLLECT_PERIOD_S)
            await service.collect(time.monotonic())


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """From another thread, which may outlive the loop."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def _take_up(service: ClaimService, changed: asyncio.Event) -> str:
    """Finish what lost cards kept, when a card is otherwise than it was."""
    while True:
        await changed.wait()
        changed.clear()
        await service.recover()


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
