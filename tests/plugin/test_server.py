"""The kubelet's server: sockets, registration, and what an RPC answers."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from gpuslice.errors import ConfigError
from gpuslice.pb import dra_v1_pb2, dra_v1_pb2_grpc, registration_v1_pb2, registration_v1_pb2_grpc
from gpuslice.plugin.server import PluginServer
from gpuslice.plugin.sockets import LONGEST_PATH, dra_name, registration_name
from gpuslice.standin.kubelet import V1BETA1, StandInKubelet
from gpuslice.system import files
from gpuslice.system.folder_watch import FolderWatch
from gpuslice.telemetry import Telemetry

from tests.kit.rig import Rig
from tests.kit.running import DRIVER, World

UID = "0f0e0d0c-0b0a-4908-8706-050403020100"
PREPARE = "NodePrepareResources"


@pytest.fixture
async def world(short: Path) -> AsyncIterator[World]:
    async with World(short) as world:
        yield world


def registration(channel: grpc.aio.Channel) -> Any:
    return registration_v1_pb2_grpc.RegistrationStub(channel)  # type: ignore[no-untyped-call]


def plugin(channel: grpc.aio.Channel) -> Any:
    return dra_v1_pb2_grpc.DRAPluginStub(channel)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------- names


LONG = "slices.of.gpus.for.everybody.example"  # 36 characters, the most that a driver name may have


@pytest.mark.contract(7)
def test_registration_names_prefer_the_full_uid_then_two_hashed_forms() -> None:
    names = [registration_name(Path("/" + "d" * length), LONG, UID) for length in (20, 40, 60)]

    assert names[0] == f"{LONG}-{UID}-reg.sock"
    assert names[1].startswith(f"{LONG}-")
    assert UID not in names[1]
    assert names[2].startswith("dra-")
    assert all(name.endswith("-reg.sock") for name in names)


@pytest.mark.contract(7)
@pytest.mark.parametrize("length", [20, 40, 60])
def test_registration_names_are_deterministic_and_differ_by_driver_and_pod(length: int) -> None:
    folder = Path("/" + "d" * length)
    drivers, uids = (LONG, LONG.replace("example", "example"[::-1])), (UID, UID[::-1])

    assert registration_name(folder, LONG, UID) == registration_name(folder, LONG, UID)
    assert len({registration_name(folder, driver, uid) for driver in drivers for uid in uids}) == 4


@pytest.mark.contract(8)
def test_a_socket_path_of_108_bytes_is_refused_and_one_of_107_is_not() -> None:
    room = LONGEST_PATH - len("/dra.sock")
    assert dra_name(Path("/" + "d" * (room - 1))) == "dra.sock"

    with pytest.raises(ConfigError, match=r"has 108 bytes and 107 is the limit.*shorter folder"):
        dra_name(Path("/" + "d" * room))
    with pytest.raises(ConfigError, match="107 is the limit"):
        registration_name(Path("/" + "d" * room), DRIVER, UID)


def server(
    folder: Path,
    *,
    pod_uid: str = "",
    namespace: str = "",
    registration_socket: str = "",
    registered: Callable[[], None] = lambda: None,
) -> PluginServer:
    return PluginServer(
        driver=DRIVER,
        registry=files.ensure_folder(folder / "reg"),
        plugin_folder=files.ensure_folder(folder / "plug"),
        pod_uid=pod_uid,
        pod_namespace=namespace,
        registration_socket=registration_socket,
        claims=_NoClaims(),
        telemetry=Telemetry(),
        registered=registered,
    )


class _NoClaims:
    async def prepare(self, ref: object, timeout_s: float) -> Any:
        raise AssertionError("nobody asks")

    async def unprepare(self, uid: object) -> None:
        raise AssertionError("nobody asks")


@pytest.mark.contract(11)
def test_a_rolling_update_with_a_fixed_registration_name_is_refused(short: Path) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        server(short, pod_uid=UID, registration_socket="x-reg.sock")


@pytest.mark.contract(10)
def test_a_second_instance_with_the_same_names_is_refused_and_one_with_a_pod_uid_is_not(short: Path) -> None:
    first = server(short)

    with pytest.raises(ConfigError, match=r"another instance serves .*dra.sock already"):
        server(short)
    second = server(short, pod_uid=UID)

    assert len({first.endpoint, first.registration, second.endpoint, second.registration}) == 4


def a_dead_socket(path: Path) -> Path:
    """As a killed process leaves one."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
        stale.listen()
    return path


OTHER = "11111111-0b0a-4908-8706-050403020100"


@pytest.mark.parametrize("room", [20, 42])
async def test_sockets_and_locks_of_killed_instances_are_removed_at_the_next_start(short: Path, room: int) -> None:
    folder = short / ("x" * room)
    folder.mkdir(parents=True)
    killed = server(folder, pod_uid=OTHER)
    for path in (killed.endpoint, killed.registration):
        a_dead_socket(path)
    os.close(killed._lock)  # as the kernel does it

    server(folder, pod_uid=UID)

    assert not killed.endpoint.exists()
    assert not killed.registration.exists()
    assert [path.name for path in (folder / "plug").iterdir()] == [f"{dra_name(folder / 'plug', UID)}.lock"]


async def test_what_a_living_sibling_or_another_driver_has_is_left(short: Path) -> None:
    sibling = server(short, pod_uid=OTHER)
    await sibling.open()
    about_to = server(short, pod_uid=OTHER.replace("1", "2"))  # it has its lock, and does not listen yet
    kept = {a_dead_socket(about_to.registration)}
    for name in (f"other.dev-{UID}-reg.sock", f"{DRIVER}-experiments-reg.sock", "dra-0123456789012345678901-reg.sock"):
        kept.add(a_dead_socket(short / "reg" / name))
    (short / "reg" / f"{DRIVER}-{UID.replace('0', '3')}-reg.sock").write_text("no socket")

    server(short, pod_uid=UID)

    assert await asyncio.to_thread(sibling.probe) is None
    assert all(path.exists() for path in kept)
    assert (short / "reg" / f"{DRIVER}-{UID.replace('0', '3')}-reg.sock").exists()
    await sibling.close(0)


def test_the_service_socket_has_a_short_form_below_the_folder_of_microk8s() -> None:
    folder = Path("/var/snap/microk8s/common/var/lib/kubelet/plugins/gpuslice.dev")

    assert dra_name(Path("/var/lib/kubelet/plugins/gpuslice.dev"), UID) == f"dra-{UID}.sock"
    name = dra_name(folder, UID)
    assert len(str(folder / name)) <= LONGEST_PATH
    assert name != dra_name(folder, OTHER)


@pytest.mark.contract(9)
async def test_stale_sockets_are_replaced_and_own_ones_unlinked(short: Path) -> None:
    ours = server(short)
    for path in (ours.endpoint, ours.registration):
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(path))

    await ours.open()
    assert await asyncio.to_thread(ours.probe) is None
    await ours.close(0)

    assert not ours.endpoint.exists()
    assert not ours.registration.exists()


async def test_a_file_in_the_place_of_a_socket_is_refused_with_a_sentence(short: Path) -> None:
    ours = server(short)
    ours.endpoint.write_text("mine")

    with pytest.raises(ConfigError, match="is not a socket; remove it"):
        await ours.open()
    assert ours.endpoint.read_text() == "mine"


async def test_sockets_are_for_root_only(short: Path) -> None:
    ours = server(short)
    await ours.open()

    assert [path.stat().st_mode & 0o777 for path in (ours.endpoint, ours.registration)] == [0o700, 0o700]
    await ours.close(0)


@pytest.mark.contract(4)
async def test_the_dra_socket_listens_before_the_registration_socket_appears(short: Path) -> None:
    ours = server(short)
    watch = FolderWatch(ours.registration.parent, arrivals=True)
    connected = asyncio.get_running_loop().create_future()

    def arrived() -> None:
        if ours.registration.name in watch.read() and not connected.done():
            with socket.socket(socket.AF_UNIX) as kubelet:
                connected.set_result(kubelet.connect_ex(str(ours.endpoint)))

    asyncio.get_running_loop().add_reader(watch.fileno(), arrived)
    await ours.open()

    assert await connected == 0
    asyncio.get_running_loop().remove_reader(watch.fileno())
    watch.close()
    await ours.close(0)


@pytest.mark.contract(14)
@pytest.mark.parametrize("which", ["endpoint", "registration"])
async def test_a_socket_that_is_taken_away_is_noticed(short: Path, which: str) -> None:
    ours = server(short)
    await ours.open()
    lost = asyncio.ensure_future(ours.lost())
    await asyncio.sleep(0)

    getattr(ours, which).unlink()

    assert "is gone; the process ends" in await asyncio.wait_for(lost, 10)
    await ours.close(0)


# ---------------------------------------------------------------- registration


@pytest.mark.contract(1, 2)
async def test_get_info_says_who_we_are_newest_service_first(world: World) -> None:
    ours = world.instances[0].server
    async with grpc.aio.insecure_channel(f"unix:{ours.registration}") as channel:
        info = await registration(channel).GetInfo(registration_v1_pb2.InfoRequest())

    assert (info.type, info.name, info.endpoint) == ("DRAPlugin", DRIVER, str(ours.endpoint))
    assert list(info.supported_versions) == ["v1.DRAPlugin", "v1beta1.DRAPlugin"]
    assert Path(info.endpoint).is_absolute()


@pytest.mark.contract(5)
async def test_a_refused_registration_is_an_error_to_the_kubelet_and_no_end_of_the_driver(world: World) -> None:
    ours = world.instances[0].server
    async with grpc.aio.insecure_channel(f"unix:{ours.registration}") as channel:
        stub = registration(channel)
        for _ in range(3):
            await stub.NotifyRegistrationStatus(registration_v1_pb2.RegistrationStatus(plugin_registered=True))
        assert ours.status.refusal is None

        with pytest.raises(grpc.aio.AioRpcError, match="name is taken"):
            await stub.NotifyRegistrationStatus(registration_v1_pb2.RegistrationStatus(error="name is taken"))
        assert "name is taken" in str(ours.status.refusal)

        await stub.NotifyRegistrationStatus(registration_v1_pb2.RegistrationStatus(plugin_registered=True))
        assert ours.status.refusal is None


@pytest.mark.contract(59)
async def test_each_registration_by_a_kubelet_is_passed_on_and_a_refused_one_is_not(short: Path) -> None:
    """A kubelet that starts deletes the slices of its node, so the publisher has to know."""
    passed: list[str] = []
    ours = server(short, registered=lambda: passed.append("registered"))
    await ours.open()
    for _ in range(2):
        async with StandInKubelet(ours.registration.parent) as kubelet:
            await kubelet.wait_registered(DRIVER)
    async with grpc.aio.insecure_channel(f"unix:{ours.registration}") as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await registration(channel).NotifyRegistrationStatus(registration_v1_pb2.RegistrationStatus(error="no"))
    await ours.close(0)

    assert passed == ["registered"] * 2


@pytest.mark.contract(6)
async def test_a_get_info_that_failed_once_does_not_keep_us_from_being_registered(short: Path) -> None:
    ours = server(short)
    somebody = grpc.aio.server()  # knows no GetInfo
    somebody.add_insecure_port(f"unix:{ours.registration}")
    await somebody.start()
    async with StandInKubelet(ours.registration.parent) as kubelet:
        await kubelet.wait_refused()
        await somebody.stop(0)

        await ours.open()

        assert (await kubelet.wait_registered(DRIVER)).version == "v1.DRAPlugin"
    await ours.close(0)


@pytest.mark.contract(12)
async def test_a_restarted_kubelet_finds_us_again_without_our_doing(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    before = await world.must_prepare(claim)
    async with StandInKubelet(world.registry) as again:
        await again.wait_registered(DRIVER)

        assert (await again.prepare([claim]))[claim.uid] == before


@pytest.mark.contract(15)
@pytest.mark.parametrize("which", ["endpoint", "registration"])
async def test_each_socket_serves_everything(world: World, which: str) -> None:
    path = getattr(world.instances[0].server, which)
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        assert (await registration(channel).GetInfo(registration_v1_pb2.InfoRequest())).name == DRIVER
        answer = await plugin(channel).NodePrepareResources(dra_v1_pb2.NodePrepareResourcesRequest())
        assert not answer.claims


@pytest.mark.contract(16)
async def test_one_connection_serves_all_calls_and_a_new_one_serves_on(world: World) -> None:
    claim = world.claim("one", world.device("mig-1g-19-0"))
    await asyncio.gather(*(world.must_prepare(claim) for _ in range(20)))

    async with StandInKubelet(world.registry) as again:
        await again.wait_registered(DRIVER)
        assert (await again.unprepare([claim]))[claim.uid] == ""


@pytest.mark.contract(17)
async def test_an_empty_prepare_is_answered_with_an_empty_ok(world: World) -> None:
    assert await world.kubelet.prepare([]) == {}
    assert await world.kubelet.unprepare([]) == {}


@pytest.mark.contract(3)
async def test_get_info_is_answered_while_a_prepare_hangs(world: World) -> None:
    nvml = world.rig.nvml
    cue = nvml.cue("hang", "create_gpu_instance")
    hanging = asyncio.create_task(world.prepare(world.claim("one", world.device("mig-1g-19-0"))))
    assert await asyncio.to_thread(nvml.wait_hung, cue, 30)

    async with grpc.aio.insecure_channel(f"unix:{world.instances[0].server.registration}") as channel:
        info = await registration(channel).GetInfo(registration_v1_pb2.InfoRequest(), timeout=10)
    other = await world.must_prepare(world.claim("two", world.device("gpu", 1)))

    assert info.name == DRIVER
    assert other.devices
    nvml.withdraw(cue)
    assert not (await hanging).error


async def test_the_probe_says_which_socket_does_not_answer(world: World) -> None:
    ours = world.instances[0].server
    assert await asyncio.to_thread(ours.probe) is None
    ours.endpoint.unlink()

    assert str(ours.endpoint) in str(await asyncio.to_thread(ours.probe))


# ---------------------------------------------------------------- v1 and v1beta1


async def test_an_older_kubelet_is_served_by_v1beta1(world: World) -> None:
    claim = world.claim("one", world.device("gpu"))
    newest = await world.must_prepare(claim)
    async with StandInKubelet(world.registry, versions=[V1BETA1]) as older:
        assert (await older.wait_registered(DRIVER)).version == V1BETA1

        assert (await older.prepare([claim]))[claim.uid] == newest
        assert (await older.unprepare([claim]))[claim.uid] == ""
    assert isinstance(world.rig, Rig)
    world.rig.assert_empty()
