"""The command `gpuslice`: its subcommands, their flags and exit codes.

Imports of the driver proper happen inside the commands: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from gpuslice import __version__, config
from gpuslice.errors import ApiError, ConfigError, DriverError

EXIT_CODES = """\
exit codes:
  0  the command succeeded, or SIGTERM or SIGINT ended it
  1  the command started and then failed; the last line on standard error says why
  2  a flag, an environment variable or the policy file is wrong
  3  the node is not ready: GPUs, NVIDIA driver, folders or records
  4  the API server refused a request or did not answer it
  130  Ctrl-C ended the command before it was done (demo, devices, claims)
"""

_ABOUT = """\
A Kubernetes DRA driver for NVIDIA GPU slices: whole cards, MIG, MPS and time-slicing from the same card,
chosen by each claim.

  gpuslice demo                          show every feature on a simulated node: no GPU, no cluster, half a minute
  gpuslice run --simulate h100x2         run the kubelet plugin on a node with simulated cards
  gpuslice run                           run the kubelet plugin on a GPU node
  gpuslice mps-supervisor                run the MPS daemons of the node, in a process beside the plugin
  gpuslice devices                       show what each GPU offers, which claims hold it, and a map of its memory
  gpuslice claims                        list the prepared claims of this node
"""

_RUN = """\
Run the kubelet plugin: publish the node's GPUs as ResourceSlices, and prepare the claims that the kubelet asks for.

The plugin needs the name of its Node, an API server (by the service account of its pod, or --kubeconfig), the two plugin
folders of the kubelet, and the CDI folder of the container runtime. It keeps its records below the plugin folder. You may
kill it at any moment: the next start makes node, records and CDI files agree.
"""

_SUPERVISOR = """\
Run the MPS daemons of this node: one daemon for each card or partition that claims share by MPS.

Start the supervisor beside `gpuslice run`, with the same --mps-root. It is a process of its own, so MPS clients keep running
when you restart or upgrade the driver. It runs nvidia-cuda-mps-control from the driver root; with --simulate, it runs a
stand-in for that program.
"""

_DEMO = """\
Show every feature on this machine, without a GPU and without a cluster.

The demo starts the real driver as a process on a simulated node, with stand-ins for API server, scheduler and kubelet. It
makes claims for whole cards, MIG partitions, MPS and time-slicing. After each step it shows what each claim got and a map of
the cards. At the end it removes everything.
"""

_DEVICES = """\
Show each GPU of this node: a map of its memory slices, what it offers, which claims hold it, and what is unavailable and why.

If you gave folders or --simulate to `gpuslice run`, give the same ones here. The command changes nothing.
"""

_CLAIMS = """\
List the prepared claims of this node, with the devices and the share of each.

If you gave folders or --simulate to `gpuslice run`, give the same ones here. The command changes nothing.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; an error is one sentence on standard error."""
    parsed = parser().parse_args(arguments)
    try:
        code = parsed.command(parsed)
    except DriverError as e:
        print(f"gpuslice: {e}", file=sys.stderr)
        code = exit_code(e)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at its end
        code = 0
    sys.stdout.flush()
    sys.exit(code)


def exit_code(error: DriverError) -> int:
    """The exit code of a command that ends with this error."""
    return 2 if isinstance(error, ConfigError) else 4 if isinstance(error, ApiError) else 3


def parser() -> argparse.ArgumentParser:
    """What the command takes; docs/reference/ is made of it too."""
    gpuslice = _command_parser(argparse.ArgumentParser, prog="gpuslice", about=_ABOUT)
    gpuslice.add_argument("--version", action="version", version=f"gpuslice {__version__}")
    commands = gpuslice.add_subparsers(title="commands", metavar="COMMAND", required=True)
    run = _add(commands, "run", "run the kubelet plugin", _RUN, _run)
    config.add_flags(run)
    supervisor = _add(commands, "mps-supervisor", "run the MPS daemons of this node", _SUPERVISOR, _supervise)
    config.add_flags(supervisor, *config.SUPERVISOR_FLAGS)
    demo = _add(commands, "demo", "show every feature on a simulated node", _DEMO, _demo)
    demo.add_argument(
        "--simulate",
        default="h100x2",
        metavar="NODE",
        help="cards of the simulated node, e.g. a100-40gx2+l4; default h100x2",
    )
    devices = _add(commands, "devices", "show each GPU, its offers and its claims", _DEVICES, _devices)
    config.add_flags(devices, *config.NODE_FLAGS)
    claims = _add(commands, "claims", "list the prepared claims of this node", _CLAIMS, _claims)
    config.add_flags(claims, *config.NODE_FLAGS)
    return gpuslice


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    about: str,
    command: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    made = _command_parser(commands.add_parser, name, about=about, help=short)
    made.set_defaults(command=command)
    return made


def _command_parser(
    make: Callable[..., argparse.ArgumentParser], *names: str, about: str, **more: object
) -> argparse.ArgumentParser:
    return make(
        *names,
        description=about,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **more,
    )


# ---------------------------------------------------------------- commands


def _run(parsed: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # C-core writes lines of its own format otherwise
    from gpuslice import app

    return app.run(config.read(parsed))


def _supervise(parsed: argparse.Namespace) -> int:
    from gpuslice import hardware
    from gpuslice.mps import supervisor

    settings = config.read(parsed)
    return supervisor.run(settings.mps_root, hardware.mps_control(settings), settings.log_level)


def _demo(parsed: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from gpuslice.demo import story

    return story.run(parsed.simulate)


def _devices(parsed: argparse.Namespace) -> int:
    from gpuslice import node, report

    with node.snapshot(config.read(parsed)) as seen:
        print(report.node(seen.inventory, seen.live, seen.records.values(), seen.taints))
        for note in seen.notes:
            print(f"gpuslice: {note}", file=sys.stderr)
    return 0


def _claims(parsed: argparse.Namespace) -> int:
    from gpuslice import node, report

    with node.snapshot(config.read(parsed)) as seen:
        print(report.claims(seen.records))
    return 0
