"""The stand-in kubelet against small plugins of our own, over real unix sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import grpc.aio
import pytest
from gpuslice.core.model import ClaimRef, ClaimUid
from gpuslice.pb import (
    dra_v1_pb2,
    dra_v1_pb2_grpc,
    dra_v1beta1_pb2,
    dra_v1beta1_pb2_grpc,
    registration_v1_pb2,
    registration_v1_pb2_grpc,
)
from gpuslice.standin.kubelet import V1, V1BETA1, Given, KubeletError, PluginAnswer, StandInKubelet

DRIVER = "gpuslice.dev"
A, B = ClaimRef("team", "a", ClaimUid("uid-a")), ClaimRef("team", "b", ClaimUid("uid-b"))

Serve = Callable[[ModuleType, Any], Awaitable[Any]]


async def one_device_each(pb: ModuleType, request: Any) -> Any:
    def device(uid: str) -> Any:
        found = pb.Device(
            request_names=["gpu"], pool_name="p0", device_name="gpu", cdi_device_ids=[f"a.b/claim={uid}-0"]
        )
        if pb is dra_v1_pb2:
            found.share_id = "share-1"
        return found

    claims = {claim.uid: pb.NodePrepareResourceResponse(devices=[device(claim.uid)]) for claim in request.claims}
    return pb.NodePrepareResourcesResponse(claims=claims)


class APlugin:
    """A driver that registers as it is told and answers as it is told."""

    def __init__(self, folder: Path, file: str = "one", *, serve: Serve = one_device_each, **info: Any) -> None:
        self.endpoint = folder / f"{file}-dra.sock"
        self.socket = folder / "registry" / f"{file}-reg.sock"
        about = {
            "type": "DRAPlugin",
            "name": DRIVER,
            "endpoint": str(self.endpoint),
            "supported_versions": [V1, V1BETA1],
        }
        self.info = registration_v1_pb2.PluginInfo(**(about | info))
        self.info_failures = 0
        self.told: list[Any] = []
        self.heard = asyncio.Event()
        self.patience: list[float] = []
        self._serve = serve
        self.servers: list[grpc.aio.Server] = []

    async def __aenter__(self) -> APlugin:
        for path in (self.endpoint, self.socket):
            server = grpc.aio.server()
            dra_v1_pb2_grpc.add_DRAPluginServicer_to_server(_Dra(self, dra_v1_pb2), server)  # type: ignore[no-untyped-call]
            dra_v1beta1_pb2_grpc.add_DRAPluginServicer_to_server(_Dra(self, dra_v1beta1_pb2), server)  # type: ignore[no-untyped-call]
            registration_v1_pb2_grpc.add_RegistrationServicer_to_server(self, server)  # type: ignore[no-untyped-call]
            server.add_insecure_port(f"unix:{path}")
            await server.start()
            self.servers.append(server)
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in reversed(self.servers):
            await server.stop(None)

    async def GetInfo(self, request: Any, context: Any) -> Any:
        if self.info_failures:
            self.info_failures -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "not yet")
        return self.info

    async def NotifyRegistrationStatus(self, request: Any, context: Any) -> Any:
        self.told.append(request)
        self.heard.set()
        return registration_v1_pb2.RegistrationStatusResponse()

    async def answer(self, pb: ModuleType, request: Any, context: Any) -> Any:
        self.patience.append(context.time_remaining())
        return await self._serve(pb, request)


class _Dra:
    def __init__(self, plugin: APlugin, pb: ModuleType) -> None:
        self._plugin, self._pb = plugin, pb

    async def NodePrepareResources(self, request: Any, context: Any) -> Any:
        return await self._plugin.answer(self._pb, request, context)

    async def NodeUnprepareResources(self, request: Any, context: Any) -> Any:
        await self._plugin.answer(self._pb, request, context)
        claims = {claim.uid: self._pb.NodeUnprepareResourceResponse() for claim in request.claims}
        return self._pb.NodeUnprepareResourcesResponse(claims=claims)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "registry").mkdir()
    return tmp_path


def a_kubelet(folder: Path, versions: Sequence[str] = (V1, V1BETA1)) -> StandInKubelet:
    return StandInKubelet(folder / "registry", versions=versions)


async def test_a_plugin_that_was_there_before_the_kubelet_is_registered(folder: Path) -> None:
    async with APlugin(folder) as plugin, a_kubelet(folder) as kubelet:
        found = await kubelet.wait_registered(DRIVER)

    assert (found.endpoint, found.version) == (str(plugin.endpoint), V1)
    assert [status.plugin_registered for status in plugin.told] == [True]


async def test_a_plugin_that_comes_later_is_registered_and_one_that_goes_is_deregistered(folder: Path) -> None:
    async with a_kubelet(folder) as kubelet:
        async with APlugin(folder):
            await kubelet.wait_registered(DRIVER)

        await kubelet.wait_deregistered(DRIVER)

        with pytest.raises(KubeletError, match="not registered"):
            await kubelet.prepare([A], driver=DRIVER)


async def test_a_socket_that_is_bound_anew_under_its_old_name_is_another_plugin(folder: Path) -> None:
    async with a_kubelet(folder) as kubelet, APlugin(folder):
        await kubelet.wait_registered(DRIVER)
        async with APlugin(folder) as second:
            await second.heard.wait()

            assert [status.plugin_registered for status in second.told] == [True]


async def test_a_kubelet_that_was_restarted_registers_the_same_plugin_again(folder: Path) -> None:
    async with APlugin(folder) as plugin:
        for _ in range(2):
            async with a_kubelet(folder) as kubelet:
                await kubelet.wait_registered(DRIVER)

    assert len(plugin.told) == 2


async def test_a_plugin_that_fails_its_first_get_info_is_asked_again(folder: Path) -> None:
    plugin = APlugin(folder)
    plugin.info_failures = 1

    async with plugin, a_kubelet(folder) as kubelet:
        assert await kubelet.wait_refused() == "not yet"
        await kubelet.wait_registered(DRIVER)

        assert kubelet.refusals == {}


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"type": "CSIPlugin"}, "type 'CSIPlugin'"),
        ({"name": "Not_A_Name"}, "not a DNS subdomain"),
        ({"endpoint": "dra.sock"}, "not an absolute path"),
        ({"supported_versions": []}, "is supported"),
        ({"supported_versions": ["v1alpha4.DRAPlugin"]}, "v1alpha4"),
    ],
)
async def test_a_plugin_that_says_the_wrong_things_is_refused_and_told(
    folder: Path, info: dict[str, Any], reason: str
) -> None:
    async with APlugin(folder, **info) as plugin, a_kubelet(folder) as kubelet:
        refusal = await kubelet.wait_refused()

        assert reason in refusal
        assert (plugin.told[0].plugin_registered, plugin.told[0].error) == (False, refusal)
        assert kubelet.plugins() == ()


async def test_an_endpoint_is_registered_once_only(folder: Path) -> None:
    async with APlugin(folder) as plugin, a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)
        async with APlugin(folder, "two", endpoint=str(plugin.endpoint)):
            assert "already registered" in await kubelet.wait_refused()


async def test_files_that_are_no_sockets_and_hidden_sockets_are_left_alone(folder: Path) -> None:
    (folder / "registry/notes.txt").write_text("")
    async with APlugin(folder, ".hidden") as hidden, APlugin(folder), a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)

        assert len(kubelet.plugins()) == 1
        assert hidden.told == []


@pytest.mark.parametrize(
    ("known", "offered", "taken"),
    [
        ((V1, V1BETA1), [V1BETA1, V1], V1BETA1),
        ((V1BETA1,), [V1, V1BETA1], V1BETA1),
        ((V1,), ["v1.DRAResourceHealth", V1], V1),
    ],
)
async def test_the_first_version_of_the_plugins_list_that_the_kubelet_knows_is_taken(
    folder: Path, known: tuple[str, ...], offered: list[str], taken: str
) -> None:
    async with APlugin(folder, supported_versions=offered), a_kubelet(folder, known) as kubelet:
        assert (await kubelet.wait_registered(DRIVER)).version == taken


async def test_without_an_endpoint_the_registration_socket_serves_both(folder: Path) -> None:
    async with APlugin(folder, endpoint="") as plugin, a_kubelet(folder) as kubelet:
        assert (await kubelet.wait_registered(DRIVER)).endpoint == str(plugin.socket)

        assert (await kubelet.prepare([A]))[A.uid].error == ""


async def test_waiting_in_vain_says_what_kept_the_plugin(folder: Path) -> None:
    async with APlugin(folder, type="CSIPlugin"), a_kubelet(folder) as kubelet:
        await kubelet.wait_refused()

        with pytest.raises(KubeletError, match="CSIPlugin"):
            await kubelet.wait_registered(DRIVER, timeout_s=0.01)


async def test_the_newest_connected_plugin_gets_the_calls(folder: Path) -> None:
    async with a_kubelet(folder) as kubelet, APlugin(folder) as old:
        first = await kubelet.wait_registered(DRIVER)
        async with APlugin(folder, "two") as new:
            second = await kubelet.wait_registered(DRIVER, count=2)
            for plugin in (first, second):
                await asyncio.wait_for(plugin.channel.channel_ready(), 10)
            await kubelet.prepare([A])
            await new.servers[0].stop(None)
            while second.connected():
                await second.channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
            await kubelet.prepare([B])

            assert (len(new.patience), len(old.patience)) == (1, 1)


async def test_a_call_that_has_begun_outlives_the_registration(folder: Path) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slowly(pb: ModuleType, request: Any) -> Any:
        begun.set()
        await go_on.wait()
        return await one_device_each(pb, request)

    async with a_kubelet(folder) as kubelet, APlugin(folder, serve=slowly) as plugin:
        await kubelet.wait_registered(DRIVER)
        call = asyncio.create_task(kubelet.prepare([A]))
        await begun.wait()
        plugin.socket.unlink()
        await kubelet.wait_deregistered(DRIVER)
        go_on.set()

        assert (await call)[A.uid].error == ""


async def test_a_pods_claims_travel_in_one_call_with_the_kubelets_deadline(folder: Path) -> None:
    async with APlugin(folder) as plugin, a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)

        answers = await kubelet.prepare([A, B])
        errors = await kubelet.unprepare([A, B])

    given = Given(requests=("gpu",), pool="p0", device="gpu", cdi_ids=("a.b/claim=uid-a-0",), share_id="share-1")
    assert answers[A.uid] == PluginAnswer(devices=(given,))
    assert errors == {A.uid: "", B.uid: ""}
    assert [44 < patience < 46 for patience in plugin.patience] == [True, True]


async def test_v1beta1_knows_no_share_ids(folder: Path) -> None:
    async with APlugin(folder), a_kubelet(folder, [V1BETA1]) as kubelet:
        await kubelet.wait_registered(DRIVER)

        assert (await kubelet.prepare([A]))[A.uid].devices[0].share_id is None


async def test_an_empty_call_is_answered(folder: Path) -> None:
    async with APlugin(folder), a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)

        assert await kubelet.prepare([]) == {}


async def test_the_error_of_one_claim_leaves_the_other_alone(folder: Path) -> None:
    async def half(pb: ModuleType, request: Any) -> Any:
        answer = await one_device_each(pb, request)
        answer.claims["uid-a"].error = "no such device"
        return answer

    async with APlugin(folder, serve=half), a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)
        answers = await kubelet.prepare([A, B])

    assert answers[A.uid] == PluginAnswer(error="no such device")
    assert answers[B.uid].devices


def answering(uid: str = "", **device: Any) -> Serve:
    async def serve(pb: ModuleType, request: Any) -> Any:
        entry = pb.NodePrepareResourceResponse(devices=[pb.Device(**device)])
        return pb.NodePrepareResourcesResponse(claims={uid: entry} if uid else {})

    return serve


async def crash(pb: ModuleType, request: Any) -> Any:
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (answering("uid-x"), "not requested"),
        (answering(), "skipped 1 ResourceClaims"),
        (answering("uid-a", device_name="gpu"), "no pool"),
        (answering("uid-a", pool_name="p", device_name="g", cdi_device_ids=["gpu"]), "not vendor/class=device"),
        (crash, "disk full"),
    ],
)
async def test_an_answer_that_breaks_the_contract_fails_the_pod(folder: Path, serve: Serve, reason: str) -> None:
    async with APlugin(folder, serve=serve), a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)

        with pytest.raises(KubeletError, match=reason):
            await kubelet.prepare([A])


async def test_a_plugin_that_does_not_answer_is_given_up_at_the_deadline(folder: Path) -> None:
    async def never(pb: ModuleType, request: Any) -> Any:
        await asyncio.Event().wait()

    async with APlugin(folder, serve=never), a_kubelet(folder) as kubelet:
        await kubelet.wait_registered(DRIVER)

        with pytest.raises(KubeletError, match="DEADLINE_EXCEEDED"):
            await kubelet.prepare([A], timeout_s=0.05)
