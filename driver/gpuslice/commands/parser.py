"""An argument parser with a help of 80 columns, whose errors are one sentence of the command in use."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from gpuslice.commands import texts

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

WIDTH = 80  # columns of a usual terminal

Command = Callable[[argparse.Namespace], int]


class CommandParser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Argparse's own method hides that an output fails."""
        (file or sys.stderr).write(message)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def make(
    new: Callable[..., argparse.ArgumentParser], *names: str, about: str, examples: str, **more: object
) -> argparse.ArgumentParser:
    """A parser of this command, by `CommandParser` or by `add_parser` of another one."""
    return new(
        *names,
        description=about,
        epilog=f"{examples}\n{texts.EXIT_CODES}",
        formatter_class=_formatter,
        allow_abbrev=False,
        **more,
    )


def add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    short: str,
    command: Command | None,
    *,
    about: str,
    examples: str,
    usage: str = "[flags]",
) -> argparse.ArgumentParser:
    """Add a command. Without `command` it only groups commands below it."""
    prog = f"{commands._prog_prefix} {name}"
    made = make(commands.add_parser, name, about=about, examples=examples, help=short, usage=f"{prog} {usage}")
    if command is not None:
        made.set_defaults(command=command, parser=made)
    return made


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but an unknown argument is an error of its command, which also names the nearest known one."""
    parsed, rest = parser.parse_known_args(arguments)
    if rest:
        import difflib

        at: argparse.ArgumentParser = getattr(parsed, "parser", parser)
        known = [option for action in at._actions for option in action.option_strings]
        near = difflib.get_close_matches(rest[0].partition("=")[0], known, 1)
        at.error(f"unrecognized arguments: {' '.join(rest)}" + (f"; did you mean {near[0]}?" if near else ""))
    return parsed


def subcommands(parser: argparse.ArgumentParser) -> Mapping[str, argparse.ArgumentParser]:
    return next((dict(a.choices) for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})


def tree(parser: argparse.ArgumentParser, *path: str) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command with its path: (), ("run",), ("policy", "check")."""
    yield path, parser
    for name, below in subcommands(parser).items():
        yield from tree(below, *path, name)


def _formatter(prog: str) -> argparse.HelpFormatter:
    columns = min(WIDTH, shutil.get_terminal_size().columns)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=columns)
