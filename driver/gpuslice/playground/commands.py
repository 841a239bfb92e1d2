"""The arguments of `gpuslice playground`. No module of the driver is loaded before a command is chosen."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from gpuslice.commands.parser import add
from gpuslice.commands.texts import PLAYGROUND_EXAMPLES
from gpuslice.config import LATENCIES


def add_commands(parser: argparse.ArgumentParser) -> None:
    """The four commands of the playground, below `gpuslice playground`."""
    actions = parser.add_subparsers(prog=parser.prog, title="commands", metavar="COMMAND", required=True)
    up = _add(actions, "up", "start a playground in the background", _up)
    up.add_argument("--simulate", default="h100x2", metavar="NODE", help="cards to simulate; default h100x2")
    up.add_argument(
        "--simulate-latency",
        default="realistic",
        choices=LATENCIES,
        metavar="LATENCY",
        help=f"how long simulated calls take: one of {', '.join(LATENCIES)}; default realistic",
    )
    claim = _add(actions, "claim", "make a claim of a DeviceClass and prepare it", _claim, "CLASS [flags]")
    claim.add_argument("device_class", metavar="CLASS", help="such as mig.gpuslice.dev, or mig for short")
    claim.add_argument("--name", default="", metavar="NAME", help="name of the claim; default CLASS-NUMBER")
    claim.add_argument("--profile", default="", metavar="1g.10gb", help="MIG profile")
    claim.add_argument("--memory", default="", metavar="9Gi", help="minimum of memory")
    claim.add_argument("--sm-percent", default="", metavar="25", help="percent of the SMs (MPS)")
    claim.add_argument("--shares", default="", metavar="2", help="turns of a time-slicing share")
    claim.add_argument("--count", type=int, default=1, metavar="2", help="number of devices; default 1")
    release = _add(actions, "release", "release a claim", _release, "NAME [flags]")
    release.add_argument("name", metavar="NAME", help="name of the claim")
    _add(actions, "down", "end the playground and remove all its files", _down)
    for action in actions.choices.values():
        action.add_argument(
            "--folder", type=Path, metavar="FOLDER", help="folder of the playground, if there are several"
        )


def run(parsed: argparse.Namespace) -> int:
    """Run the chosen command. Returns 0, or 1 after one sentence on standard error. ConfigError: a typed value is wrong."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from gpuslice.playground.folder import PlaygroundError

    try:
        print(parsed.action(parsed))
    except PlaygroundError as e:
        print(f"gpuslice playground: {e}", file=sys.stderr)
        return 1
    return 0


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    action: Callable[[argparse.Namespace], str],
    usage: str = "[flags]",
) -> argparse.ArgumentParser:
    about = f"{short[0].upper()}{short[1:]}.\n"
    made = add(actions, name, short, run, about=about, examples=PLAYGROUND_EXAMPLES, usage=usage)
    made.set_defaults(action=action)
    return made


def _up(parsed: argparse.Namespace) -> str:
    from gpuslice.playground import client

    return client.up(parsed.folder, parsed.simulate, parsed.simulate_latency)


def _claim(parsed: argparse.Namespace) -> str:
    from gpuslice.playground import client
    from gpuslice.playground.wanted import Wanted

    wanted = Wanted(
        device_class=parsed.device_class,
        name=parsed.name,
        profile=parsed.profile,
        memory=parsed.memory,
        sm_percent=parsed.sm_percent,
        shares=parsed.shares,
        count=parsed.count,
    )
    return client.claim(parsed.folder, wanted)


def _release(parsed: argparse.Namespace) -> str:
    from gpuslice.playground import client

    return client.release(parsed.folder, parsed.name)


def _down(parsed: argparse.Namespace) -> str:
    from gpuslice.playground import client

    return client.down(parsed.folder)
