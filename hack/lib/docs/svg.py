"""A sheet to draw on: boxes, texts and arrows in whole pixels. So the same drawing gives the same file, byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

_FONT = "DejaVu Sans, Verdana, Segoe UI, sans-serif"
_INK, _SOFT = "#1f2933", "#52606d"
_LINE = 15  # pixels from one line of a text to the next

Colour = Literal["blue", "green", "yellow", "red", "grey", "white"]
Anchor = Literal["start", "middle", "end"]

_COLOURS: dict[Colour, tuple[str, str]] = {  # fill, border
    "blue": ("#dbe9f9", "#2f6fb3"),
    "green": ("#dff2e1", "#3a8a4a"),
    "yellow": ("#fdf0cf", "#b78a1e"),
    "red": ("#f8dfe0", "#b04a50"),
    "grey": ("#eef0f2", "#9aa5b1"),
    "white": ("#ffffff", "#9aa5b1"),
}

Point = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Box:
    """The place of a box. Arrows begin and end at the middles of its sides."""

    x: int
    y: int
    width: int
    height: int

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height // 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height // 2

    @property
    def top(self) -> Point:
        return self.x + self.width // 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width // 2, self.y + self.height


class Sheet:
    """`title` and `description` are the texts for a screen reader."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img" font-family="{_FONT}">',
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(description)}</desc>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def box(self, box: Box, lines: Sequence[str], colour: Colour, *, note: str = "") -> Box:
        """A box with centred lines, the first one bold. `note` is the last line, in small letters."""
        fill, border = _COLOURS[colour]
        self._parts.append(
            f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="5" '
            f'fill="{fill}" stroke="{border}"/>'
        )
        count = len(lines) + bool(note)
        middle, base = box.top[0], box.left[1] - (count - 1) * _LINE // 2 + 4
        for number, line in enumerate(lines):
            self.text((middle, base + number * _LINE), line, bold=number == 0, anchor="middle")
        if note:
            self.text((middle, base + len(lines) * _LINE), note, anchor="middle", soft=True)
        return box

    def text(
        self, at: Point, text: str, *, bold: bool = False, soft: bool = False, anchor: Anchor = "start", size: int = 0
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self._parts.append(
            f'<text x="{at[0]}" y="{at[1]}" font-size="{size or (10 if soft else 11)}"{weight} text-anchor="{anchor}" '
            f'fill="{_SOFT if soft else _INK}">{escape(text, quote=False)}</text>'
        )

    def texts(self, at: Point, lines: Sequence[str], *, soft: bool = False) -> None:
        for number, line in enumerate(lines):
            self.text((at[0], at[1] + number * _LINE), line, soft=soft)

    def arrow(self, *points: Point, dashed: bool = False, both: bool = False) -> None:
        """A line through these points with a tip at its end. Each part is horizontal or vertical. `both`: a tip at its
        start too."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(f'<polyline points="{path}" fill="none" stroke="{_SOFT}" stroke-width="1.3"{dash}/>')
        self._tip(points[-2], points[-1])
        if both:
            self._tip(points[1], points[0])

    def _tip(self, before: Point, end: Point) -> None:
        """The tip of an arrow, as a triangle, because not every renderer rotates an SVG marker."""
        along = [(e > b) - (e < b) for b, e in zip(before, end, strict=True)]
        x, y = end[0] - 9 * along[0], end[1] - 9 * along[1]
        aside = 4 * along[1], 4 * along[0]
        corners = (end, (x + aside[0], y + aside[1]), (x - aside[0], y - aside[1]))
        path = " ".join(f"{x},{y}" for x, y in corners)
        self._parts.append(f'<polygon points="{path}" fill="{_SOFT}"/>')

    def frame(self, box: Box, title: str, at: int) -> None:
        """A dashed frame around a group. Its title stands at the top and begins at the x `at`."""
        self._parts.append(
            f'<rect x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" rx="8" fill="none" '
            'stroke="#9aa5b1" stroke-dasharray="5 4"/>'
        )
        self.text((at, box.y + 17), title, bold=True, soft=True)

    def svg(self) -> str:
        return "\n".join([*self._parts, "</svg>", ""])
