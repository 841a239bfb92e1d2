"""A file with a line for each state of a thing: a new state is a new line, and the last whole line counts.

The death of a writer can only tear the last line, which then counts as never written. So such a file always has a state.
"""

from __future__ import annotations


def entry(line: str) -> str:
    """The text to add to the end of the file for a new state. It first ends an incomplete line."""
    return f"\n{line}\n"


def last(data: bytes) -> bytes:
    """The last whole line that is not empty. ValueError if there is none."""
    return data[: data.rindex(b"\n")].rstrip().rpartition(b"\n")[2]
