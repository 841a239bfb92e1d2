"""The driver's claim side in this process: the real server on real sockets, a simulated node, stand-in API server and
kubelet."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from gpuslice.core.model import ClaimRef, ClaimUid, DeviceRef
from gpuslice.core.record import PreparedClaim
from gpuslice.kube import Kube
from gpuslice.plugin.releases import Releases
from gpuslice.plugin.server import PluginServer
from gpuslice.plugin.service import ClaimService
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.standin.kubelet import PluginAnswer, StandInKubelet
from gpuslice.system import files
from gpuslice.system.folder_watch import FolderWatch
from gpuslice.telemetry import Telemetry

from tests.kit.rig import NODE, Rig

DRIVER = "gpuslice.dev"


class DriverInstance:
    """The claim side of one driver process. Several may serve one node, as in a rolling update."""

    def __init__(self, world: World, pod_uid: str = "", *, hang_limit_s: float = 15.0) -> None:
        self._world = world
        self.rig = Rig(world.folder / "rig", world.spec)
        self._executor = ThreadPoolExecutor(8)
        self._kube = Kube(world.api.kubeconfig)
        self._releases = Releases()
        self.service = ClaimService(
            api=self._kube,
            driver=DRIVER,
            preparer=self.rig.preparer,
            releases=self._releases,
            executor=self._executor,
            hang_limit_s=hang_limit_s,
        )
        self.server = PluginServer(
            driver=DRIVER,
            registry=world.registry,
            plugin_folder=world.plugins,
            pod_uid=pod_uid,
            pod_namespace="",
            registration_socket="",
            claims=self,
            telemetry=Telemetry(),
            registered=lambda: None,
        )
        self.deserted = asyncio.Event()  # a caller of a prepare has gone before its answer
        self._watch = FolderWatch(self.rig.checkpoint.folder)

    async def prepare(self, ref: ClaimRef, timeout_s: float) -> PreparedClaim:
        try:
            return await self.service.prepare(ref, timeout_s)
        except asyncio.CancelledError:
            self.deserted.set()
            raise

    async def unprepare(self, uid: ClaimUid) -> None:
        await self.service.unprepare(uid)

    async def open(self) -> DriverInstance:
        def wake() -> None:
            self._releases.notify([ClaimUid(name.removesuffix(".json")) for name in self._watch.read()])

        asyncio.get_running_loop().add_reader(self._watch.fileno(), wake)
        await self.server.open()
        return self

    async def close(self) -> None:
        self.rig.nvml.withdraw()  # no call hangs after a test
        await self.server.close(0)
        await self.service.close(10)
        asyncio.get_running_loop().remove_reader(self._watch.fileno())
        self._watch.close()
        self._executor.shutdown()
        self._kube.close()


class World:
    """Use it as `async with World(tmp_path) as world`. One instance runs at first, `join` starts another."""

    def __init__(self, folder: Path, spec: str = "h100x2", *, hang_limit_s: float = 15.0) -> None:
        self.folder, self.spec, self._hang_limit_s = folder, spec, hang_limit_s
        self.registry, self.plugins = files.ensure_folder(folder / "reg"), files.ensure_folder(folder / "plug")
        self.api = StandInApiServer(folder / "api")
        self.kubelet = StandInKubelet(self.registry)
        self.instances: list[DriverInstance] = []

    async def __aenter__(self) -> World:
        self.api.start()
        self.api.add_node(NODE)
        await self.kubelet.__aenter__()
        await self.join(hang_limit_s=self._hang_limit_s)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for instance in self.instances:
            await instance.close()
        await self.kubelet.__aexit__(kind, error, trace)
        self.api.stop()

    async def join(self, pod_uid: str = "", *, hang_limit_s: float = 15.0) -> DriverInstance:
        instance = await DriverInstance(self, pod_uid, hang_limit_s=hang_limit_s).open()
        self.instances.append(instance)
        await self.kubelet.wait_registered(DRIVER, count=len(self.instances))
        return instance

    async def leave(self, instance: DriverInstance) -> None:
        self.instances.remove(instance)
        await instance.close()

    @property
    def rig(self) -> Rig:
        return self.instances[0].rig

    def device(self, name: str, gpu: int = 0) -> DeviceRef:
        return self.rig.device(name, gpu)

    # ------------------------------------------------------------ claims

    def claim(
        self,
        name: str,
        *devices: DeviceRef,
        config: Sequence[Mapping[str, Any]] = (),
        admin: bool = False,
        requests: Sequence[str] = (),
        more: Sequence[Mapping[str, Any]] = (),
        annotations: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> ClaimRef:
        """A claim that the API server shows with these devices. `extra` is in each of its results."""
        names = requests or [f"gpu-{number}" for number in range(len(devices))]
        results = [
            {"request": request, "driver": DRIVER, "pool": ref.pool, "device": ref.device}
            | ({"adminAccess": True} if admin else {})
            | dict(extra or {})
            for request, ref in zip(names, devices, strict=True)
        ]
        metadata = {"name": name, "annotations": dict(annotations or {})}
        body = self.api.create("resourceclaims", {"metadata": metadata, "spec": {"devices": {}}}, "default")
        body["status"] = {"allocation": {"devices": {"results": [*results, *more], "config": list(config)}}}
        self.api.update("resourceclaims", body)
        return ClaimRef("default", name, ClaimUid(body["metadata"]["uid"]))

    def deallocate(self, ref: ClaimRef) -> None:
        body = self.api.get("resourceclaims", ref.name, ref.namespace)
        body["status"] = {}
        self.api.update("resourceclaims", body)

    def delete(self, ref: ClaimRef) -> None:
        self.api.delete("resourceclaims", ref.name, ref.namespace)

    def fetches(self, ref: ClaimRef) -> int:
        """How often the driver has asked the API server for this claim."""
        return sum(request.path.endswith(f"/resourceclaims/{ref.name}") for request in self.api.requests)

    async def prepare(self, ref: ClaimRef) -> PluginAnswer:
        return (await self.kubelet.prepare([ref]))[ref.uid]

    async def must_prepare(self, ref: ClaimRef) -> PluginAnswer:
        answer = await self.prepare(ref)
        assert not answer.error, answer.error
        return answer

    async def unprepare(self, ref: ClaimRef) -> None:
        error = (await self.kubelet.unprepare([ref]))[ref.uid]
        assert not error, error
