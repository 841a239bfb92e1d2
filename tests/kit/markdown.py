"""The parts of Markdown that our pages use: blocks of code, spans of code, links, anchors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = tuple(sorted((*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))))

_SPAN = re.compile(r"`+[^`\n]*`+")
_LINK = re.compile(r"\[[^\]\[]*(?:\[[^\]]*\][^\]\[]*)*\]\((?P<target>[^)\s]+)\)|(?:src|href)=\"(?P<html>[^\"]+)\"")
_HEADING = re.compile(r"#{1,6} +(.*?) *#*")
_NAMED = re.compile(r"<a (?:id|name)=\"([^\"]+)\"")


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """A block of code. `language` is "" if the block is indented or names no language."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True, slots=True)
class PageLine:
    number: int
    text: str
    fence: str | None  # the language of the fenced block around it
    indented: bool = False  # a line of an indented block


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def lines(page: Path) -> Iterator[PageLine]:
    """The lines of a page without the fences. An indented block begins after an empty line."""
    fence: str | None = None
    may_begin, indented = True, False
    for number, text in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if text.lstrip().startswith("```"):
            fence = text.strip("` \t") if fence is None else None
            may_begin, indented = True, False
            continue
        if text.strip():
            indented = fence is None and text.startswith("    ") and (indented or may_begin)
        yield PageLine(number, text, fence, indented)
        may_begin = not text.strip()


def blocks(page: Path) -> Iterator[CodeBlock]:
    """The blocks of code of a page, in order."""
    kept: list[PageLine] = []
    for line in lines(page):
        inside = line.fence is not None or line.indented
        if kept and not (inside and line.fence == kept[-1].fence and line.number == kept[-1].number + 1):
            yield _block(page, kept)
            kept = []
        if inside:
            kept.append(line)
    if kept:
        yield _block(page, kept)


def _block(page: Path, kept: list[PageLine]) -> CodeBlock:
    return CodeBlock(name(page), kept[0].number, kept[0].fence or "", _dedented([line.text for line in kept]))


def _dedented(kept: list[str]) -> str:
    while kept and not kept[-1].strip():
        kept.pop()
    indent = min((len(text) - len(text.lstrip()) for text in kept if text.strip()), default=0)
    return "".join(f"{text[indent:]}\n" for text in kept)


def prose(page: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines outside of code."""
    yield from ((line.number, line.text) for line in lines(page) if line.fence is None and not line.indented)


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """(number of the line, text) of every span of code."""
    for number, text in prose(page):
        yield from ((number, span.strip("`")) for span in _SPAN.findall(text))


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(number of the line, target) of every link and picture."""
    for number, text in prose(page):
        for link in _LINK.finditer(_SPAN.sub("code", text)):
            yield number, link["target"] or link["html"]


def anchors(page: Path) -> set[str]:
    """The anchors of this page for links with `#`, as GitHub makes them from the headings."""
    found: set[str] = set()
    for _, text in prose(page):
        found |= set(_NAMED.findall(text))
        if heading := _HEADING.fullmatch(text):
            slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()).replace(
                " ", "-"
            )
            found.add(next(s for s in (slug, *(f"{slug}-{n}" for n in range(1, 100))) if s not in found))
    return found
