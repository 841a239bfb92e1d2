"""Sentences that a page quotes from the driver are sentences that the driver says."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.kit.commands import OURS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / f"{name}.md" for name in ("install", "troubleshooting", "upgrade")]


# Quoted from others: 0.1.0, and a command of Docker.
NOT_OURS = ("… does not describe a simulated GPU …; remove its folder to start anew", "docker build …", "docker push …")


@cache
def templates() -> tuple[str, ...]:
    """Every text in the driver's code, with … for what is put in."""
    found = set()
    for path in (ROOT / "driver/gpuslice").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.add("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value.replace("%s", "…"))
    return tuple(found)


def said(quoted: str) -> bool:
    """Whether one text has all parts of the quotation, in their order."""
    pattern = ".*".join(re.escape(part.strip()) for part in quoted.split("…") if part.strip())
    return any(re.search(pattern, text, re.DOTALL) for text in templates())


def quotations() -> list[str]:
    """What stands in backquotes and has spaces and … in it: a sentence with a gap."""
    spans = {span for page in PAGES for span in re.findall(r"`([^`\n]*…[^`\n]*)`", page.read_text(encoding="utf-8"))}
    return sorted(text for text in spans if " " in text.strip("… ") and not OURS.match(text) and text not in NOT_OURS)


@pytest.mark.parametrize("quoted", quotations())
def test_a_quoted_sentence_is_in_the_code(quoted: str) -> None:
    assert said(quoted), f"the driver does not say this any more: {quoted}"


def test_a_sentence_that_nobody_says_is_found_out() -> None:
    assert len(quotations()) > 5
    assert not said("the devices of claim … are gone with …")
