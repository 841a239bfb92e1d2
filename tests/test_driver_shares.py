"""Shares with the driver and the MPS supervisor as processes: killed, restarted, lost, and what the API shows meanwhile."""

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
from gpuslice.standin.cluster import DRIVER, Cluster, DriverProcess
from gpuslice.standin.scheduler import Request
from gpuslice.system.files import FolderWatch

from tests.kit.mps_node import Program

CARD = Request(name="gpu", driver=DRIVER, where={"type": "gpu"})
EIGHT = 8


def by_mps(memory: str = "8Gi") -> Request:
    return Request(name="gpu", driver=DRIVER, where={"type": "mps", "index": 0}, capacity={"memory": memory})


@pytest.fixture
async def cluster(short: Path) -> AsyncIterator[Cluster]:
    (short / "policy.yaml").write_text(
        "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {mps: {shares: 8}}\n", encoding="utf-8"
    )
    async with Cluster(short) as cluster:
        await cluster.supervise()
        yield cluster


async def start(cluster: Cluster) -> DriverProcess:
    return await cluster.start("--policy", str(cluster.folder / "policy.yaml"))


def program(cluster: Cluster, ref: ClaimRef) -> Program:
    """A CUDA program in the container that the CDI file of this claim makes."""
    body = json.loads((cluster.cdi / f"{DRIVER}-claim_{ref.uid}.json").read_text())
    told = dict(entry.split("=", 1) for entry in body["devices"][0]["containerEdits"]["env"])
    return Program.told(told)


def taints(cluster: Cluster) -> dict[str, set[str]]:
    """Keys of the taints of each device of the first card, by its name."""
    found: dict[str, set[str]] = {}
    for body in cluster.api.all("resourceslices"):
        for device in body["spec"].get("devices", ()):
            if device["attributes"]["index"]["int"] == 0:
                found[device["name"]] = {taint["key"] for taint in device.get("taints", ())}
    return found


async def until_tainted(cluster: Cluster, so: bool) -> None:
    await asyncio.to_thread(cluster.api.wait, lambda: bool(taints(cluster)["mps"]) is so, 20.0)


def mended(client: MpsClient, watch: FolderWatch, old_pid: int) -> DaemonStatus:
    """Wait until the only daemon is another process and the driver has ensured it."""
    until = time.monotonic() + 20
    while True:
        (running,) = client.running()
        if running.pid not in (0, old_pid) and not running.problem:
            return running
        assert time.monotonic() < until, running
        # The record is written before the status is shown, so its arrival alone would be too early.
        if select.select([watch], [], [], 0.1)[0]:
            watch.read()


async def test_a_driver_that_is_killed_disturbs_none_of_eight_clients(cluster: Cluster) -> None:
    first = await start(cluster)
    refs = [cluster.claim(f"c{number}", by_mps()) for number in range(EIGHT)]
    for ref in refs:
        await cluster.run(ref)
    programs = [await asyncio.to_thread(program, cluster, ref) for ref in refs]
    limits = [await asyncio.to_thread(running.got) for running in programs]
    before = MpsClient(cluster.mps).running()

    await first.kill()
    await start(cluster)
    names = [await cluster.run(ref) for ref in refs]

    assert MpsClient(cluster.mps).running() == before
    assert all(running.quiet() for running in programs)
    assert limits == [("8192", "100")] * EIGHT
    assert len(set(names)) == EIGHT
    assert [running.end() for running in programs] == [0] * EIGHT
    for ref in refs:
        await cluster.end(ref)
    assert MpsClient(cluster.mps).running() == ()


async def test_a_supervisor_that_is_lost_is_told_and_its_daemons_come_back_at_the_same_paths(cluster: Cluster) -> None:
    driver = await start(cluster)
    ref = cluster.claim("one", by_mps("12Gi"))
    await cluster.run(ref)
    (before,) = MpsClient(cluster.mps).running()
    gone = cluster.supervisors.pop()

    await gone.terminate()  # it ends its daemons, as the end of its container would
    await until_tainted(cluster, True)
    assert taints(cluster)["mps"] == {f"{DRIVER}/mps"}
    assert taints(cluster)["gpu"] == taints(cluster)["timeslice"] == set()
    assert "no MPS supervisor answers" in driver.log.read_text()

    await cluster.supervise()
    await until_tainted(cluster, False)
    (after,) = MpsClient(cluster.mps).running()
    assert (after.key, after.memory_mib, after.problem) == (before.key, 12288, "")
    assert after.pid != before.pid
    running = await asyncio.to_thread(program, cluster, ref)
    assert running.got()[0] == "12288"
    assert running.end() == 0
    await cluster.end(ref)


async def test_a_daemon_that_dies_is_told_and_mended(cluster: Cluster) -> None:
    driver = await start(cluster)
    ref = cluster.claim("one", by_mps())
    await cluster.run(ref)
    client = MpsClient(cluster.mps)
    (before,) = client.running()

    watch = FolderWatch(cluster.mps / before.key, arrivals=True)  # its record is written at each start and each ensure
    os.kill(before.pid, signal.SIGKILL)
    after = await asyncio.to_thread(mended, client, watch, before.pid)
    watch.close()

    assert after.memory_mib == 8192
    await until_tainted(cluster, False)
    assert "was killed by SIGKILL" in driver.log.read_text()


async def test_without_a_supervisor_other_modes_go_on(short: Path) -> None:
    async with Cluster(short) as cluster:
        await cluster.start()
        await until_tainted(cluster, True)

        await cluster.run(cluster.claim("whole", CARD))
        await cluster.run(cluster.claim("turn", Request(name="gpu", driver=DRIVER, where={"type": "timeslice"})))


async def test_metrics_count_devices_by_mode(cluster: Cluster) -> None:
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
    """Found on a real Kubernetes 1.35: what the static plan publishes has names of its own, which prepare has to know."""
    (short / "policy.yaml").write_text(
        f"apiVersion: gpuslice.dev/v1alpha1\nkind: Policy\ndefault: {{static: {{{mode}: 3}}}}\n", encoding="utf-8"
    )
    async with Cluster(short, version="1.35") as cluster:
        await cluster.supervise()
        await start(cluster)
        ref = cluster.claim("part", Request(name="gpu", driver=DRIVER, where={"type": mode}))

        assert await cluster.run(ref)

        await cluster.end(ref)
