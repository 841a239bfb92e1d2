"""One record is one line, whatever text from outside is in it."""

from __future__ import annotations

import logging
import re

import pytest
from gpuslice.system import logs

FORGED = "2026-11-29T12:00:00.000 ERROR   op=1 all claims were given away"
OURS = re.compile(r"[\d-]{10}T[\d:]{8}\.\d{3} [A-Z]+ +")  # how a record begins


def written(message: str, *arguments: object, error: BaseException | None = None) -> str:
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    record = logging.LogRecord("gpuslice", logging.INFO, __file__, 1, message, arguments, exc_info)
    return logs.OneLine("{asctime}.{msecs:03.0f} {levelname:<7} {message}", logs.TIME, style="{").format(record)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029", "\x1b[2K\x1b[1A"])
@pytest.mark.parametrize("way", ["argument", "message", "repr"])
def test_text_from_outside_begins_no_line_and_moves_no_cursor(end: str, way: str) -> None:
    text = f"default/one{end}{FORGED}"
    line = {
        "argument": lambda: written("prepare refused claim=%s: %s", text, text),
        "message": lambda: written(text),
        "repr": lambda: written("prepare refused claim=%r", text),
    }[way]()

    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert OURS.match(line)


def test_a_traceback_that_quotes_text_from_outside_forges_no_record() -> None:
    try:
        raise ValueError(f"no such claim: one\n{FORGED}\r{FORGED}\x1b[2K")
    except ValueError as e:
        text = written("prepare failed unexpectedly", error=e)

    first, *rest = text.splitlines()
    assert OURS.match(first)
    assert "ValueError: no such claim: one" in text
    assert rest and all(line.startswith("  | ") and line.isprintable() for line in rest)


def test_a_file_name_that_is_no_text_is_written_all_the_same() -> None:
    name = b"record-\xff.json".decode(errors="surrogateescape")

    line = written("%s cannot be read", name)

    assert line.endswith(r"record-\udcff.json cannot be read")
    assert line.encode()


def test_ordinary_text_stays_as_it_is() -> None:
    assert written("GPU 0 … “größe” 日本 op=%s", "1f").endswith("GPU 0 … “größe” 日本 op=1f")
