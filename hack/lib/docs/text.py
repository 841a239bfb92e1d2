"""Markdown: tables, and the generated parts of a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from hack.lib.docs.errors import DocsError

_PLACE = re.compile(r"(<!-- hack/docs: ([\w-]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)
_T = TypeVar("_T")


def filled(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The page with new text in each of its generated parts."""

    def write(place: re.Match[str]) -> str:
        if place[2] not in tables:
            raise DocsError(f"there is no table {place[2]!r}; known tables: {', '.join(sorted(tables))}")
        return f"{place[1]}\n{tables[place[2]]()}\n{place[3]}"

    return _PLACE.sub(write, page)


def places(page: str) -> list[str]:
    """The names of the generated parts of a page, in order."""
    return [place[2] for place in _PLACE.finditer(page)]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in (head, *rows)]
    return "".join((lines[0], f"{'|---' * len(head)}|\n", *lines[1:]))


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def codes(texts: Iterable[str]) -> str:
    return ", ".join(map(code, texts))


def paired(what: str, found: Iterable[str], said: Mapping[str, _T]) -> list[tuple[str, _T]]:
    """Each name of the code with its sentence. DocsError if the two sides do not have the same names."""
    names = list(dict.fromkeys(found))
    if missing := sorted(set(names) - set(said)):
        raise DocsError(f"{what} without a sentence in hack/lib/docs: {', '.join(missing)}; add it")
    if gone := sorted(set(said) - set(names)):
        raise DocsError(f"{what} that the code does not have (any more): {', '.join(gone)}; remove the sentence")
    return [(name, said[name]) for name in names]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
