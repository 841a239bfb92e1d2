"""Steps of the story that kill the driver in the middle of its work, and start it again."""

from __future__ import annotations

import asyncio
import time

from gpuslice.core.model import ClaimRef
from gpuslice.demo.partitions import large, smallest
from gpuslice.demo.screen import say
from gpuslice.demo.stage import Stage, a_partition, a_share
from gpuslice.nvml.sim.node import SimNode
from gpuslice.standin.cluster import DRIVER

_ASK_S = 30.0


async def killed(stage: Stage) -> None:
    if stage.cast.cut is None:
        await _share_hangs(stage)
    else:
        await _partition_hangs(stage)
    await stage.driver.kill()
    SimNode(stage.cluster.node_folder).withdraw()
    say(f"SIGKILL to process {stage.driver.pid}; partitions and MPS shares of other claims keep running")
    stage.show_map()


async def _partition_hangs(stage: Stage) -> None:
    before = f"min-{large(stage).lower()}"
    if before in stage.held:
        await stage.release(before)
    else:
        await stage.release("serve")
        profile, _ = smallest(stage)
        await stage.take("steady", f"a partition with profile {profile}", a_partition(profile=profile))
    request = a_partition(memory=f">={large(stage)}")
    ref = stage.claim("unlucky", f"a partition with at least {large(stage)}", request)
    await _hang(stage, ref, "create_compute_instance")


async def _share_hangs(stage: Stage) -> None:
    await stage.release("serve")
    memory = stage.cast.gib(3 / 8)
    ref = stage.claim("unlucky", f"an MPS share: {memory}", a_share("mps", memory=memory))
    await _hang(stage, ref, "set_compute_mode")


async def _hang(stage: Stage, ref: ClaimRef | None, call: str) -> None:
    """Return while the claim's prepare hangs in this call of NVML."""
    if ref is None:
        return
    node = SimNode(stage.cluster.node_folder)
    cue = node.cue("hang", call)
    stage.calls.append(asyncio.create_task(stage.cluster.kubelet.prepare([ref])))
    stage.must(await asyncio.to_thread(node.wait_hung, cue, _ASK_S), "the prepare hangs in NVML, as the demo ordered")
    node.close()
    stage.held["unlucky"] = ref


async def again(stage: Stage) -> None:
    await asyncio.gather(*stage.calls, return_exceptions=True)
    driver = await stage.cluster.start("--simulate-latency", "realistic")
    say(f"process {driver.pid} is registered; its ResourceSlices have not changed")
    wanted = [stage.held["unlucky"]] if "unlucky" in stage.held else []
    if stage.cast.two:
        memory = stage.cast.gib(1 / 8)
        words = f"an MPS share of the other card: {memory}, at the same moment"
        beside = stage.claim("beside", words, a_share("mps", memory=memory))
        wanted += [beside] if beside is not None else []
    begin = time.monotonic()
    await asyncio.gather(*(stage.use(ref) for ref in wanted))
    if len(wanted) > 1:
        say(f"both took {time.monotonic() - begin:.1f} s together, because no card waits for another")
    stage.show_map()
    _check(stage)


def _check(stage: Stage) -> None:
    """Check that node, records and CDI folder agree about every claim."""
    records = stage.look(lambda node: dict(node.records))
    made = {device.uuid for r in records.values() if r.prepared for device in r.prepared.devices}
    there = stage.look(lambda node: {p.uuid for live in node.live.values() for p in live.partitions})
    named = {f"{DRIVER}-claim_{uid}.json" for uid in records}
    stage.must(all(r.prepared for r in records.values()), f"{_many(len(records), 'record')}, all finished")
    stage.must(there <= made, f"{_many(len(there), 'partition')}, each with a record")
    stage.must(
        named == {path.name for path in stage.cluster.cdi.iterdir()},
        "each record has a CDI file, and there is no other CDI file",
    )


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
