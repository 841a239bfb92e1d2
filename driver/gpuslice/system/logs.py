"""The log of a process of this project: on standard error, one line per record.

Claim names, API messages, paths of HTTP requests and names of files are text from outside. A newline in one of them must
not begin a line that looks like ours, and an escape sequence must not reach a terminal. So this module escapes all text, and
no caller has to do it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

TIME = "%Y-%m-%dT%H:%M:%S"
_TRACE = "  | "  # before each line of a traceback, because a traceback may quote text from outside


class OneLine(logging.Formatter):
    """The message on one line. A traceback follows on lines that look different from records."""

    def format(self, record: logging.LogRecord) -> str:
        line, *_ = super().format(record).split("\n", 1)
        if not record.exc_text:
            return line
        return "\n".join([line, *(f"{_TRACE}{printable(part)}" for part in record.exc_text.split("\n"))])

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the library's name
        record.message = printable(record.message)
        return super().formatMessage(record)


def setup(level: str, fields: str = "", filter_: Callable[[logging.LogRecord], bool] | None = None) -> None:
    """Log to standard error at `level` ("debug" … "error"). `fields` come before the message, and `filter_` sets them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("{asctime}.{msecs:03.0f} {levelname:<7} " + fields + "{message}", TIME, style="{"))
    if filter_ is not None:
        handler.addFilter(filter_)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def printable(text: str) -> str:
    """The text with escapes for everything that moves the cursor, ends the line or cannot be encoded."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
