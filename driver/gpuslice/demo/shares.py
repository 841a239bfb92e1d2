"""Steps of the story in which claims share one card: by MPS, by time-slicing, and back."""

from __future__ import annotations

import json

from gpuslice.demo.partitions import rest_of_the_node
from gpuslice.demo.screen import say
from gpuslice.demo.stage import Stage, a_card, a_partition, a_share


async def mps_shares(stage: Stage) -> None:
    await stage.release(*(("train", "pair") if stage.cast.two else tuple(stage.held)))
    await rest_of_the_node(stage)
    quarter, eighth = stage.cast.gib(1 / 4), stage.cast.gib(1 / 8)
    share = a_share("mps", memory=quarter, smPercent="25")
    await stage.take("infer", f"an MPS share: {quarter}, a quarter of the SMs", share)
    await stage.take("embed", f"an MPS share: {eighth}", a_share("mps", memory=eighth))
    stage.show_map()
    for daemon in stage.mps.statuses():
        memory = "none" if daemon.memory_mib is None else f"{daemon.memory_mib} MiB"
        say(f"MPS daemon of {daemon.device}, process {daemon.pid}: memory ceiling of every client {memory}")


async def container_view(stage: Stage) -> None:
    path = max(stage.cluster.cdi.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
    body = json.loads(path.read_text(encoding="utf-8"))
    say(path.name)
    for device in body["devices"]:
        nodes = device["containerEdits"].get("deviceNodes", [])
        say(f"{body['kind']}={device['name']}   {len(nodes)} device node{'s' * (len(nodes) != 1)}", 4)
        for entry in device["containerEdits"]["env"]:
            say(entry, 6)


async def time_slices(stage: Stage) -> None:
    memory = stage.cast.gib(1 / 5)
    await stage.take("notebook", f"a time-slicing share: {memory}", a_share("timeslice", memory=memory))
    await stage.release("infer", "embed")
    stage.must(not stage.mps.statuses(), "no MPS daemon is left")
    await stage.take("notebook", "the same claim again", a_share("timeslice", memory=memory))
    await stage.take("shell", "another time-slicing share, of the default size", a_share("timeslice"))
    stage.show_map()


async def back_again(stage: Stage) -> None:
    await stage.release("notebook", "shell")
    await stage.take("again", "a whole card", a_card())
    stage.show_map()
    await stage.release("again")
    memory, at = stage.cast.gib(3 / 8), stage.cast.shared
    if at is not None and stage.cast.share_cut:
        request = a_partition(memory=f">={memory}", index=at)
        await stage.take("half", f"a partition of GPU {at} with at least {memory}", request)
        stage.show_map()
        await stage.release("half")
    await stage.take("serve", f"an MPS share: {memory}", a_share("mps", memory=memory))
    stage.show_map()
