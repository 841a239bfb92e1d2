"""The output of the demo: sentences folded to a terminal of 80 columns, and the map of the cards."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 80
_EDGE = 7  # before the map: room for "GPU 15 "


def say(text: str = "", indent: int = 2) -> None:
    """Print one line. A long line continues below, further to the right."""
    print("\n".join(folded(text, indent)))


def folded(text: str, indent: int = 2) -> list[str]:
    edge = " " * indent
    if len(edge + text) <= WIDTH:
        return [(edge + text).rstrip()]
    return textwrap.wrap(text, WIDTH, initial_indent=edge, subsequent_indent=f"{edge}  ", break_on_hyphens=False)


# ---------------------------------------------------------------- the map


@dataclass(frozen=True, slots=True)
class CardRow:
    """One card of the map: `report.memory_map` of it, within 80 columns."""

    index: int
    lines: tuple[str, ...]


def map_lines(cards: Iterable[CardRow]) -> list[str]:
    """Each card with the numbers of its memory slices above. Equal neighbours are shown once."""
    lines = []
    for shown, group in itertools.groupby(sorted(cards, key=lambda card: card.index), key=lambda card: card.lines):
        numbers = [card.index for card in group]
        lines += _card(_name(numbers), *shown)
    return lines


def _name(numbers: Sequence[int]) -> str:
    return f"GPU {numbers[0]}" + (f"-{numbers[-1]}" if len(numbers) > 1 else "")


def _card(name: str, *shown: str) -> list[str]:
    *ruler, cells = shown
    body = cells[cells.index("[") :]
    if not ruler:
        return [f"{name.ljust(_EDGE + 3)}{body}"]
    numbers = ruler[0][len(cells) - len(body) :]
    head = name.ljust(_EDGE) + numbers if len(name) < _EDGE else name + numbers[len(name) - _EDGE :]
    return [head, " " * _EDGE + body]
