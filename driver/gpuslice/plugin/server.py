"""The endpoints for the kubelet: registration, and DRA v1 and v1beta1 from one servicer, over unix sockets (grpc.aio).

Contract facts: the kubelet allows 1 s for GetInfo and 45 s for a DRA call. It takes the first entry of
`supported_versions` that it knows. The DRA socket must listen before the registration socket appears. When a server of
C-core stops, it unlinks its socket path, even if a newer process has bound the path (measured on grpcio 1.85). So two
instances never use the same names: a rolling update puts the pod's UID into both names, and a lock for each name refuses
a second instance.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

from gpuslice.core.model import ClaimRef, ClaimUid
from gpuslice.core.record import PreparedClaim, PreparedDevice
from gpuslice.errors import ConfigError, DriverError
from gpuslice.pb import (
    dra_v1_pb2,
    dra_v1_pb2_grpc,
    dra_v1beta1_pb2,
    dra_v1beta1_pb2_grpc,
    registration_v1_pb2,
    registration_v1_pb2_grpc,
)
from gpuslice.plugin import sockets
from gpuslice.system import refusals
from gpuslice.system.folder_watch import FolderWatch
from gpuslice.telemetry import Telemetry

log = logging.getLogger(__name__)

VERSIONS = ("v1.DRAPlugin", "v1beta1.DRAPlugin")
_KUBELET_PATIENCE_S = 45.0

T = TypeVar("T")
Message = Any  # generated messages of two versions with the same fields; protoc's stubs have no common type


class ClaimHandler(Protocol):
    async def prepare(self, ref: ClaimRef, timeout_s: float) -> PreparedClaim: ...

    async def unprepare(self, uid: ClaimUid) -> None: ...


# ---------------------------------------------------------------- services


class DraService:
    """NodePrepareResources and NodeUnprepareResources of one version. `messages` is the message module of the version."""

    def __init__(self, messages: ModuleType, claims: ClaimHandler, telemetry: Telemetry) -> None:
        self._pb = messages
        self._claims = claims
        self._telemetry = telemetry
        self._has_share_id = "share_id" in messages.Device.DESCRIPTOR.fields_by_name

    async def NodePrepareResources(self, request: Message, context: Any) -> Message:  # noqa: N802 - gRPC's name
        patience = context.time_remaining() or _KUBELET_PATIENCE_S
        answers = await _all([self._answer("prepare", c, self._prepare(c, patience)) for c in request.claims])
        return self._pb.NodePrepareResourcesResponse(claims=dict(answers))

    async def NodeUnprepareResources(self, request: Message, context: Any) -> Message:  # noqa: N802 - gRPC's name
        answers = await _all([self._answer("unprepare", c, self._unprepare(c)) for c in request.claims])
        return self._pb.NodeUnprepareResourcesResponse(claims=dict(answers))

    async def _prepare(self, message: Message, patience: float) -> Message:
        ref = ClaimRef(message.namespace, message.name, ClaimUid(message.uid))
        prepared = await self._claims.prepare(ref, patience)
        return self._pb.NodePrepareResourceResponse(devices=[self._device(device) for device in prepared.devices])

    async def _unprepare(self, message: Message) -> Message:
        await self._claims.unprepare(ClaimUid(message.uid))
        return self._pb.NodeUnprepareResourceResponse()

    async def _answer(self, operation: str, message: Message, work: Awaitable[Message]) -> tuple[str, Message]:
        """The claim's entry in the answer: its result, or the error sentence for the pod's events."""
        empty = (
            self._pb.NodePrepareResourceResponse if operation == "prepare" else self._pb.NodeUnprepareResourceResponse
        )
        claim = f"{message.namespace}/{message.name} ({message.uid})"
        try:
            with self._telemetry.request(operation):
                try:
                    answer = await _translated(work)
                except DriverError as e:
                    log.error("%s refused claim=%s: %s", operation, claim, e)
                    raise
                except Exception:
                    log.exception("%s failed unexpectedly claim=%s", operation, claim)
                    raise
                # After this turn of the loop, so that the line does not delay the answer.
                asyncio.get_running_loop().call_soon(log.info, "%s done claim=%s", operation, claim)
                return message.uid, answer
        except DriverError as e:
            return message.uid, empty(error=str(e))
        except Exception as e:  # noqa: BLE001 - logged above; a bug with one claim must not fail the other claims
            return message.uid, empty(error=f"internal error of the driver, see its log: {type(e).__name__}: {e}")

    def _device(self, device: PreparedDevice) -> Message:
        message = self._pb.Device(
            request_names=[device.request],
            pool_name=device.device.pool,
            device_name=device.device.device,
            cdi_device_ids=list(device.cdi_ids),
        )
        if self._has_share_id and device.share_id is not None:
            message.share_id = device.share_id
        return message


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, which run at once. One alone needs no task of its own, and so three turns of the loop less."""
    if len(works) == 1:
        return [await works[0]]
    return await asyncio.gather(*works)


class RegistrationService:
    """Answers the kubelet's plugin watcher. It asks for the driver's name, then reports whether the registration succeeded."""

    def __init__(self, driver: str, endpoint: Path, registered: Callable[[], None]) -> None:
        self._registered = registered
        self._info = registration_v1_pb2.PluginInfo(
            type="DRAPlugin", name=driver, endpoint=str(endpoint), supported_versions=list(VERSIONS)
        )
        self.refusal: str | None = (
            "the kubelet has not called the driver yet; check that --kubelet-registrar-directory-path is the kubelet's folder"
        )

    async def GetInfo(self, request: Message, context: Any) -> Message:  # noqa: N802 - gRPC's name
        return self._info

    async def NotifyRegistrationStatus(self, request: Message, context: Any) -> Message:  # noqa: N802 - gRPC's name
        if request.plugin_registered:
            log.info("registered with the kubelet driver=%s", self._info.name)
            self.refusal = None
            self._registered()
            return registration_v1_pb2.RegistrationStatusResponse()
        self.refusal = f"the kubelet refused to register driver {self._info.name}: {request.error}"
        log.error("%s", self.refusal)
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        raise AssertionError("abort raises")


# ---------------------------------------------------------------- the server


class PluginServer:
    """Both servers and their sockets. `lost` returns a sentence if one of them is gone while the driver runs."""

    def __init__(
        self,
        *,
        driver: str,
        registry: Path,
        plugin_folder: Path,
        pod_uid: str,
        pod_namespace: str,
        registration_socket: str,
        claims: ClaimHandler,
        telemetry: Telemetry,
        registered: Callable[[], None],
    ) -> None:
        """`registered`: called on the event loop after each registration, so also after a restart of the kubelet."""
        self.endpoint, self.registration = sockets.paths(
            driver=driver,
            registry=registry,
            plugin_folder=plugin_folder,
            pod_uid=pod_uid,
            registration_socket=registration_socket,
        )
        self._lock = sockets.exclusive(self.endpoint, pod_namespace)
        sockets.remove_dead(registry, plugin_folder, driver)
        self.status = RegistrationService(driver, self.endpoint, registered)
        self._services = (
            (dra_v1_pb2_grpc.add_DRAPluginServicer_to_server, DraService(dra_v1_pb2, claims, telemetry)),
            (dra_v1beta1_pb2_grpc.add_DRAPluginServicer_to_server, DraService(dra_v1beta1_pb2, claims, telemetry)),
            (registration_v1_pb2_grpc.add_RegistrationServicer_to_server, self.status),
        )
        self._servers: list[grpc.aio.Server] = []

    async def open(self) -> None:
        """Listen: first on the DRA socket, then on the registration socket, which the kubelet watches. Both serve everything,
        for kubelets that use the registration socket as the endpoint."""
        for path in (self.endpoint, self.registration):
            server = grpc.aio.server()
            for add, service in self._services:
                add(service, server)  # type: ignore[no-untyped-call]
            _bind(server, path)
            await server.start()
            self._servers.append(server)
            log.info("serving the kubelet on %s", path)

    async def lost(self) -> str:
        """Wait until a server ends or a socket is removed, which only a restart repairs. Returns a sentence that names it."""
        loop = asyncio.get_running_loop()
        watches = [FolderWatch(path.parent, arrivals=True) for path in (self.endpoint, self.registration)]
        changed = asyncio.Event()
        try:
            for watch in watches:
                loop.add_reader(watch.fileno(), changed.set)
            ends = [asyncio.ensure_future(server.wait_for_termination()) for server in self._servers]
            while True:
                news = asyncio.ensure_future(changed.wait())
                await asyncio.wait([news, *ends], return_when=asyncio.FIRST_COMPLETED)
                news.cancel()
                changed.clear()
                for watch in watches:
                    watch.read()
                gone = [str(p) for p in (self.endpoint, self.registration) if not p.is_socket()]
                if gone or any(end.done() for end in ends):
                    return (
                        f"the server on {', '.join(gone) or 'a socket'} is gone; the process ends, so that the kubelet "
                        "starts a new one"
                    )
        finally:
            for watch in watches:
                loop.remove_reader(watch.fileno())
                watch.close()

    async def close(self, grace_s: float) -> None:
        """Stop both servers and unlink their sockets; registration first, so that the kubelet calls the next instance."""
        for server in reversed(self._servers):
            await server.stop(grace_s)
        self._servers.clear()

    def probe(self, timeout_s: float = 1.0) -> str | None:
        """Call both sockets of the driver like the kubelet. None if both answer. It blocks. For /healthz."""
        for path, method in (
            (self.registration, "/pluginregistration.Registration/GetInfo"),
            (self.endpoint, "/k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin/NodePrepareResources"),
        ):
            try:
                with grpc.insecure_channel(f"unix:{path}") as channel:
                    call: Any = channel.unary_unary(method)
                    call(b"", timeout=timeout_s)  # an empty message is the same in every type
            except grpc.RpcError as e:
                return f"socket {path} does not answer ({e}); restart the driver"
        return None


async def _translated(work: Awaitable[Message]) -> Message:
    try:
        return await work
    except OSError as e:  # e.g. no descriptors or a failing disk: no mistake of ours, and the pod's events name it
        raise refusals.untranslated(e) from e


def _bind(server: grpc.aio.Server, path: Path) -> None:
    """Bind with access for root only. Replaces a stale socket of a killed process and refuses any other file."""
    with refusals.translated("bind", path):
        if path.exists() and not path.is_socket():
            raise ConfigError(f"{path} exists and is not a socket; remove it to let the driver listen there")
        path.unlink(missing_ok=True)
    before = os.umask(0o077)
    try:
        server.add_insecure_port(f"unix:{path}")
    except RuntimeError as e:
        raise ConfigError(f"cannot listen on {path} ({e}); check that its folder exists and is writable") from e
    finally:
        os.umask(before)
