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

from gpuslice import hardware, node
from gpuslice.checkpoint import Checkpoint
from gpuslice.config import Config
from gpuslice.core import cards, cdi
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid
from gpuslice.errors import ConfigError
from gpuslice.kube import Kube
from gpuslice.mps.client import MpsClient
from gpuslice.plugin import gauges
from gpuslice.plugin.cdi_writer import CdiWriter
from gpuslice.plugin.claim_queue import Releases
from gpuslice.plugin.mps_upkeep import MpsUpkeep
from gpuslice.plugin.prepare import Preparer
from gpuslice.plugin.server import PluginServer
from gpuslice.plugin.service import ClaimService
from gpuslice.plugin.steps import StepExecutor
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.system import files, libc
from gpuslice.telemetry import Check, HttpServer, Telemetry, setup_logging

log = logging.getLogger(__name__)

_COLLECT_PERIOD_S = 60.0
_DRAIN_S = 10.0  # running work is let finish for so long; the DaemonSet's grace period is longer
_FETCHES_AT_ONCE = 8


def run(config: Config) -> int:
    """Run the kubelet plugin until SIGTERM or SIGINT, or until it is of no use any more; the exit code."""
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
        self._releases = Releases()
        self._nvml, host = hardware.open_node(config)
        self._cards = node.Cards(self._nvml, host, folder)
        self._gpus = gpus = self._cards.remember()
        static = Inventory.of(gpus, policy, config.node_name, static=True)
        dynamic = Inventory.of(gpus, policy, config.node_name)
        for sentence in dict.fromkeys((*policy.unused(gpus), *dynamic.notes, *static.notes, *host.advice())):
            log.warning("%s", sentence)
        inventory = dynamic.knowing(static)  # a claim is served under whichever plan it was made
        self._checkpoint = Checkpoint(folder / "claims", host.boot_id())
        for sentence in self._checkpoint.broken():
            log.error("%s", sentence)
        self._mps = MpsClient(config.mps_root)
        cdi_writer = CdiWriter(
            host=host, nvml=self._nvml, mps=self._mps, inventory=inventory, folder=config.cdi_root, kind=kind
        )
        self._preparer = Preparer(
            nvml=self._nvml,
            checkpoint=self._checkpoint,
            inventory=inventory,
            steps=StepExecutor(self._nvml, self._mps),
            cdi_writer=cdi_writer,
            locks=folder / "locks",
        )
        self._inventories = (dynamic, static)
        node.save_settings(config)

    async def serve(self) -> int:
        """Run until SIGTERM or SIGINT (0), or until a socket or a background job is lost (1)."""
        loop = asyncio.get_running_loop()
        stop: asyncio.Future[str] = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _end, stop, "")
        with ThreadPoolExecutor(_FETCHES_AT_ONCE, "claims") as executor, contextlib.ExitStack() as stack:
            service = self._build_service(executor)
            changed = asyncio.Event()
            controller = self._build_controller(service, partial(_set, loop, changed))
            stack.callback(self._watch_records(loop, controller))
            server = self._build_server(service)
            work = (
                service.recover(),
                _retry_lost(service, changed),
                self._collect(service),
                MpsUpkeep(self._mps, service.ensure_daemons, controller.nudge).run(),
            )
            jobs = [loop.create_task(_guarded(job, stop)) for job in work]
            try:
                await asyncio.sleep(0)  # recovery queues for its GPUs before the server can let anybody in
                await server.open()
                controller.start()
                stack.callback(self._serve_http(server, controller, service))
                jobs.append(loop.create_task(_guarded(_lost(server), stop)))
                reason = await stop
            finally:
                await self._close(jobs, server, service, controller)
        if reason:
            log.error("%s", reason)
        return 1 if reason else 0

    async def _close(
        self,
        jobs: Sequence[asyncio.Task[None]],
        server: PluginServer,
        service: ClaimService,
        controller: SliceController,
    ) -> None:
        for job in jobs:
            job.cancel()
        await server.close(0)
        await asyncio.gather(*jobs, return_exceptions=True)
        self.hanging = not await service.close(_DRAIN_S)
        controller.stop()
        self._nvml.close()

    def _build_service(self, executor: Executor) -> ClaimService:
        return ClaimService(
            api=self._kube,
            driver=self._config.driver_name,
            preparer=self._preparer,
            releases=self._releases,
            executor=executor,
        )

    def _build_server(self, service: ClaimService) -> PluginServer:
        config = self._config
        return PluginServer(
            driver=config.driver_name,
            registry=config.kubelet_registrar_directory_path,
            plugin_folder=config.plugin_folder,
            pod_uid=config.pod_uid,
            registration_socket=config.registration_socket,
            claims=service,
            telemetry=self._telemetry,
        )

    def _build_controller(self, service: ClaimService, on_taints_changed: Callable[[], object]) -> SliceController:
        dynamic, static = self._inventories
        health = NodeHealth(nvml=self._nvml, mps=self._mps, checkpoint=self._checkpoint, hung=service.tickets.hung)
        return SliceController(
            kube=self._kube,
            driver=self._config.driver_name,
            node=self._config.node_name,
            dynamic=dynamic,
            static=static,
            health=health,
            checkpoint=self._checkpoint,
            folder=self._config.plugin_folder,
            on_taints_changed=on_taints_changed,
        )

    def _watch_records(self, loop: asyncio.AbstractEventLoop, controller: SliceController) -> Callable[[], None]:
        """Tell waiting claims, and pools that wait to change, which records were dropped, by whichever instance; returns
        how to stop that."""
        watch = files.FolderWatch(self._checkpoint.folder)

        def read_news() -> None:
            self._releases.notify([ClaimUid(name.removesuffix(".json")) for name in watch.read()])
            controller.nudge()

        loop.add_reader(watch.fileno(), read_news)

        def stop() -> None:
            loop.remove_reader(watch.fileno())
            watch.close()

        return stop

    def _serve_http(
        self, server: PluginServer, controller: SliceController, service: ClaimService
    ) -> Callable[[], None]:
        gauges.register(
            self._telemetry, self._checkpoint, self._mps, hung=service.tickets.hung, problem=controller.problem
        )
        if not self._config.http_endpoint:
            return lambda: None
        ready: Check = lambda: controller.problem() or server.status.refusal or next(cards.none_of(self._gpus), None)  # noqa: E731
        http = HttpServer(self._config.http_endpoint, self._telemetry, healthy=server.probe, ready=ready)
        log.info("metrics and probes on %s", http.address)
        return http.close

    async def _collect(self, service: ClaimService) -> str:
        """Once a minute give back what vanished claims hold, and what lost cards kept; ends when there is a new card."""
        while True:
            await asyncio.sleep(_COLLECT_PERIOD_S)
            await service.collect(time.monotonic())
            if news := await asyncio.to_thread(self._cards.news, self._gpus):
                return news


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """From another thread, which may outlive the loop."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


async def _retry_lost(service: ClaimService, changed: asyncio.Event) -> str:
    """Finish what lost cards kept, each time that the taints of a card have changed."""
    while True:
        await changed.wait()
        changed.clear()
        await service.recover()


async def _lost(server: PluginServer) -> str:
    return await server.lost()


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
