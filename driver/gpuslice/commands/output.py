"""In which form a command prints: text that fits a terminal, or a body for programs; colours only where a person looks."""

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
    """Print the text, or for json and yaml the body."""
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
    """What a person should know beside the output, which stays as it is for programs."""
    sys.stdout.flush()
    for sentence in sentences:
        print(f"gpuslice: warning: {sentence}", file=sys.stderr)


def for_a_person() -> bool:
    """Whether colours are of use: a terminal, and nobody who said that they are not (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def coloured(text: str) -> str:
    for pattern, colour in _COLOURS:
        text = pattern.sub(lambda match, colour=colour: f"{colour}{match[0]}{_PLAIN}", text)  # type: ignore[misc]
    return text
