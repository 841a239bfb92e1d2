"""A stand-in for the kubelet's side of a DRA driver: it finds plugins by their sockets, registers them and calls them.

Like the real kubelet (kubernetes, `pluginmanager` and `cm/dra`, 1.37): its validation, the choice of the service version,
its timeouts, one long-lived connection per endpoint, the choice among several plugins of one driver, and its checks of an
answer. Left out: pods, checkpoints, the health stream, the removal of ResourceSlices. A new object on the same folder is a
restarted kubelet. It belongs to one event loop; no method is safe in another thread.
"""

from __future__ import annotations

import asyncio
import re
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import grpc
import grpc.aio

from gpuslice.core.model import ClaimRef, ClaimUid
from gpuslice.pb import (
    dra_v1_pb2,
    dra_v1_pb2_grpc,
    dra_v1beta1_pb2,
    dra_v1beta1_pb2_grpc,
    registration_v1_pb2,
    registration_v1_pb2_grpc,
)
from gpuslice.system.folder_watch import FolderWatch

V1, V1BETA1 = "v1.DRAPlugin", "v1beta1.DRAPlugin"
_MESSAGES: dict[str, ModuleType] = {V1: dra_v1_pb2, V1BETA1: dra_v1beta1_pb2}
_STUBS: dict[str, Callable[[grpc.aio.Channel], Any]] = {
    V1: dra_v1_pb2_grpc.DRAPluginStub,
    V1BETA1: dra_v1beta1_pb2_grpc.DRAPluginStub,
}
_REGISTRATION: Callable[[grpc.aio.Channel], Any] = registration_v1_pb2_grpc.RegistrationStub

_DIAL_S, _GET_INFO_S, _NOTIFY_S, _RPC_S, _RETRY_S = 10.0, 1.0, 5.0, 45.0, 0.5
_DRIVER_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_CDI_ID = re.compile(
    r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]/[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]=[A-Za-z0-9]([\w.:-]*[A-Za-z0-9])?"
)

# By default, channels to the same path share a connection and its backoff. Then a plugin that comes back would have to
# wait for the long backoff of its predecessor.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.default_authority", "localhost"))


class KubeletError(Exception):
    """An error that the kubelet would report for a plugin or a pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One device of an answer. `share_id` is None if the version or the device has none."""

    requests: tuple[str, ...]
    pool: str
    device: str
    cdi_ids: tuple[str, ...]
    share_id: str | None = None


@dataclass(frozen=True, slots=True)
class PluginAnswer:
    """The entry of one claim. With an error it has no devices, even if the plugin sent some."""

    error: str = ""
    devices: tuple[Given, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Plugin:
    """A registered plugin: one endpoint of a driver. `order` grows with each registration."""

    driver: str
    endpoint: str
    version: str
    order: int
    channel: grpc.aio.Channel

    def connected(self) -> bool:
        return self.channel.get_state(try_to_connect=True) == grpc.ChannelConnectivity.READY


@dataclass(slots=True)
class _Socket:
    """A registration socket: its file, the task that registers it, and the result."""

    identity: tuple[int, int]
    work: asyncio.Task[None]
    plugin: Plugin | None = None


class StandInKubelet:
    """Use it as `async with StandInKubelet(registry) as kubelet`. `versions`: the services that this kubelet knows.

    refusals: for each registration socket that was refused, by file name, the last reason.
    """

    def __init__(self, registry: Path, *, versions: Sequence[str] = (V1, V1BETA1)) -> None:
        self.refusals: dict[str, str] = {}
        self._registry = registry
        self._versions = versions
        self._sockets: dict[Path, _Socket] = {}
        self._moved = asyncio.Condition()
        self._count = 0
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> StandInKubelet:
        self._loop = asyncio.get_running_loop()
        self._watch = FolderWatch(self._registry, arrivals=True)
        self._loop.add_reader(self._watch.fileno(), self._news)
        self._scan()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.remove_reader(self._watch.fileno())
        self._watch.close()
        for path in list(self._sockets):
            self._forget(path, grace_s=None)
        await asyncio.gather(*self._closing, return_exceptions=True)

    # ---------------------------------------------------------------- for pods

    async def prepare(
        self, claims: Iterable[ClaimRef], *, driver: str = "", timeout_s: float = _RPC_S
    ) -> dict[ClaimUid, PluginAnswer]:
        """NodePrepareResources for the claims of one pod in one call. `driver` is optional if there is only one.

        KubeletError: no plugin, no answer in time, or an answer that breaks the contract. Errors of single claims are
        in the answers. A real pod would not start with any of these errors.
        """
        response = await self._call("NodePrepareResources", claims, driver, timeout_s)
        answers = {ClaimUid(uid): _answer(entry) for uid, entry in response.items()}
        for uid, answer in answers.items():
            for given in answer.devices:
                _check_device(uid, given)
        return answers

    async def unprepare(
        self, claims: Iterable[ClaimRef], *, driver: str = "", timeout_s: float = _RPC_S
    ) -> dict[ClaimUid, str]:
        """NodeUnprepareResources. Returns the error of each claim, "" for success."""
        response = await self._call("NodeUnprepareResources", claims, driver, timeout_s)
        return {ClaimUid(uid): entry.error for uid, entry in response.items()}

    async def _call(self, method: str, claims: Iterable[ClaimRef], driver: str, timeout_s: float) -> dict[str, Any]:
        plugin = self._chosen(driver)
        messages = _MESSAGES[plugin.version]
        refs = [messages.Claim(namespace=ref.namespace, name=ref.name, uid=ref.uid) for ref in claims]
        call = getattr(_STUBS[plugin.version](plugin.channel), method)
        try:
            response = await call(getattr(messages, f"{method}Request")(claims=refs), timeout=timeout_s)
        except grpc.aio.AioRpcError as e:
            raise KubeletError(f"{method} of {plugin.driver} failed: {e.code().name}: {e.details()}") from e
        answered = dict(response.claims)
        if strangers := answered.keys() - {ref.uid for ref in refs}:
            raise KubeletError(
                f"{method} of {plugin.driver} answered for claims that were not requested: {sorted(strangers)}"
            )
        if skipped := len(refs) - len(answered):
            raise KubeletError(f"{method} of {plugin.driver} skipped {skipped} ResourceClaims")
        return answered

    # ---------------------------------------------------------------- plugins

    def plugins(self, driver: str = "") -> tuple[Plugin, ...]:
        """Registered plugins, oldest first."""
        found = (socket.plugin for socket in self._sockets.values() if socket.plugin is not None)
        return tuple(sorted((p for p in found if driver in ("", p.driver)), key=lambda plugin: plugin.order))

    async def wait_registered(self, driver: str, *, count: int = 1, after: int = 0, timeout_s: float = 30.0) -> Plugin:
        """Wait until `count` plugins of the driver are registered. Returns the newest. KubeletError says what is missing.

        `after`: count only registrations with a greater `order`. The plugin of a killed process stays until its socket is
        removed.
        """

        def there() -> bool:
            return sum(plugin.order > after for plugin in self.plugins(driver)) >= count

        await self._until(there, driver, timeout_s)
        return self.plugins(driver)[-1]

    async def wait_deregistered(self, driver: str, *, timeout_s: float = 30.0) -> None:
        """Wait until no plugin of the driver is left."""
        await self._until(lambda: not self.plugins(driver), driver, timeout_s)

    async def wait_refused(self, *, timeout_s: float = 30.0) -> str:
        """Wait until a registration fails. Returns the reason."""
        await self._until(lambda: bool(self.refusals), "any driver", timeout_s)
        return next(iter(self.refusals.values()))

    async def _until(self, done: Callable[[], bool], driver: str, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s), self._moved:
                await self._moved.wait_for(done)
        except TimeoutError as e:
            found = [plugin.endpoint for plugin in self.plugins()]
            text = f"waited {timeout_s:g} s for {driver}; registered: {found}; refused: {self.refusals}"
            raise KubeletError(text) from e

    def _chosen(self, driver: str) -> Plugin:
        """The newest connected plugin, otherwise the newest plugin."""
        plugins = self.plugins(driver)
        if len({plugin.driver for plugin in plugins}) != 1:
            raise KubeletError(f"DRA driver {driver or '(unnamed)'} is not registered, or must be named")
        return next((plugin for plugin in reversed(plugins) if plugin.connected()), plugins[-1])

    # ---------------------------------------------------------------- registration

    def _news(self) -> None:
        self._watch.read()
        self._scan()

    def _scan(self) -> None:
        """Read the folder: register new sockets, try failed ones again, deregister removed and replaced ones."""
        there = _sockets_in(self._registry)
        for path, socket in list(self._sockets.items()):
            failed = socket.work.done() and socket.plugin is None
            if failed or there.get(path) != socket.identity:
                self._forget(path)
        for path, identity in there.items():
            if path not in self._sockets:
                self._sockets[path] = _Socket(identity, self._loop.create_task(self._register(path)))

    def _forget(self, path: Path, *, grace_s: float | None = _RPC_S) -> None:
        socket = self._sockets.pop(path)
        socket.work.cancel()
        if socket.plugin is not None:
            # Unfinished calls may end by themselves: a driver that ends finishes its calls first.
            self._spawn(socket.plugin.channel.close(grace_s))
        self._spawn(self._tell())

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _tell(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def _register(self, path: Path) -> None:
        try:
            self._sockets[path].plugin = await self._handshake(path)
            self.refusals.pop(path.name, None)
        except (KubeletError, TimeoutError, grpc.aio.AioRpcError) as e:
            self.refusals[path.name] = e.details() or e.code().name if isinstance(e, grpc.aio.AioRpcError) else str(e)
            self._loop.call_later(_RETRY_S, self._again, path)
        await self._tell()

    def _again(self, path: Path) -> None:
        if path in self._sockets:
            self._scan()

    async def _handshake(self, path: Path) -> Plugin:
        """GetInfo, validation, registration, NotifyRegistrationStatus. If one of them fails, all start again later."""
        async with grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
            try:
                await asyncio.wait_for(channel.channel_ready(), _DIAL_S)
            except TimeoutError as e:
                raise KubeletError(f"no process listens on {path}") from e
            stub = _REGISTRATION(channel)
            info = await stub.GetInfo(registration_v1_pb2.InfoRequest(), timeout=_GET_INFO_S)
            try:
                version = self._validate(info)
            except KubeletError as e:
                await self._notify(stub, str(e))
                raise
            await self._notify(stub, "")
        self._count += 1
        endpoint = info.endpoint or str(path)
        connection = grpc.aio.insecure_channel(f"unix:{endpoint}", options=_OPTIONS)
        connection.get_state(try_to_connect=True)
        return Plugin(driver=info.name, endpoint=endpoint, version=version, order=self._count, channel=connection)

    async def _notify(self, stub: Any, error: str) -> None:
        status = registration_v1_pb2.RegistrationStatus(plugin_registered=not error, error=error)
        try:
            await stub.NotifyRegistrationStatus(status, timeout=_NOTIFY_S)
        except grpc.aio.AioRpcError:
            if not error:  # a plugin may answer a refusal with an error
                raise

    def _validate(self, info: registration_v1_pb2.PluginInfo) -> str:
        """The service version to use: the first version in the *plugin's* list that this kubelet knows."""
        if info.type != "DRAPlugin":
            raise KubeletError(
                f"plugin {info.name!r} has type {info.type!r}, which is unknown; a DRA driver has DRAPlugin"
            )
        if len(info.name) > 63 or not _DRIVER_NAME.fullmatch(info.name):
            raise KubeletError(f"driver name {info.name!r} is not a DNS subdomain of 63 characters at most")
        if info.endpoint and not info.endpoint.startswith("/"):
            raise KubeletError(f"endpoint {info.endpoint!r} is not an absolute path")
        if info.endpoint in {plugin.endpoint for plugin in self.plugins()}:
            raise KubeletError(f"endpoint {info.endpoint} is already registered")
        version = next((version for version in info.supported_versions if version in self._versions), None)
        if version is None:
            raise KubeletError(
                f"none of the versions {list(info.supported_versions)} is supported: {list(self._versions)}"
            )
        return version


def _sockets_in(folder: Path) -> dict[Path, tuple[int, int]]:
    """Registration sockets, each with the identity of its file. A new socket under an old name is another plugin."""
    found = {}
    for path in folder.iterdir():
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        if stat.S_ISSOCK(status.st_mode) and not path.name.startswith("."):
            found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def _answer(entry: Any) -> PluginAnswer:
    if entry.error:
        return PluginAnswer(error=entry.error)
    return PluginAnswer(devices=tuple(_given(device) for device in entry.devices))


def _given(device: Any) -> Given:
    optional = "share_id" in device.DESCRIPTOR.fields_by_name and device.HasField("share_id")
    return Given(
        requests=tuple(device.request_names),
        pool=device.pool_name,
        device=device.device_name,
        cdi_ids=tuple(device.cdi_device_ids),
        share_id=device.share_id if optional else None,
    )


def _check_device(uid: ClaimUid, given: Given) -> None:
    if not given.pool or not given.device:
        raise KubeletError(f"a device of claim {uid} has no pool or no name: {given}")
    if bad := [name for name in given.cdi_ids if not _CDI_ID.fullmatch(name)]:
        raise KubeletError(f"claim {uid} got CDI names that are not vendor/class=device: {bad}")
