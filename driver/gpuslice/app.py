"""The wiring: this module chooses and builds every part once. The other modules have no modes and no "if simulated"."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial

from gpuslice import hardware, node, preflight
from gpuslice.checkpoint import Checkpoint
from gpuslice.config import Config, check_cdi_root
from gpuslice.core import cards, cdi
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import ClaimUid
from gpuslice.errors import HungError, StateError
from gpuslice.jobs import FAILED, Stop, call_in, end, guarded
from gpuslice.kube import Kube
from gpuslice.mps.client import MpsClient
from gpuslice.plugin import gauges
from gpuslice.plugin.cdi_writer import CdiWriter
from gpuslice.plugin.mps_upkeep import MpsUpkeep
from gpuslice.plugin.prepare import Preparer
from gpuslice.plugin.releases import Releases
from gpuslice.plugin.server import PluginServer
from gpuslice.plugin.service import ClaimService
from gpuslice.plugin.steps import StepExecutor
from gpuslice.publishing import node_health
from gpuslice.publishing.controller import SliceController
from gpuslice.publishing.node_health import NodeHealth
from gpuslice.system import files, libc
from gpuslice.system.folder_watch import FolderWatch
from gpuslice.system.threads import ThreadWatch
from gpuslice.telemetry import Telemetry, setup_logging
from gpuslice.web import site
from gpuslice.web.endpoint import Endpoint
from gpuslice.web.server import HttpServer

log = logging.getLogger(__name__)

_COLLECT_PERIOD_S = 60.0
_DRAIN_S = 10.0  # time for running work to finish; the DaemonSet's grace period is longer
_FETCHES_AT_ONCE = 8
_GLANCE_S = 1.0  # for the page: a person does not wait as long as `node_health.LIMIT_S`
_KUBELET_S = 3.0  # the kubelet looks for new drivers once a second
_DRIVER_PERIOD_S = 2.0  # between two tries to list the cards, if they could not be listed at the start


def run(config: Config) -> int:
    """Run the kubelet plugin until SIGTERM or SIGINT, or until a part of it fails permanently. Returns the exit code."""
    setup_logging(config.log_level)
    libc.use_one_arena()
    app = App(config)
    code = asyncio.run(app.serve())
    if app.again:
        # Start a new process, because a driver that was loaded in the meantime may have another library.
        logging.shutdown()
        sys.stderr.flush()
        os.execv(sys.executable, sys.orig_argv)  # noqa: S606 - our own command line
    if app.hanging:
        # A thread that hangs in NVML would block the end of the interpreter, and so the restart by the DaemonSet.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)
    return code


class App:
    """One driver process, built but not yet running."""

    def __init__(self, config: Config) -> None:
        """Build all parts that need no event loop. ConfigError or StateError if the node is not ready.

        If the cards cannot be listed, the driver serves nevertheless: see `nvml/session.py`.
        """
        preflight.check(config)
        self._config = config
        self.hanging, self.again = False, False
        self._endpoint = Endpoint.parse(config.http_endpoint) if config.http_endpoint else None
        kind = cdi.kind_of(config.driver_name)
        folder = config.plugin_folder
        policy = node.read_policy(config.policy)
        self._kube = Kube(config.kubeconfig)
        check_cdi_root(config.cdi_root)
        self._telemetry = Telemetry()
        self._releases = Releases()
        self._nvml, host = hardware.open_session(config)
        self._cards = node.Cards(self._nvml, host, folder)
        gpus, sentences = self._cards.known()
        self._gpus = gpus
        static = Inventory.of(gpus, policy, config.node_name, static=True)
        dynamic = Inventory.of(gpus, policy, config.node_name)
        misfits = node.sentences((*dynamic.notes, *static.notes), config.policy)
        for sentence in (*sentences, *self._nvml.notes(), *policy.unused(gpus), *misfits, *host.advice()):
            log.warning("%s", sentence)
        inventory = dynamic.knowing(static)  # the driver serves claims that were made under either plan
        # Folders are made only now, so that a start with wrong settings leaves none.
        files.ensure_folder(folder)
        files.ensure_folder(config.kubelet_registrar_directory_path)
        self._checkpoint = Checkpoint(folder / "claims", host.boot_id())
        self._checkpoint.records()  # the log names unreadable records
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
        for save in (partial(self._cards.save, gpus), partial(node.save_settings, config)):
            try:
                save()
            except StateError as e:  # on a full disk unprepare still works, and `devices` still needs the flags
                log.warning("%s", e)

    async def serve(self) -> int:
        """Run until SIGTERM or SIGINT (0), a socket or a background job is lost (1), or the API server refuses us (4)."""
        loop = asyncio.get_running_loop()
        stop: Stop = loop.create_future()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, stop, 0, "")
        with ThreadPoolExecutor(_FETCHES_AT_ONCE, "claims") as executor, contextlib.ExitStack() as stack:
            service = self._build_service(executor)
            changed = asyncio.Event()
            threads = ThreadWatch(partial(call_in, loop, end, stop, FAILED))
            anew = partial(self._start_anew, stop)
            health = self._build_health(
                service, node_health.LIMIT_S, partial(self._renew, partial(call_in, loop, anew))
            )
            controller = self._build_controller(health, partial(call_in, loop, changed.set), threads)
            stack.callback(self._watch_records(loop, controller))
            server = self._build_server(service, controller.catch_up)
            work = (
                service.recover,
                partial(_retry_lost, service, changed),
                partial(self._await_cards, service, anew),
                partial(self._collect, service, anew),
                MpsUpkeep(self._mps, service.ensure_daemons, controller.nudge).run,
            )
            jobs = [loop.create_task(guarded(job, stop)) for job in work]
            try:
                await asyncio.sleep(0)  # recovery queues for its GPUs before the server accepts a claim
                await server.open()
                controller.start()
                healthy: site.Check = lambda: threads.problem() or server.probe()  # noqa: E731
                ready = partial(self._unready, health, controller, server)
                stack.callback(self._serve_http(controller, service, healthy, ready, threads))
                last = (server.lost, partial(_refused, controller))
                jobs += [loop.create_task(guarded(job, stop)) for job in last]
                code, reason = await stop
            finally:
                await self._close(jobs, server, service, controller)
        if reason:
            log.log(logging.WARNING if self.again else logging.ERROR, "%s", reason)
        return code

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
        await asyncio.to_thread(self._nvml.close)
        self.hanging = self.hanging or self._nvml.hangs

    def _build_service(self, executor: Executor) -> ClaimService:
        return ClaimService(
            api=self._kube,
            driver=self._config.driver_name,
            preparer=self._preparer,
            releases=self._releases,
            executor=executor,
        )

    def _build_server(self, service: ClaimService, registered: Callable[[], None]) -> PluginServer:
        config = self._config
        return PluginServer(
            driver=config.driver_name,
            registry=config.kubelet_registrar_directory_path,
            plugin_folder=config.plugin_folder,
            pod_uid=config.pod_uid,
            pod_namespace=config.pod_namespace,
            registration_socket=config.registration_socket,
            claims=service,
            telemetry=self._telemetry,
            registered=registered,
        )

    def _build_health(
        self, service: ClaimService, limit_s: float, renew: Callable[[], bool] = lambda: False
    ) -> NodeHealth:
        return NodeHealth(
            nvml=self._nvml,
            mps=self._mps,
            checkpoint=self._checkpoint,
            hung=service.tickets.hung,
            renew=renew,
            refused=self._nvml.refused,
            limit_s=limit_s,
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
            kubelet_s=_KUBELET_S,
        )

    def _watch_records(self, loop: asyncio.AbstractEventLoop, controller: SliceController) -> Callable[[], None]:
        """Tell waiting claims and waiting pools which records were dropped, by this instance or another one. Returns a
        function that stops this."""
        watch = FolderWatch(self._checkpoint.folder)

        def read_news() -> None:
            self._releases.notify([ClaimUid(name.removesuffix(".json")) for name in watch.read()])
            controller.nudge()

        loop.add_reader(watch.fileno(), read_news)

        def stop() -> None:
            loop.remove_reader(watch.fileno())
            watch.close()

        return stop

    def _serve_http(
        self,
        controller: SliceController,
        service: ClaimService,
        healthy: site.Check,
        ready: site.Check,
        threads: ThreadWatch,
    ) -> Callable[[], None]:
        gauges.register(
            self._telemetry, self._checkpoint, self._mps, hung=service.tickets.hung, problem=controller.problem
        )
        if self._endpoint is None:
            return lambda: None
        health = self._build_health(service, _GLANCE_S)
        http = HttpServer(
            self._endpoint,
            site.public(metrics=self._telemetry.exposition, healthy=healthy, ready=ready),
            private=site.private(
                node=self._config.node_name,
                survey=lambda: health.survey(controller.inventory),
                healthy=healthy,
                ready=ready,
            ),
            threads=threads,
        )
        log.info("serving metrics and probes on %s", http.address)
        return http.close

    def _unready(self, health: NodeHealth, controller: SliceController, server: PluginServer) -> str | None:
        problem = self._nvml.problem or health.unreadable or controller.problem() or server.status.refusal
        return problem or next(cards.none_of(self._gpus), None)

    def _start_anew(self, stop: Stop, reason: str) -> None:
        self.again = self.again or not stop.done()
        end(stop, FAILED, reason)

    def _renew(self, anew: Callable[[str], None]) -> bool:
        """Start NVML again. If that fails, start the whole process again, because the library may have changed."""
        if not self._nvml.renew():
            return False
        if problem := self._nvml.problem:
            anew(f"NVML does not start again, so the process restarts: {problem}")
        return True

    async def _await_cards(self, service: ClaimService, anew: Callable[[str], None]) -> None:
        """If the cards could not be listed at the start, wait until they can be listed. Then start again to offer them."""
        if not self._nvml.problem:
            return
        log.error(
            "offering no card, and only unpreparing claims, because the cards cannot be listed: %s", self._nvml.problem
        )
        try:
            while not await service.call_apart(self._nvml.comes, "the start of NVML"):  # noqa: ASYNC110 - there is no event
                await asyncio.sleep(_DRIVER_PERIOD_S)
        except HungError as e:
            log.error("offering no card until this process is started again: %s", e)
        else:
            anew("the cards can be listed now; the process restarts to offer them")

    async def _collect(self, service: ClaimService, anew: Callable[[str], None]) -> None:
        """Repair CDI files at once and each minute. Once a minute, unprepare deleted claims, undo the rest on lost cards,
        and restart if there is a new card."""
        while True:
            await service.mend()
            await asyncio.sleep(_COLLECT_PERIOD_S)
            await service.collect(time.monotonic())
            if news := await asyncio.to_thread(self._cards.news, self._gpus):
                anew(news)


async def _retry_lost(service: ClaimService, changed: asyncio.Event) -> str:
    """Undo the rest on lost cards, each time that the taints of a card have changed."""
    while True:
        await changed.wait()
        changed.clear()
        await service.recover()


async def _refused(controller: SliceController) -> None:
    await asyncio.wrap_future(controller.refused)
