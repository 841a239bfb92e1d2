"""The command `gpuslice`: what an operator and a newcomer type.

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
  0  done, or ended by SIGTERM / SIGINT
  1  it ran and failed; the last line on standard error says at what
  2  wrong usage: a flag, an environment variable, a policy file
  3  the node is not ready: GPUs, NVIDIA driver, folders, records
  4  the API server refused or did not answer
  130  ended by Ctrl-C before it was done (demo, devices, claims)
"""

_ABOUT = """\
A Kubernetes DRA driver for NVIDIA GPU slices: whole cards, MIG, MPS and time-slicing from the same card,
chosen by each claim.

  gpuslice demo                          see it all on a simulated node: no GPU, no cluster, half a minute
  gpuslice run --simulate h100x2         the kubelet plugin, on simulated cards, beside a kubelet
  gpuslice run                           the same on a GPU node
  gpuslice mps-supervisor                beside it: owns the MPS daemons
  gpuslice devices                       what each GPU offers and who holds what, with a map of its memory
  gpuslice claims                        what is prepared on this node
"""

_RUN = """\
Run the kubelet plugin: publish the node's GPUs as ResourceSlices, and prepare the claims that the kubelet asks for.

It needs a Node name, an API server (a service account in a pod, else --kubeconfig), the kubelet's two plugin folders and
the container runtime's CDI folder. It keeps its records below the plugin folder and may be killed at any moment: the
next start puts node, records and CDI files in agreement.
"""

_SUPERVISOR = """\
Own the MPS daemons of this node, one for each card or partition that is shared by MPS.

A process of its own, beside `run` and with the same --mps-root, so that restarting or upgrading the driver leaves MPS
clients running. It runs nvidia-cuda-mps-control from the driver root, or with --simulate a stand-in for it.
"""

_DEMO = """\
See it all on this machine, without a GPU and without a cluster.

It starts the real driver as a process on a simulated node, beside a stand-in API server and kubelet, hands out claims for
whole cards and MIG partitions, shows what each one got and the map of the cards after each step, and cleans up.
"""

_DEVICES = """\
Show each GPU of this node: a map of its memory slices, what it offers, who holds what, and what cannot be used and why.

Give the same folders (and --simulate) as to `run`; nothing is changed.
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; every error is one sentence on standard error."""
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
    supervisor = _add(commands, "mps-supervisor", "own the MPS daemons of this node", _SUPERVISOR, _supervise)
    config.add_flags(supervisor, *config.SUPERVISOR_FLAGS)
    demo = _add(commands, "demo", "see it all on a simulated node", _DEMO, _demo)
    demo.add_argument(
        "--simulate", default="h100x2", metavar="NODE", help="cards of the simulated node; default h100x2"
    )
    devices = _add(commands, "devices", "show each GPU, its offers and holders", _DEVICES, _devices)
    config.add_flags(devices, *config.NODE_FLAGS)
    claims = _add(
        commands, "claims", "list what is prepared on this node", "List what is prepared on this node.", _claims
    )
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
