"""Commands, flags, environment variables and exit codes, read from the command's own parser."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from gpuslice import cli
from gpuslice.commands.parser import subcommands, tree

from hack.lib.docs.text import code, table

_HELP = re.compile(r"(?P<meaning>.*?)(?: \(env (?P<env>\w+)(?:; default (?P<default>.*))?\))?", re.DOTALL)


def commands() -> dict[str, argparse.ArgumentParser]:
    """The commands without subcommands, each with its parser. "policy check" is one of them."""
    return {" ".join(path): at for path, at in tree(cli.parser()) if path and not subcommands(at)}


def flags() -> str:
    """Each flag once, with its commands."""
    of: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    for command, action in _options():
        flag = action.option_strings[-1]
        of.setdefault(flag, []).append(command)
        cells.setdefault(flag, _cells(action))
    rows = ([code(flag), *cells[flag], ", ".join(of[flag])] for flag in of)
    return table(["flag", "environment", "default", "meaning", "command"], rows)


def synopsis() -> str:
    lines = ((" ".join((*path, a.dest)), a.help or "") for path, at in tree(cli.parser()) for a in _choices(at))
    return table(["command", ""], ([code(f"gpuslice {name}"), text] for name, text in lines if name in commands()))


def _choices(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [c for a in parser._actions if isinstance(a, argparse._SubParsersAction) for c in a._choices_actions]


def exit_codes() -> str:
    return table(["exit code", "meaning"], ([code(str(number)), text] for number, text in documented().items()))


def documented() -> dict[int, str]:
    """The exit codes that `gpuslice --help` names."""
    lines = cli.EXIT_CODES.splitlines()[1:]
    return {int(number): text for number, text in (line.split(maxsplit=1) for line in lines)}


def _options() -> Iterator[tuple[str, argparse.Action]]:
    for name, parser in commands().items():
        for action in parser._actions:
            if action.option_strings and not isinstance(action, argparse._HelpAction):
                yield name, action


def _cells(action: argparse.Action) -> list[str]:
    match = _HELP.fullmatch(action.help or "")
    assert match is not None
    default = match["default"] or (str(action.default) if action.default else "")
    meaning = match["meaning"].removesuffix(f"; default {default}").replace("<", "&lt;")
    return [code(match["env"] or ""), code(default), meaning]
