"""Steps of the story in which claims get partitions or whole cards."""

from __future__ import annotations

from gpuslice.demo.cast import numbers
from gpuslice.demo.screen import say
from gpuslice.demo.stage import Stage, a_card, a_partition, cards, these_cards
from gpuslice.standin import resource_slices
from gpuslice.standin.cluster import DRIVER

GIB = 1 << 30


async def by_profile(stage: Stage) -> None:
    profile, _ = smallest(stage)
    await stage.take("small", f"a partition with profile {profile}", a_partition(profile=profile))
    stage.show_map()


async def by_memory(stage: Stage) -> None:
    for memory in (smallest(stage)[1], large(stage)):
        await stage.take(
            f"min-{memory.lower()}", f"a partition with at least {memory}", a_partition(memory=f">={memory}")
        )
    stage.show_map()


def smallest(stage: Stage) -> tuple[str, str]:
    """Profile and memory (in whole Gi) of the first partition that the scheduler would try."""
    for device in stage.devices().values():
        if profile := device["attributes"]["profile"]["string"]:
            memory = resource_slices.amount(device["capacity"]["memory"]["value"]) or 0
            return str(profile), f"{int(memory) // GIB}Gi"
    raise LookupError("no card of this node has MIG, so the story must not ask for a partition")


def large(stage: Stage) -> str:
    """A little less than half of a card. So the smallest partition with this memory has about half of the card."""
    return stage.cast.gib(3 / 8, stage.cast.cut)


async def no_partition(stage: Stage) -> None:
    await stage.take("early", "any partition", a_partition())
    stage.show_map()


async def whole_card(stage: Stage) -> None:
    free = len(stage.cast.wholes)
    if free:
        words = "a whole card" if free == 1 else f"{free} whole cards, all free cards"
        await stage.take("train", words, cards(free))
    await stage.take("late", "one more whole card" if free else "a whole card", a_card())
    stage.show_map()


async def double_allocation(stage: Stage) -> None:
    holder = next(iter(stage.held.values()))
    pool = stage.look(lambda node: node.records[holder.uid].plan.grants[0].allocation.device.pool)
    result = {"request": "gpu", "driver": DRIVER, "pool": pool, "device": "gpu"}
    ref = stage.cluster.create_allocated("wrong", {"devices": {"results": [result]}})
    error = (await stage.cluster.kubelet.prepare([ref]))[ref.uid].error
    say(f"the driver: {error}", 4)
    stage.must(bool(error), "the driver never gives one card to two claims")
    await stage.cluster.end(ref)


async def several_cards(stage: Stage) -> None:
    await stage.release("train")
    pair = (a_card("main"), a_partition("helper"))
    if not stage.fits(*pair):
        await stage.release("small")  # a card with four memory slices has no room for another partition
    await stage.take("pair", "a whole card, and any partition of another card", *pair)
    stage.show_map()


async def rest_of_the_node(stage: Stage) -> None:
    """Let one claim hold the cards without a part, so that the story continues with one or two cards."""
    if extras := stage.cast.extras:
        words = f"{numbers(extras)} as whole cards; the story continues with the rest"
        await stage.take("batch", words, *these_cards(*extras))
