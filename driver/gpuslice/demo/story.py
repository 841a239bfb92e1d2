"""`gpuslice demo`: the real driver, as a process, on a simulated node, with the acts of user, scheduler and kubelet.

The story is a list of steps. The node decides which of them are shown (`cast`). The end is a check: nothing may be left
on the node.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuslice import report
from gpuslice.demo import crash, partitions, shares
from gpuslice.demo.cast import Cast, numbers
from gpuslice.demo.offer import published
from gpuslice.demo.screen import WIDTH, say
from gpuslice.demo.stage import BrokenPromiseError, Stage
from gpuslice.mps.process import ProcessId
from gpuslice.node import Node
from gpuslice.nvml.sim import spec
from gpuslice.standin.cluster import StandInCluster, end_once
from gpuslice.standin.kubelet import KubeletError

# The kernel accepts 107 bytes of socket path, and our names need 44 of them: /gs-12345678/plugins/gpuslice.dev/dra.sock.
_LONGEST_FOLDER = 63
_SECONDS, _SECONDS_WITHOUT_MIG = 10, 3  # measured


def run(simulate: str) -> int:
    """Run all steps of the demo on this node. Returns 0, or 1 with a sentence if a step did not end as it should.

    ConfigError: there is no such node.
    """
    cast = Cast.of(spec.parse(simulate))
    setup_s = _age_s()
    begin = time.monotonic()
    try:
        asyncio.run(_tell(simulate, [step for step in _STEPS if step.when(cast)]))
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except (BrokenPromiseError, KubeletError, RuntimeError, TimeoutError) as e:
        print(f"gpuslice demo: {str(e) or type(e).__name__}", file=sys.stderr)
        return 1
    took_s = time.monotonic() - begin
    print()
    say(f"The demo took {setup_s + took_s:.0f} s, {setup_s:.0f} of them before the first step.", 0)
    say("Nothing is left on this machine.", 0)
    return 0


def _age_s() -> float:
    """The age of this process in seconds. `hack/demo` becomes this process, so its set-up counts."""
    started = ProcessId.of(os.getpid()).started / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


async def _tell(simulate: str, steps: Sequence[StoryStep]) -> None:
    end_once(signal.SIGINT)
    with tempfile.TemporaryDirectory(prefix="gs-", dir=_short_folder()) as folder:
        async with StandInCluster(Path(folder), simulate) as cluster:
            stage = Stage(cluster)
            _introduce(stage, len(steps))
            for number, step in enumerate(steps, 1):
                print()
                say(f"Step {number} of {len(steps)}. {step.heading}", 0)
                print(flush=True)
                try:
                    await step.act(stage)
                except Exception:
                    print(stage.log(), file=sys.stderr)
                    raise


def _short_folder() -> str | None:
    return "/tmp" if len(tempfile.gettempdir().encode()) > _LONGEST_FOLDER else None


def _introduce(stage: Stage, steps: int) -> None:
    cards, seconds = len(stage.cast.cards), _SECONDS if _mig(stage.cast) else _SECONDS_WITHOUT_MIG
    say(f"gpuslice on a simulated node with {cards} card{'s' * (cards > 1)}: {stage.cluster.simulate}", 0)
    say(f"{steps} steps, about {seconds} s on two idle cores. Ctrl-C ends the demo and removes everything.", 0)


# ---------------------------------------------------------------- the first steps and the last


async def start(stage: Stage) -> None:
    """At first no latency is simulated, so that the times are the driver's own."""
    supervisor = await stage.cluster.supervise()
    say(f"python -m gpuslice mps-supervisor --simulate {stage.cluster.simulate} …   (process {supervisor.pid})")
    driver = await stage.cluster.start()
    say(f"python -m gpuslice run --simulate {stage.cluster.simulate} …   (process {driver.pid})")
    for line in driver.log.read_text(encoding="utf-8").splitlines():
        say(line.split(" op=- ")[-1], 4)


async def whole_report(stage: Stage) -> None:
    extras = stage.cast.extras
    for index, text in stage.look(_reports).items():
        if index not in extras:
            print(f"{text}\n")
    if extras:
        say(f"… and {numbers(extras)}, which claim batch holds", 0)
        print()
    print(stage.look(lambda node: report.claims(node.records, WIDTH)))


def _reports(node: Node) -> dict[int, str]:
    """The report of each card."""
    records = tuple(node.records.values())
    return {
        pool.gpu.index: report.gpu_report(pool, node.live.get(pool.gpu.uuid), records, node.taints, WIDTH)
        for pool in node.inventory.pools
    }


async def the_end(stage: Stage) -> None:
    await stage.release_all()
    code = await stage.driver.terminate()
    stage.must(code == 0, "the driver ends with exit code 0")
    stage.must(not stage.mps.statuses(), "no MPS daemon is left")
    code = await stage.cluster.supervisors[-1].terminate()
    stage.must(code == 0, "the MPS supervisor ends with exit code 0")
    left = stage.look(lambda node: [p for live in node.live.values() for p in live.partitions])
    stage.must(not left, "no partition is left on the node")
    stage.must(not stage.look(lambda node: dict(node.records)), "no record is left")
    stage.must(not list(stage.cluster.cdi.iterdir()), "no CDI file is left")


# ---------------------------------------------------------------- the story


@dataclass(frozen=True, slots=True)
class StoryStep:
    """One step. It begins where the step before ended. `when`: on which nodes it is shown."""

    heading: str
    act: Callable[[Stage], Awaitable[None]]
    when: Callable[[Cast], bool] = lambda _: True


def _mig(cast: Cast) -> bool:
    return cast.cut is not None


def _no_mig(cast: Cast) -> bool:
    return cast.cut is None


def _stuck(cast: Cast) -> bool:
    return cast.stuck


def _two(cast: Cast) -> bool:
    return cast.two


def _only_mig(cast: Cast) -> bool:
    return _mig(cast) and not cast.two


def _shares(cast: Cast) -> bool:
    return cast.shared is not None


def _share_cut(cast: Cast) -> bool:
    return cast.share_cut


def _share_not_cut(cast: Cast) -> bool:
    return _shares(cast) and not cast.share_cut


_STEPS: tuple[StoryStep, ...] = (
    StoryStep(
        "The driver and the MPS supervisor start on a simulated node; API server and kubelet are stand-ins.", start
    ),
    StoryStep("What the scheduler sees: one pool per card, and counters that keep its devices apart.", published),
    StoryStep(
        "A claim names a MIG profile. No card has partitions yet, so the driver makes one.",
        partitions.by_profile,
        _mig,
    ),
    StoryStep(
        "Two claims name only the memory that they need. Each gets the smallest partition with that memory.",
        partitions.by_memory,
        _mig,
    ),
    StoryStep(
        "A claim for whole cards gets those without partitions, because the counters say so. One more claim waits.",
        partitions.whole_card,
        _two,
    ),
    StoryStep("A claim for a whole card waits, because every card is in MIG mode.", partitions.whole_card, _only_mig),
    StoryStep(
        "A claim for a partition waits, because no card has MIG mode on, and these cards switch it only with a reset.",
        partitions.no_partition,
        _stuck,
    ),
    StoryStep("A claim gets all cards of the node. One more claim waits.", partitions.whole_card, _no_mig),
    StoryStep(
        "A faulty scheduler allocates a partitioned card as a whole. The driver refuses at once and names the holder.",
        partitions.double_allocation,
        _mig,
    ),
    StoryStep(
        "A faulty scheduler allocates a card a second time. The driver refuses at once and names the holder.",
        partitions.double_allocation,
        _no_mig,
    ),
    StoryStep("One claim takes two cards: a whole one and a partition of the other.", partitions.several_cards, _two),
    StoryStep(
        "Two claims share the free card by MPS: their programs run at once, each with its own memory limit.",
        shares.mps_shares,
        _shares,
    ),
    StoryStep(
        "What the container runtime reads: one CDI file per claim, here without its device nodes.",
        shares.container_view,
        _shares,
    ),
    StoryStep(
        "A card has one mode at a time: time-slicing shares wait until the last MPS share is released.",
        shares.time_slices,
        _shares,
    ),
    StoryStep(
        "The same card serves as a whole, then as partitions, then by MPS. The driver switches the modes by itself.",
        shares.back_again,
        _share_cut,
    ),
    StoryStep(
        "The same card serves as a whole, then by MPS. The driver switches the modes by itself.",
        shares.back_again,
        _share_not_cut,
    ),
    StoryStep(
        "SIGKILL ends the driver in the middle of a prepare: a GPU instance exists, but no compute instance.",
        crash.killed,
        _mig,
    ),
    StoryStep(
        "SIGKILL ends the driver in the middle of a prepare: the claim is recorded, but its card is not set up yet.",
        crash.killed,
        _no_mig,
    ),
    StoryStep(
        "The driver starts again and undoes the prepare that did not end. Then the kubelet tries again. From here on "
        "a simulated call takes as long as one on a real GPU, in order of magnitude.",
        crash.again,
    ),
    StoryStep("What `gpuslice devices` and `gpuslice claims` show an operator.", whole_report),
    StoryStep("All claims are released, the driver ends, and the node is as empty as before.", the_end),
)
