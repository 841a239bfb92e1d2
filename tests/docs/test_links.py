"""No link of the pages is dead, and a reader who begins at README finds every page."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import markdown
from tests.kit.markdown import PAGES, ROOT

README = ROOT / "README.md"
CLICKS = 2


def targets(page: Path) -> Iterator[tuple[int, Path, str]]:
    """(line, path, anchor) of every link into the tree."""
    for number, target in markdown.links(page):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield number, (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=markdown.name)
def test_no_link_of_a_page_is_dead(page: Path) -> None:
    dead = [
        f"line {number}: {path.relative_to(ROOT)}{anchor and '#'}{anchor}"
        for number, path, anchor in targets(page)
        if not path.exists() or (anchor and anchor not in markdown.anchors(path))
    ]

    assert dead == []


def test_every_page_of_docs_is_two_clicks_from_readme() -> None:
    reached = {README}
    for _ in range(CLICKS):
        reached |= {page(path) for here in reached for _, path, _ in targets(here) if page(path) in PAGES}

    assert [markdown.name(path) for path in PAGES if path.is_relative_to(ROOT / "docs") and path not in reached] == []


def page(path: Path) -> Path:
    """A folder shows its README."""
    return path / "README.md" if path.is_dir() else path


def test_links_and_anchors_are_found(tmp_path: Path) -> None:
    """The two tests above are worth what this reader is worth."""
    here = tmp_path / "page.md"
    here.write_text(
        "# A `b`, c!\n\n# A b c\n\n[one](x.md#y) and [a [b] c](z) ![p](q.svg) `[no](no)`\n\n    [no](no)\n\n"
        '```\n[no](no)\n```\n<img src="r.svg">\n',
        encoding="utf-8",
    )

    assert [target for _, target in markdown.links(here)] == ["x.md#y", "z", "q.svg", "r.svg"]
    assert markdown.anchors(here) == {"a-b-c", "a-b-c-1"}
