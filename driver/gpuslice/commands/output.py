"""The forms of a command's output: text for a terminal, or a body for programs. Colours only on a terminal."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

WIDE = "wide"
FORMATS = ("json", "yaml", WIDE)

_BOLD, _RED, _YELLOW, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
_COLOURS = (
    (re.compile(r"^(GPU \d+|CLAIM\b.*)", re.MULTILINE), _BOLD),
    (re.compile(r"unavailable now:|unreadable now"), _RED),
    (re.compile(r"\(foreign\)|\(?\bincomplete\b\)?", re.MULTILINE), _YELLOW),
)


def add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", choices=FORMATS, help=f"the form of the output: {', '.join(FORMATS)}")


def show(form: str | None, text: str, body: Mapping[str, Any]) -> None:
    """Print the text; for json and yaml, print the body."""
    match form:
        case "json":
            import json

            print(json.dumps(body, indent=2))
        case "yaml":
            import yaml

            print(yaml.safe_dump(dict(body), sort_keys=False), end="")
        case _:
            print(coloured(text) if for_a_person() else text)


def warn(sentences: Iterable[str]) -> None:
    """Print warnings beside the output. The output for programs does not change."""
    sys.stdout.flush()
    for sentence in sentences:
        print(f"gpuslice: warning: {sentence}", file=sys.stderr)


def for_a_person() -> bool:
    """Whether to use colours: standard output is a terminal, and the user has not disabled them (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str) -> str:
    for pattern, colour in _COLOURS:
        text = pattern.sub(lambda match, colour=colour: f"{colour}{match[0]}{_PLAIN}", text)  # type: ignore[misc]
    return text
