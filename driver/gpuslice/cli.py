"""The command `gpuslice`: its subcommands, their flags and exit codes.

Imports of the driver proper happen inside the commands: `--help` and a wrong flag answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from gpuslice import __version__, config
from gpuslice.commands import completion, output, removal, texts, trouble
from gpuslice.commands.parser import CommandParser, add, make, parse
from gpuslice.commands.texts import EXIT_CODES as EXIT_CODES
from gpuslice.errors import ApiError, ConfigError, DriverError, RemovalError
from gpuslice.playground import commands as playground


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit; every error is one sentence on standard error."""
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names may have any bytes
    code = _outcome(arguments)
    sys.exit(code)


def _outcome(arguments: Sequence[str] | None) -> int:
    try:
        try:
            parsed = parse(parser(), arguments)
            code: int = parsed.command(parsed)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
        return code
    except SystemExit as e:
        return e.code if isinstance(e.code, int) else 0
    except DriverError as e:
        return _ends(e, exit_code(e))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence()
        return 0
    except Exception as e:
        _silence()  # otherwise a failed output fails again when the interpreter ends
        return _ends(*trouble.sentence(e))


def _ends(sentence: object, code: int) -> int:
    from gpuslice.system.logs import printable

    print(f"gpuslice: {printable(str(sentence))}", file=sys.stderr)
    return code


def _silence() -> None:
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code(error: DriverError) -> int:
    """The exit code of a command that ends with this error."""
    match error:
        case RemovalError():
            return 1
        case ConfigError():
            return 2
        case ApiError():
            return 4
        case _:
            return 3


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. docs/reference/ and the completion scripts are made from it, too."""
    gpuslice = make(CommandParser, prog="gpuslice", about=texts.ABOUT, examples=texts.EXAMPLES)
    gpuslice.add_argument("--version", action="version", version=f"gpuslice {__version__}")
    commands = gpuslice.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_services(commands)
    _add_looks(commands)
    removal.add_commands(commands)
    shell = add(commands, "completion", "print a completion script for a shell", _completion,
                about=texts.COMPLETION, examples=texts.COMPLETION_EXAMPLES, usage="SHELL")  # fmt: skip
    shell.add_argument("shell", choices=completion.SHELLS, metavar="SHELL", help=", ".join(completion.SHELLS))
    shown = add(commands, "help", "show the help of a command", _help,
                about=texts.HELP, examples=texts.HELP_EXAMPLES, usage="[COMMAND ...]")  # fmt: skip
    shown.add_argument("names", nargs="*", metavar="COMMAND", help="such as run, or policy check")
    return gpuslice


def _add_services(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = add(commands, "run", "run the kubelet plugin", _run, about=texts.RUN, examples=texts.RUN_EXAMPLES)
    config.add_flags(run)
    supervisor = add(commands, "mps-supervisor", "run the MPS daemons of this node", _supervise,
                     about=texts.SUPERVISOR, examples=texts.SUPERVISOR_EXAMPLES)  # fmt: skip
    config.add_flags(supervisor, *config.SUPERVISOR_FLAGS)
    preflight = add(commands, "preflight", "check a node before the plugin starts", _preflight,
                    about=texts.PREFLIGHT, examples=texts.PREFLIGHT_EXAMPLES)  # fmt: skip
    config.add_flags(preflight, *config.PREFLIGHT_FLAGS)
    demo = add(commands, "demo", "show every feature on a simulated node", _demo,
               about=texts.DEMO, examples=texts.DEMO_EXAMPLES)  # fmt: skip
    demo.add_argument(
        "--simulate",
        default="h100x2",
        metavar="NODE",
        help="cards of the simulated node, e.g. a100-40gx2+l4; default h100x2",
    )
    play = add(commands, "playground", "try claims of your own on simulated cards", None,
               about=texts.PLAYGROUND, examples=texts.PLAYGROUND_EXAMPLES, usage="COMMAND ...")  # fmt: skip
    playground.add_commands(play)


def _add_looks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    devices = add(commands, "devices", "show each GPU, its offers and its claims", _devices,
                  about=texts.DEVICES, examples=texts.DEVICES_EXAMPLES)  # fmt: skip
    claims = add(commands, "claims", "list the prepared claims of this node", _claims,
                 about=texts.CLAIMS, examples=texts.CLAIMS_EXAMPLES)  # fmt: skip
    for command in (devices, claims):
        output.add_format(command)
        config.add_flags(command, *config.NODE_FLAGS)
    policy = add(commands, "policy", "work on a policy file", None,
                 about=texts.POLICY, examples=texts.CHECK_EXAMPLES, usage="COMMAND ...")  # fmt: skip
    below = policy.add_subparsers(prog=policy.prog, title="commands", metavar="COMMAND", required=True)
    check = add(below, "check", "print what each GPU would offer", _check,
                about=texts.CHECK, examples=texts.CHECK_EXAMPLES, usage="FILE [flags]")  # fmt: skip
    check.add_argument("policy", metavar="FILE", help="the policy file")
    config.add_flags(check, *config.POLICY_FLAGS)


# ---------------------------------------------------------------- commands


def _run(parsed: argparse.Namespace) -> int:
    settings = config.check_paths(config.read(parsed))
    config.check_descriptors()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # otherwise C-core writes lines in its own format
    from gpuslice import app

    return app.run(settings)


def _supervise(parsed: argparse.Namespace) -> int:
    settings = config.check_paths(config.read(parsed))
    from gpuslice import hardware
    from gpuslice.mps import supervisor

    return supervisor.run(settings.mps_root, lambda: hardware.mps_control(settings), settings.log_level)


def _preflight(parsed: argparse.Namespace) -> int:
    settings = config.check_paths(config.read(parsed))
    from gpuslice import preflight

    found = preflight.look(settings)
    codes = [_ends(problem, exit_code(problem)) for problem in found.problems]
    output.warn(found.notes)
    if not codes:
        print("this node is ready for the driver")
    return codes[0] if codes else 0


def _demo(parsed: argparse.Namespace) -> int:
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from gpuslice.demo import story

    return story.run(parsed.simulate)


def _devices(parsed: argparse.Namespace) -> int:
    from gpuslice.commands import show

    return show.devices(parsed)


def _claims(parsed: argparse.Namespace) -> int:
    from gpuslice.commands import show

    return show.claims(parsed)


def _check(parsed: argparse.Namespace) -> int:
    from gpuslice.commands import show

    return show.check(parsed)


def _completion(parsed: argparse.Namespace) -> int:
    print(completion.script(parser(), parsed.shell), end="")
    return 0


def _help(parsed: argparse.Namespace) -> int:
    parser().parse_args([*parsed.names, "--help"])
    return 0
