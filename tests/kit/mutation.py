"""Replaces each value of a JSON document, one at a time, by a wrong value."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

MISSING = object()
WRONG: tuple[object, ...] = (
    None,
    True,
    "",
    "x" * 100_000,
    "\ud800",
    "../../etc/passwd",
    -1,
    2**31,
    2**70,
    1.5,
    float("nan"),
    [],
    [[]],
    {},
    {"a": {}},
    MISSING,
)


def values(body: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in the document, including objects and lists."""
    parts = body.items() if isinstance(body, dict) else enumerate(body) if isinstance(body, list) else ()
    for key, value in parts:
        yield (*at, key)
        yield from values(value, (*at, key))


def edited(body: Any, path: tuple[str | int, ...], wrong: object) -> Any:
    """A copy of the document with another value at this path."""
    changed = copy.deepcopy(body)
    place = changed
    for key in path[:-1]:
        place = place[key]
    if wrong is MISSING:
        del place[path[-1]]
    else:
        place[path[-1]] = wrong
    return changed


def edits(body: Any) -> Iterator[tuple[str, str, Any]]:
    """Every edit of one value: the path, the new value, and the document."""
    for path in values(body):
        for wrong in WRONG:
            what = "missing" if wrong is MISSING else repr(wrong)[:20]
            yield ".".join(map(str, path)), what, edited(body, path, wrong)
