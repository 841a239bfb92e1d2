"""Shares with the driver and the MPS supervisor as processes: killed, restarted, lost; and what the API shows meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import select
import signal
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gpuslice.core.model import ClaimRef
from gpuslice.mps.api import DaemonStatus
from gpuslice.mps.client import MpsClient
from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.node import SimNode
from gpuslice.standin.cluster import DRIVER, DriverProcess, StandInCluster
from gpuslice.standin.scheduler import Request
from gpuslice.system.folder_watch import FolderWatch

from tests.kit.mps_node import StandInProgram

CARD = Request(name="gpu", driver=DRIVER, where={"type": "gpu"})
EIGHT = 8


def by_mps(memory: str = "8Gi") -> Request:
    return Request(name="gpu", driver=DRIVER, where={"type": "mps", "index": 0}, capacity={"memory": memory})


@pytest.fixture
async def cluster(short: Path) -> AsyncIterator[StandInCluster]:
    (short / "policy.yaml").write_text(
        "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {mps: {shares: 8}}\n", encoding="utf-8"
    )
    async with StandInCluster(short) as cluster:
        await cluster.supervise()
        yield cluster


async def start(cluster: StandInCluster) -> DriverProcess:
    return await cluster.start("--policy", str(cluster.folder / "policy.yaml"))


def program(cluster: StandInCluster, ref: ClaimRef) -> StandInProgram:
    """A CUDA program in a container with the CDI file of this claim."""
    body = json.loads((cluster.cdi / f"{DRIVER}-claim_{ref.uid}.json").read_text())
    told = dict(entry.split("=", 1) for entry in body["devices"][0]["containerEdits"]["env"])
    return StandInProgram.of_environment(told)


def taints(cluster: StandInCluster) -> dict[str, set[str]]:
    """The keys of the taints of each device of the first card, by device name."""
    found: dict[str, set[str]] = {}
    for body in cluster.api.all("resourceslices"):
        for device in body["spec"].get("devices", ()):
            if device["attributes"]["index"]["int"] == 0:
                found[device["name"]] = {taint["key"] for taint in device.get("taints", ())}
    return found


async def until_tainted(cluster: StandInCluster, so: bool) -> None:
    await asyncio.to_thread(cluster.api.wait, lambda: bool(taints(cluster)["mps"]) is so, 20.0)


def mended(client: MpsClient, watch: FolderWatch, old_pid: int) -> DaemonStatus:
    """Wait until the only daemon is another process and the driver has ensured it."""
    until = time.monotonic() + 20
    while True:
        (running,) = client.statuses()
        if running.pid not in (0, old_pid) and not running.problem:
            return running
        assert time.monotonic() < until, running
        # The record is written before the status, so the record alone would be too early.
        if select.select([watch], [], [], 0.1)[0]:
            watch.read()


async def test_a_driver_that_is_killed_disturbs_none_of_eight_clients(cluster: StandInCluster) -> None:
    first = await start(cluster)
    refs = [cluster.claim(f"c{number}", by_mps()) for number in range(EIGHT)]
    for ref in refs:
        await cluster.run(ref)
    programs = [await asyncio.to_thread(program, cluster, ref) for ref in refs]
    limits = [await asyncio.to_thread(running.got) for running in programs]
    before = MpsClient(cluster.mps).statuses()

    await first.kill()
    await start(cluster)
    names = [await cluster.run(ref) for ref in refs]

    assert MpsClient(cluster.mps).statuses() == before
    assert all(running.quiet() for running in programs)
    assert limits == [("8192", "100")] * EIGHT
    assert len(set(names)) == EIGHT
    assert [running.end() for running in programs] == [0] * EIGHT
    for ref in refs:
        await cluster.end(ref)
    assert MpsClient(cluster.mps).statuses() == ()


async def test_a_card_that_refuses_its_compute_mode_at_the_first_share_is_offered_for_no_second_one(
    cluster: StandInCluster,
) -> None:
    await start(cluster)
    node = SimNode(cluster.node_folder)
    (uuid, *_) = (card.uuid for card in node.cards)
    node.cue("fail", "set_compute_mode", uuid, code=Code.NOT_SUPPORTED, times=None)

    with pytest.raises(RuntimeError, match="NOT_SUPPORTED"):
        await cluster.run(cluster.claim("one", by_mps()))

    await until_tainted(cluster, so=True)
    assert taints(cluster)["mps"] == {f"{DRIVER}/compute-mode"}
    assert not any(keys for device, keys in taints(cluster).items() if device != "mps")
    node.close()


async def test_a_supervisor_that_is_lost_is_told_and_its_daemons_come_back_at_the_same_paths(
    cluster: StandInCluster,
) -> None:
    driver = await start(cluster)
    ref = cluster.claim("one", by_mps("12Gi"))
    await cluster.run(ref)
    (before,) = MpsClient(cluster.mps).statuses()
    gone = cluster.supervisors.pop()

    await gone.terminate()  # the supervisor ends its daemons, like the end of its container
    await until_tainted(cluster, True)
    assert taints(cluster)["mps"] == {f"{DRIVER}/mps"}
    assert taints(cluster)["gpu"] == taints(cluster)["timeslice"] == set()
    assert "no MPS supervisor answers" in driver.log.read_text()

    await cluster.supervise()
    await until_tainted(cluster, False)
    (after,) = MpsClient(cluster.mps).statuses()
    assert (after.key, after.memory_mib, after.problem) == (before.key, 12288, "")
    assert after.pid != before.pid
    running = await asyncio.to_thread(program, cluster, ref)
    assert running.got()[0] == "12288"
    assert running.end() == 0
    await cluster.end(ref)


async def test_a_supervisor_that_ended_in_order_keeps_no_pod_from_its_end(cluster: StandInCluster) -> None:
    await start(cluster)
    ended, stays = cluster.claim("one", by_mps()), cluster.claim("two", by_mps())
    for ref in (ended, stays):
        await cluster.run(ref)
    other = cluster.claim("other", Request(name="gpu", driver=DRIVER, where={"type": "mps", "index": 1}))
    await cluster.run(other)
    keys = {daemon.device: daemon.key for daemon in MpsClient(cluster.mps).statuses()}
    await cluster.supervisors.pop().terminate()

    await cluster.end(ended)
    await cluster.end(other)

    # The next supervisor starts both daemons again. The driver stops the one without a claim; the other one stays.
    watch = FolderWatch(cluster.mps)
    await cluster.supervise()
    await asyncio.to_thread(gone, watch, cluster.mps, len(keys) - 1)
    watch.close()
    (daemon,) = MpsClient(cluster.mps).statuses()
    running = await asyncio.to_thread(program, cluster, stays)
    assert running.got()[0] == "8192"
    assert running.end() == 0
    await cluster.end(stays)
    assert MpsClient(cluster.mps).statuses() == ()
    assert daemon.key in keys.values()


def gone(watch: FolderWatch, root: Path, left: int) -> None:
    """Return when this number of daemons has a folder."""
    until = time.monotonic() + 20
    while sum(path.is_dir() for path in root.iterdir()) > left:
        assert select.select([watch.fileno()], [], [], max(0.0, until - time.monotonic()))[0], list(root.iterdir())
        watch.read()


async def test_a_daemon_that_dies_is_told_and_mended(cluster: StandInCluster) -> None:
    driver = await start(cluster)
    ref = cluster.claim("one", by_mps())
    await cluster.run(ref)
    client = MpsClient(cluster.mps)
    (before,) = client.statuses()

    watch = FolderWatch(cluster.mps / before.key, arrivals=True)  # its record is written at each start and each ensure
    os.kill(before.pid, signal.SIGKILL)
    after = await asyncio.to_thread(mended, client, watch, before.pid)
    watch.close()

    assert after.memory_mib == 8192
    await until_tainted(cluster, False)
    assert "was killed by SIGKILL" in driver.log.read_text()


async def test_without_a_supervisor_other_modes_go_on(short: Path) -> None:
    async with StandInCluster(short) as cluster:
        await cluster.start()
        await until_tainted(cluster, True)

        await cluster.run(cluster.claim("whole", CARD))
        await cluster.run(cluster.claim("turn", Request(name="gpu", driver=DRIVER, where={"type": "timeslice"})))


async def test_metrics_count_devices_by_mode(cluster: StandInCluster) -> None:
    driver = await cluster.start("--http-endpoint", "127.0.0.1:0")
    await cluster.run(cluster.claim("one", by_mps()))
    await cluster.run(cluster.claim("whole", CARD))
    (address,) = [
        line.rpartition(" ")[2] for line in driver.log.read_text().splitlines() if "metrics and probes on" in line
    ]

    def fetch() -> str:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    text = await asyncio.to_thread(fetch)

    assert 'gpuslice_prepared_devices{type="mps"} 1.0' in text
    assert 'gpuslice_prepared_devices{type="gpu"} 1.0' in text
    assert 'gpuslice_prepared_devices{type="timeslice"} 0.0' in text
    assert "gpuslice_mps_daemons_unwell 0.0" in text


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
async def test_where_nothing_keeps_devices_apart_a_part_of_a_card_is_served(short: Path, mode: str) -> None:
    """Found on a real Kubernetes 1.35: the static plan publishes other device names, and prepare must know them."""
    (short / "policy.yaml").write_text(
        f"apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {{static: {{{mode}: 3}}}}\n", encoding="utf-8"
    )
    async with StandInCluster(short, version="1.35") as cluster:
        await cluster.supervise()
        await start(cluster)
        ref = cluster.claim("part", Request(name="gpu", driver=DRIVER, where={"type": mode}))

        assert await cluster.run(ref)

        await cluster.end(ref)
