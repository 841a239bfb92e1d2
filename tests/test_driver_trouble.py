"""The driver as a process on a node where something is missing or ends: what the driver still serves."""

from __future__ import annotations

import asyncio
import os
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gpuslice.core.model import ClaimRef, ClaimUid
from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.node import SimNode
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.standin.cluster import DRIVER, DriverProcess, StandInCluster
from gpuslice.standin.scheduler import Request
from gpuslice.system import files

from tests.kit.processes import wait_asleep

MIG = Request(name="gpu", driver=DRIVER, where={"type": "mig", "profile": "1g.10gb"})


@pytest.fixture
async def cluster(short: Path) -> AsyncIterator[StandInCluster]:
    async with StandInCluster(short) as cluster:
        yield cluster


def simulated(cluster: StandInCluster) -> SimNode:
    return SimNode(files.ensure_folder(cluster.node_folder), cluster.simulate)


async def asked(driver: DriverProcess, path: str) -> tuple[int, str]:
    """Status and text of a probe."""
    port = driver.log.read_text().rpartition("probes on 127.0.0.1:")[2].split()[0]

    def get() -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as e:
            return e.code, e.read().decode()

    return await asyncio.to_thread(get)


def lost(cluster: StandInCluster) -> set[str]:
    """Pools with a device that has a taint because its card is unreadable."""
    return {
        body["spec"]["pool"]["name"]
        for body in cluster.api.all("resourceslices")
        for device in body["spec"].get("devices", [])
        if any(taint["key"] == f"{DRIVER}/gpu" for taint in device.get("taints", []))
    }


# ---------------------------------------------------------------- no loaded NVIDIA driver


@pytest.mark.parametrize(
    ("call", "code"),
    [("start", Code.DRIVER_NOT_LOADED), ("gpus", Code.UNKNOWN)],
)
async def test_without_a_loaded_nvidia_driver_pods_end_and_the_cards_are_offered_when_it_comes(
    cluster: StandInCluster, call: str, code: Code
) -> None:
    node = simulated(cluster)
    cue = node.cue("fail", call, code=code, times=None)
    driver = await cluster.start("--http-endpoint", "127.0.0.1:0", ready=False)
    await cluster.kubelet.wait_registered(DRIVER)
    of_before_the_reboot = ClaimRef("default", "old", ClaimUid("uid-old"))

    assert await cluster.kubelet.unprepare([of_before_the_reboot]) == {of_before_the_reboot.uid: ""}
    status, text = await asked(driver, "/readyz")
    assert (status, code.name in text) == (503, True), text
    first = next(line for line in driver.log.read_text().splitlines() if " INFO " not in line)
    assert code.name in first  # where a person looks first
    assert (await asked(driver, "/healthz"))[0] == 200
    assert cluster.api.all("resourceslices") == []

    node.withdraw(cue)
    await cluster.wait_published()
    await cluster.kubelet.wait_registered(DRIVER)
    assert await cluster.run(cluster.claim("one", MIG))
    assert driver.alive
    node.close()


async def test_a_hook_that_is_not_there_yet_refuses_no_start_and_is_found_when_it_comes(
    cluster: StandInCluster, short: Path
) -> None:
    """A driver container fills the driver root after our start. It may wait for the pods that end here."""
    there, seen = Path("/run/nvidia/driver"), files.ensure_folder(short / "root")
    hook = "usr/bin/nvidia-cdi-hook"
    roots = ("--nvidia-driver-root", str(there), "--driver-root-ctr-path", str(seen))
    driver = await cluster.start(
        "--nvidia-cdi-hook-path", str(there / hook), *roots, "--http-endpoint", "127.0.0.1:0", ready=False
    )
    await cluster.kubelet.wait_registered(DRIVER)
    of_before_the_reboot = ClaimRef("default", "old", ClaimUid("uid-old"))

    assert await cluster.kubelet.unprepare([of_before_the_reboot]) == {of_before_the_reboot.uid: ""}
    status, text = await asked(driver, "/readyz")
    assert (status, "--nvidia-cdi-hook-path" in text) == (503, True), text
    assert cluster.api.all("resourceslices") == []

    (files.ensure_folder((seen / hook).parent) / "nvidia-cdi-hook").write_text("")
    await cluster.wait_published()
    await cluster.kubelet.wait_registered(DRIVER)
    assert await cluster.run(cluster.claim("one", MIG))


async def test_what_a_claim_holds_is_given_up_without_the_nvidia_driver_and_undone_when_it_comes(
    cluster: StandInCluster,
) -> None:
    driver = await cluster.start()
    claim = cluster.claim("one", MIG)
    await cluster.run(claim)
    assert await driver.terminate() == 0
    node = SimNvml(cluster.node_folder, latency="zero")
    cue = node.cue("fail", "start", code=Code.DRIVER_NOT_LOADED, times=None)
    await cluster.start(ready=False)
    await cluster.kubelet.wait_registered(DRIVER, after=1)

    await asyncio.to_thread(cluster.api.wait, lambda: len(lost(cluster)) == 2, 20)  # known cards stay
    await cluster.end(claim)
    assert any(node.look(gpu.uuid).partitions for gpu in node.gpus())

    node.withdraw(cue)
    again = [plugin.order for plugin in cluster.kubelet.plugins(DRIVER)]
    await cluster.kubelet.wait_registered(DRIVER, after=max(again))
    await asyncio.to_thread(cluster.api.wait, lambda: not lost(cluster), 20)
    await cluster.run(cluster.claim("two", MIG))  # after the recovery, which has the first ticket of the card
    records = (cluster.plugins / DRIVER / "claims").glob("*/*.json")
    assert len(list(records)) == 1
    assert sum(len(node.look(gpu.uuid).partitions) for gpu in node.gpus()) == 1
    node.close()


# ---------------------------------------------------------------- a session that dies


async def test_cards_that_cannot_be_read_make_the_driver_unready_until_one_can(cluster: StandInCluster) -> None:
    driver = await cluster.start("--http-endpoint", "127.0.0.1:0")
    claim = cluster.claim("one", MIG)
    await cluster.run(claim)
    node = simulated(cluster)
    node.cue("fail", "look", code=Code.UNKNOWN, times=None)

    await cluster.end(claim)  # the end of a record makes the driver look
    await asyncio.to_thread(cluster.api.wait, lambda: len(lost(cluster)) == 2, 20)
    status, text = await asked(driver, "/readyz")
    assert (status, "no card can be read" in text) == (503, True), text
    assert (await asked(driver, "/healthz"))[0] == 200, "a restart mends no card"
    node.close()


async def test_an_nvml_that_dies_and_does_not_start_again_makes_the_process_start_anew(cluster: StandInCluster) -> None:
    """A driver container brings another version, so the library in this process does not fit any more."""
    driver = await cluster.start()
    claim = cluster.claim("one", MIG)
    await cluster.run(claim)
    node = simulated(cluster)
    node.cue("fail", "look", code=Code.UNKNOWN, times=None)
    node.cue("fail", "start", code=Code.LIB_RM_VERSION_MISMATCH, times=None)
    before = max(plugin.order for plugin in cluster.kubelet.plugins(DRIVER))

    await cluster.end(claim)
    await cluster.kubelet.wait_registered(DRIVER, after=before)
    assert await cluster.kubelet.unprepare([claim]) == {claim.uid: ""}

    node.withdraw(None)
    await cluster.kubelet.wait_registered(DRIVER, after=before + 1)
    await asyncio.to_thread(cluster.api.wait, lambda: not lost(cluster), 20)
    await cluster.run(cluster.claim("two", MIG))
    assert driver.alive
    node.close()


# ---------------------------------------------------------------- a thread that dies

THREADS = ("controller", "publisher-watching", "publisher-writing")


@pytest.fixture
async def doomed(short: Path, unmeasured: None) -> AsyncIterator[StandInCluster]:
    """A cluster whose processes have a thread that dies."""
    async with StandInCluster(short) as cluster:
        cluster.module = "tests.kit.dead_thread"
        yield cluster


@pytest.mark.parametrize("thread", [*THREADS, "http"])
async def test_a_driver_one_of_whose_threads_dies_ends_and_says_which(doomed: StandInCluster, thread: str) -> None:
    more = ("--http-endpoint", "127.0.0.1:0")
    driver = await doomed.start(*more, environment={"DEAD": thread}, ready=False)

    assert await driver.wait() == 1
    sentence = f"thread {thread} ended by ValueError: planted; the process ends, so that it is started again"
    assert sentence in driver.log.read_text().splitlines()[-1]


@pytest.mark.parametrize("thread", THREADS)
async def test_a_dead_thread_makes_healthz_fail(doomed: StandInCluster, thread: str) -> None:
    environment = {"DEAD": thread, "SURVIVE": "1"}
    driver = await doomed.start("--http-endpoint", "127.0.0.1:0", environment=environment, ready=False)
    await doomed.kubelet.wait_registered(DRIVER)

    async with asyncio.timeout(20):
        while (answer := await asked(driver, "/healthz"))[0] == 200:  # the probes come before the publisher's threads
            pass

    assert answer[0] == 503
    assert f"thread {thread} ended by ValueError: planted" in answer[1]


# ---------------------------------------------------------------- a start that fails


@pytest.mark.parametrize("folder", ["plugin", "registry"])
async def test_a_socket_that_cannot_be_bound_is_named_and_nothing_else_is_said(
    cluster: StandInCluster, folder: str
) -> None:
    plugin = files.ensure_folder(cluster.plugins / DRIVER)
    path = plugin / "dra.sock" if folder == "plugin" else cluster.registry / f"{DRIVER}-reg.sock"
    path.write_text("")

    driver = await cluster.start(ready=False)

    assert await driver.wait() == 2
    said = driver.log.read_text()
    assert f"{path} exists and is not a socket; remove it" in said.splitlines()[-1]
    assert "Traceback" not in said


async def test_a_driver_that_is_still_starting_ends_by_sigterm_as_process_1_too(
    cluster: StandInCluster, short: Path
) -> None:
    """Process 1 has no default action for a signal. So without a handler SIGTERM is lost there, and here it would kill."""
    os.mkfifo(short / "policy.yaml")
    driver = await cluster.start("--policy", str(short / "policy.yaml"), ready=False)
    writer = await asyncio.to_thread(open, short / "policy.yaml", "w")  # returns when the driver has the pipe open
    # Python runs a handler between two steps of a program. So a signal just before the read would wait for the end of it.
    await asyncio.to_thread(wait_asleep, driver.pid)

    assert await driver.terminate() == 0

    writer.close()
    assert driver.log.read_text() == ""
