"""`gpuslice demo`: the real driver, as a process, on a simulated node, and what a user, the scheduler and the kubelet do.

The story is a list of steps; the first line of a step's docstring is its heading. On another node than h100x2 what does
not fit stays Pending and says so. The end is a check, not a promise: nothing may be left on the node.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from gpuslice import report
from gpuslice.core.model import ClaimRef
from gpuslice.demo.stage import BrokenPromiseError, Stage, a_card, a_partition, a_share
from gpuslice.nvml.sim import spec
from gpuslice.nvml.sim.node import SimNode
from gpuslice.standin.cluster import DRIVER, StandInCluster
from gpuslice.standin.kubelet import KubeletError

# The kernel takes 107 bytes of socket path, and 44 of them are ours: /gs-12345678/plugins/gpuslice.dev/dra.sock.
_LONGEST_FOLDER = 63
_ASK_S = 30.0


def run(simulate: str) -> int:
    """Run all steps of the demo on this node. Returns 0, or 1 with a sentence if a step did not end as it must.

    ConfigError: there is no such node.
    """
    spec.parse(simulate)
    try:
        asyncio.run(_tell(simulate))
    except (BrokenPromiseError, KubeletError, RuntimeError, TimeoutError) as e:
        print(f"gpuslice demo: {str(e) or type(e).__name__}", file=sys.stderr)
        return 1
    return 0


async def _tell(simulate: str) -> None:
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gs-", dir=_short_folder()) as folder:
        async with StandInCluster(Path(folder), simulate) as cluster:
            stage = Stage(cluster)
            for number, step in enumerate(_STEPS, 1):
                print(f"\n{number}. {(step.__doc__ or '').splitlines()[0]}\n", flush=True)
                try:
                    await step(stage)
                except Exception:
                    print(stage.log(), file=sys.stderr)
                    raise
    print(f"\nThe demo took {time.monotonic() - begin:.0f} s; nothing is left on this machine.")


def _short_folder() -> str | None:
    return "/tmp" if len(tempfile.gettempdir().encode()) > _LONGEST_FOLDER else None


# ---------------------------------------------------------------- the story


async def start(stage: Stage) -> None:
    """The driver and the MPS supervisor start on a simulated node; API server and kubelet are stand-ins.

    No latency is simulated at first, so that times are the driver's own.
    """
    supervisor = await stage.cluster.supervise()
    print(f"  python -m gpuslice mps-supervisor --simulate {stage.cluster.simulate} …   (process {supervisor.pid})")
    driver = await stage.cluster.start()
    print(f"  python -m gpuslice run --simulate {stage.cluster.simulate} …   (process {driver.pid})")
    for line in driver.log.read_text(encoding="utf-8").splitlines():
        print(f"    {line.split(' op=- ')[-1]}")


async def published(stage: Stage) -> None:
    """What the scheduler sees: one pool per card, and counters that keep its devices apart."""
    slices = [body["spec"] for body in stage.cluster.api.all("resourceslices")]
    for pool in sorted({one["pool"]["name"] for one in slices}):
        mine = [one for one in slices if one["pool"]["name"] == pool]
        sets = [entry["counters"] for one in mine for entry in one.get("sharedCounters", [])]
        counters = [f"{name}={amount['value']}" for one in sets for name, amount in one.items()]
        kinds = Counter(_kind(device) for one in mine for device in one.get("devices", []))
        print(f"  pool {pool}")
        print(f"    devices   {', '.join(kind if n == 1 else f'{n} x {kind}' for kind, n in kinds.items())}")
        print(f"    counters  {', '.join(counters) or 'none'}")


def _kind(device: Mapping[str, Any]) -> str:
    attributes = device["attributes"]
    return str(attributes["profile"]["string"] or attributes["type"]["string"])


async def by_profile(stage: Stage) -> None:
    """A claim names a MIG profile. No card has partitions yet, so the driver makes one."""
    profiles = (device["attributes"]["profile"]["string"] for device in stage.devices().values())
    smallest = next(filter(None, profiles), "1g.10gb")
    await stage.take("small", f"a partition with profile {smallest}", a_partition(profile=smallest))
    stage.show_map()


async def by_memory(stage: Stage) -> None:
    """Two claims name only the memory that they need. Each gets the smallest partition with that memory."""
    await stage.take("nine", "a partition with at least 9Gi", a_partition(memory=">=9Gi"))
    await stage.take("thirty", "a partition with at least 30Gi", a_partition(memory=">=30Gi"))
    stage.show_map()


async def whole_card(stage: Stage) -> None:
    """A claim for a whole card gets one without partitions, because the counters say so. A second claim waits."""
    await stage.take("train", "a whole card", a_card())
    await stage.take("late", "another whole card", a_card())
    stage.show_map()


async def double_allocation(stage: Stage) -> None:
    """A faulty scheduler allocates a partitioned card as a whole. The driver refuses at once and names the holder."""
    holder = stage.held.get("small")
    if holder is None:
        print("  (no card of this node was partitioned)")
        return
    pool = stage.look(lambda node: node.records[holder.uid].plan.grants[0].allocation.device.pool)
    result = {"request": "gpu", "driver": DRIVER, "pool": pool, "device": "gpu"}
    ref = stage.cluster.create_allocated("wrong", {"devices": {"results": [result]}})
    error = (await stage.cluster.kubelet.prepare([ref]))[ref.uid].error
    print(f"    the driver: {error}")
    stage.must(bool(error), "the driver never gives one card to two claims")
    await stage.cluster.end(ref)


async def several_cards(stage: Stage) -> None:
    """One claim takes two cards: a whole one and a partition of the other."""
    await stage.release("train")
    smaller = a_partition("helper")
    await stage.take("pair", "a whole card, and any partition of another card", a_card("main"), smaller)
    stage.show_map()


async def mps_shares(stage: Stage) -> None:
    """Two claims share the free card by MPS: their programs run at once, each with its own memory limit."""
    await stage.release("pair")
    await stage.take("infer", "an MPS share: 20Gi, a quarter of the SMs", a_share("mps", memory="20Gi", smPercent="25"))
    await stage.take("embed", "an MPS share: 10Gi", a_share("mps", memory="10Gi"))
    stage.show_map()
    _daemons(stage)


def _daemons(stage: Stage) -> None:
    for daemon in stage.mps.statuses():
        memory = "none" if daemon.memory_mib is None else f"{daemon.memory_mib} MiB"
        print(f"  MPS daemon of {daemon.device}, process {daemon.pid}: memory ceiling of every client {memory}")


async def container_view(stage: Stage) -> None:
    """What the container runtime reads: one CDI file per claim, here without its device nodes."""
    written = sorted(stage.cluster.cdi.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    if not written:
        print("  (no claim is prepared)")
        return
    path = written[-1]
    body = json.loads(path.read_text(encoding="utf-8"))
    print(f"  {path.name}")
    for device in body["devices"]:
        nodes = device["containerEdits"].get("deviceNodes", [])
        print(f"    {body['kind']}={device['name']}   {len(nodes)} device node{'s' * (len(nodes) != 1)}")
        for entry in device["containerEdits"]["env"]:
            print(f"      {entry}")


async def time_slices(stage: Stage) -> None:
    """A card has one mode at a time: time-slicing shares wait until the last MPS share is released."""
    await stage.take("notebook", "a time-slicing share: 16Gi", a_share("timeslice", memory="16Gi"))
    shared = [name for name in ("infer", "embed") if name in stage.held]
    for name in shared:
        await stage.release(name)
    stage.must(not stage.mps.statuses(), "no MPS daemon is left")
    await stage.take("notebook", "the same claim again", a_share("timeslice", memory="16Gi"))
    await stage.take("shell", "another time-slicing share, of the default size", a_share("timeslice"))
    stage.show_map()


async def back_again(stage: Stage) -> None:
    """The same card serves as a whole, then as partitions, then by MPS. The driver switches the modes by itself."""
    for name in ("notebook", "shell"):
        await stage.release(name)
    for name, words, request in (
        ("again", "a whole card", a_card()),
        ("half", "a partition with at least 30Gi", a_partition(memory=">=30Gi")),
        ("serve", "an MPS share: 30Gi", a_share("mps", memory="30Gi")),
    ):
        if await stage.take(name, words, request):
            stage.show_map()
        if name != "serve":
            await stage.release(name)


async def killed(stage: Stage) -> None:
    """SIGKILL ends the driver in the middle of a prepare: a GPU instance exists, but no compute instance."""
    await stage.release("thirty")
    ref = stage.claim("unlucky", "a partition with at least 30Gi", a_partition(memory=">=30Gi"))
    if ref is not None:
        await _hang(stage, ref)
        stage.held["unlucky"] = ref
    await stage.driver.kill()
    SimNode(stage.cluster.node_folder).withdraw()
    print(f"  SIGKILL to process {stage.driver.pid}; partitions and MPS shares of other claims keep running")
    stage.show_map()


async def _hang(stage: Stage, ref: ClaimRef) -> None:
    """Return while the claim's prepare hangs after its first effect on the card."""
    node = SimNode(stage.cluster.node_folder)
    cue = node.cue("hang", "create_compute_instance")
    stage.calls.append(asyncio.create_task(stage.cluster.kubelet.prepare([ref])))
    stage.must(await asyncio.to_thread(node.wait_hung, cue, _ASK_S), "the prepare hangs in NVML, as the demo ordered")
    node.close()


async def again(stage: Stage) -> None:
    """The driver starts again and undoes the prepare that did not end. Then the kubelet tries again.

    From here on the simulated GPU takes the time of a real one (orders of magnitude, not measurements).
    """
    await asyncio.gather(*stage.calls, return_exceptions=True)
    driver = await stage.cluster.start("--simulate-latency", "realistic")
    print(f"  process {driver.pid} is registered; its ResourceSlices have not changed")
    beside = stage.claim(
        "beside", "an MPS share of the other card: 10Gi, at the same moment", a_share("mps", memory="10Gi")
    )
    begin = time.monotonic()
    await asyncio.gather(*(stage.use(ref) for ref in (stage.held.get("unlucky"), beside) if ref is not None))
    print(f"  both took {time.monotonic() - begin:.1f} s together, because no card waits for another")
    stage.show_map()
    _check(stage)


def _check(stage: Stage) -> None:
    """Node, records and CDI folder agree about every claim."""
    records = stage.look(lambda node: dict(node.records))
    made = {device.uuid for r in records.values() if r.prepared for device in r.prepared.devices}
    there = stage.look(lambda node: {p.uuid for live in node.live.values() for p in live.partitions})
    named = {f"{DRIVER}-claim_{uid}.json" for uid in records}
    stage.must(all(r.prepared for r in records.values()), f"{len(records)} records, and each of them is finished")
    stage.must(there <= made, f"{len(there)} partitions, and each of them has a record")
    stage.must(
        named == {path.name for path in stage.cluster.cdi.iterdir()},
        "each record has a CDI file, and there is no other CDI file",
    )


async def whole_report(stage: Stage) -> None:
    """What `gpuslice devices` and `gpuslice claims` show an operator."""
    full = stage.look(lambda node: report.node(node.inventory, node.live, node.records.values(), node.taints))
    table = stage.look(lambda node: report.claims(node.records))
    print("\n".join(f"  {line}".rstrip() for line in f"{full}\n\n{table}".splitlines()))


async def the_end(stage: Stage) -> None:
    """All claims are released, the driver ends, and the node is as empty as before."""
    for name in list(stage.held):
        await stage.release(name)
    code = await stage.driver.terminate()
    stage.must(code == 0, "the driver ends with exit code 0")
    stage.must(not stage.mps.statuses(), "no MPS daemon is left")
    code = await stage.cluster.supervisors[-1].terminate()
    stage.must(code == 0, "the MPS supervisor ends with exit code 0")
    left = stage.look(lambda node: [p for live in node.live.values() for p in live.partitions])
    stage.must(not left, "no partition is left on the node")
    stage.must(not stage.look(lambda node: dict(node.records)), "no record is left")
    stage.must(not list(stage.cluster.cdi.iterdir()), "no CDI file is left")


_STEPS: tuple[Callable[[Stage], Awaitable[None]], ...] = (
    start,
    published,
    by_profile,
    by_memory,
    whole_card,
    double_allocation,
    several_cards,
    mps_shares,
    container_view,
    time_slices,
    back_again,
    killed,
    again,
    whole_report,
    the_end,
)
