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
from gpuslice.core import cdi
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid
from gpuslice.errors import ConfigError, HungError
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
from gpuslice.system.threads import ThreadWatch
from gpuslice.telemetry import Check, HttpServer, Telemetry, setup_logging

log = logging.getLogger(__name__)

_COLLECT_PERIOD_S = 60.0
_DRAIN_S = 10.0  # running work is let finish for so long; the DaemonSet's grace period is longer
_FETCHES_AT_ONCE = 8
_DRIVER_PERIOD_S = 2.0  # from one try to list the cards to the next, only where they could not be listed at the start


def run(config: Config) -> int:
    """Run the kubelet plugin until SIGTERM or SIGINT, or until it is of no use any more; the exit code."""
    setup_logging(config.log_level)
    libc.use_one_arena()
    app = App(config)
    code = asyncio.run(app.serve())
    if app.again:
        # As a new process, because a driver that was loaded meanwhile may have brought another library.
        logging.shutdown()
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - our own command line
    if app.hanging:
        # A thread that hangs in NVML would keep the interpreter from ending, and the DaemonSet from starting anew.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return code


class App:
    """One driver process, built but not yet running."""

    def __init__(self, config: Config) -> None:
        """Build all that needs no event loop. ConfigError or StateError where the node is not ready for us.

        Cards that cannot be listed are no reason not to serve: see `nvml/session.py`.
        """
        if not config.node_name:
            raise ConfigError("the node has no name; give --node-name or NODE_NAME (in a pod: fieldRef spec.nodeName)")
        self._config = config
        self.hanging, self.again = False, False
        kind = cdi.kind_of(config.driver_name)
        folder = files.ensure_folder(config.plugin_folder)
        files.ensure_folder(config.kubelet_registrar_directory_path)
        policy = node.read_policy(config.policy)
        self._kube = Kube(config.kubeconfig)
        self._telemetry = Telemetry()
        self._releases = Releases()
        self._nvml, host = hardware.open_session(config)
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
            threads = ThreadWatch(partial(_call_in, loop, _end, stop))
            anew = partial(self._start_anew, stop)
            health = self._build_health(service, partial(self._renew, partial(_call_in, loop, anew)))
            controller = self._build_controller(health, partial(_call_in, loop, changed.set), threads)
            stack.callback(self._watch_records(loop, controller))
            server = self._build_server(service)
            work = (
                service.recover(),
                _retry_lost(service, changed),
                self._await_cards(service, anew),
                self._collect(service),
                MpsUpkeep(self._mps, service.ensure_daemons, controller.nudge).run(),
            )
            jobs = [loop.create_task(_guarded(job, stop)) for job in work]
            try:
                await asyncio.sleep(0)  # recovery queues for its GPUs before the server can let anybody in
                await server.open()
                controller.start()
                healthy: Check = lambda: threads.problem() or server.probe()  # noqa: E731
                ready = partial(self._unready, health, controller, server)
                stack.callback(self._serve_http(controller, service, healthy, ready))
                jobs.append(loop.create_task(_guarded(_lost(server), stop)))
                reason = await stop
            finally:
                await self._close(jobs, server, service, controller)
        if reason:
            log.log(logging.WARNING if self.again else logging.ERROR, "%s", reason)
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

    def _build_health(self, service: ClaimService, renew: Callable[[], bool]) -> NodeHealth:
        return NodeHealth(
            nvml=self._nvml,
            mps=self._mps,
            checkpoint=self._checkpoint,
            hung=service.tickets.hung,
            renew=renew,
        )

    def _build_controller(
        self, health: NodeHealth, on_taints_changed: Callable[[], object], threads: ThreadWatch
    ) -> SliceController:
        dynamic, static = self._inventories
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
            threads=threads,
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
        self, controller: SliceController, service: ClaimService, healthy: Check, ready: Check
    ) -> Callable[[], None]:
        gauges.register(
            self._telemetry, self._checkpoint, self._mps, hung=service.tickets.hung, problem=controller.problem
        )
        if not self._config.http_endpoint:
            return lambda: None
        http = HttpServer(self._config.http_endpoint, self._telemetry, healthy=healthy, ready=ready)
        log.info("metrics and probes on %s", http.address)
        return http.close

    def _unready(self, health: NodeHealth, controller: SliceController, server: PluginServer) -> str | None:
        return self._nvml.problem or health.unreadable or controller.problem() or server.status.refusal

    def _start_anew(self, stop: asyncio.Future[str], reason: str) -> None:
        self.again = self.again or not stop.done()
        _end(stop, reason)

    def _renew(self, anew: Callable[[str], None]) -> bool:
        """Start NVML anew; where that fails, the whole process: the library may be another one by now."""
        if not self._nvml.renew():
            return False
        if problem := self._nvml.problem:
            anew(f"NVML does not start anew, so the process does: {problem}")
        return True

    async def _await_cards(self, service: ClaimService, anew: Callable[[str], None]) -> None:
        """Where the cards could not be listed at the start: wait until they can be, and then start anew to offer them."""
        if not self._nvml.problem:
            return
        log.error("no card is offered, and claims are only unprepared: %s", self._nvml.problem)
        try:
            while not await service.call_apart(self._nvml.comes, "the start of NVML"):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(_DRIVER_PERIOD_S)
        except HungError as e:
            log.error("no card is offered until this process is started again: %s", e)
        else:
            anew("the cards can be listed now; the process starts anew to offer them")

    async def _collect(self, service: ClaimService) -> str:
        """Give back what vanished claims hold, and what lost cards kept, once a minute."""
        while True:
            await asyncio.sleep(_COLLECT_PERIOD_S)
            await service.collect(time.monotonic())


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """From another thread, which may outlive the loop."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(call, *arguments)


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
