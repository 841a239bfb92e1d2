"""Scripts that complete `gpuslice` in a shell. They are made from the parsers, so they have each command and flag."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from gpuslice.commands.parser import subcommands, tree
from gpuslice.config import CHOICES

SHELLS = ("bash", "zsh", "fish")

_BASH = """\
_gpuslice() {
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" i
  for ((i = 1; i < COMP_CWORD; i++)); do
    case "$command ${COMP_WORDS[i]}" in
@COMMANDS@
    esac
  done
  case "$before" in
@VALUES@
  esac
  case "$command" in
@WORDS@
  esac
}
complete -F _gpuslice gpuslice
"""


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    if shell == "fish":
        return "\n".join(_fish(parser)) + "\n"
    bash = _bash(parser)
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def values(action: argparse.Action) -> Sequence[str]:
    """The possible values of a flag or an argument, if there is a fixed set of them."""
    return [str(choice) for choice in action.choices or CHOICES.get(action.dest, ())]


def _bash(parser: argparse.ArgumentParser) -> str:
    commands, words = [], []
    flags: dict[str, str] = {}
    for path, at in tree(parser):
        if path:
            commands.append(f'      "{" ".join(path[:-1])} {path[-1]}") command="{" ".join(path)}" ;;')
        offered = [*subcommands(at), *(value for action in _arguments(at) for value in values(action))]
        offered += [option for action in at._actions for option in action.option_strings]
        files = "-f " if any(action.metavar == "FILE" for action in _arguments(at)) else ""
        words.append(f'    "{" ".join(path)}") COMPREPLY=($(compgen {files}-W "{" ".join(offered)}" -- "$word")) ;;')
        for action in _flags(at):
            flags["|".join(action.option_strings)] = _compgen(action)
    shown = [f'    {names}) COMPREPLY=($(compgen {how} -- "$word")); return ;;' for names, how in flags.items()]
    return (
        _BASH.replace("@COMMANDS@", "\n".join(commands))
        .replace("@VALUES@", "\n".join(shown))
        .replace("@WORDS@", "\n".join(words))
    )


def _compgen(action: argparse.Action) -> str:
    kinds = {"FILE": "-f", "FOLDER": "-d"}
    return kinds.get(str(action.metavar), f'-W "{" ".join(values(action))}"')


def _fish(parser: argparse.ArgumentParser) -> Iterator[str]:
    import shlex

    yield "complete -c gpuslice -f"
    for path, at in tree(parser):
        seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path) or "__fish_use_subcommand"
        for name in subcommands(at):
            yield f"complete -c gpuslice -n {shlex.quote(seen)} -a {name}"
        for action in _arguments(at):
            if values(action):
                yield f"complete -c gpuslice -n {shlex.quote(seen)} -a {shlex.quote(' '.join(values(action)))}"
        for action in _flags(at):
            names = " ".join(f"-l {o[2:]}" if o.startswith("--") else f"-s {o[1:]}" for o in action.option_strings)
            value = f" -a {shlex.quote(' '.join(values(action)))}" if values(action) else ""
            files = "-r -F" if action.metavar in ("FILE", "FOLDER") else "-x"  # -x: a value, and no file
            yield f"complete -c gpuslice -n {shlex.quote(seen)} {names} {files}{value}"


def _arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The arguments without a flag, except the commands."""
    return [a for a in parser._actions if not a.option_strings and not isinstance(a, argparse._SubParsersAction)]


def _flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags that take a value."""
    return [action for action in parser._actions if action.option_strings and action.nargs != 0]
