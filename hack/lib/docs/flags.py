"""Commands, flags, environment variables and exit codes, as the command's own parser has them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from gpuslice import cli

from hack.lib.docs.text import code, table

_HELP = re.compile(r"(?P<meaning>.*?)(?: \(env (?P<env>\w+)(?:; default (?P<default>.*))?\))?", re.DOTALL)


def commands() -> dict[str, argparse.ArgumentParser]:
    """Every command that does something: `run`, `playground up`."""
    return dict(_commands(cli.parser(), ""))


def _commands(parser: argparse.ArgumentParser, before: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not inner:
        yield before.strip(), parser
    for action in inner:
        for name, made in action.choices.items():
            yield from _commands(made, f"{before} {name}")


def flags() -> str:
    """Each flag once, with the commands that have it."""
    of: dict[str, list[str]] = {}
    cells: dict[str, list[str]] = {}
    for command, action in _options():
        (flag,) = action.option_strings
        of.setdefault(flag, []).append(command)
        cells.setdefault(flag, _cells(action))
    rows = ([code(flag), *cells[flag], ", ".join(of[flag])] for flag in of)
    return table(["flag", "environment", "default", "meaning", "command"], rows)


def synopsis() -> str:
    (action,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    return table(["command", ""], ([code(f"gpuslice {a.dest}"), a.help or ""] for a in action._choices_actions))


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
