"""Every command on the pages for operators is run by a test, or the page itself names it and says why not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.kit import markdown, pages
from tests.kit.markdown import ROOT

FOUND = [(page, place, command) for page in pages.PAGES for place, command in pages.found(page)]


def known(command: str, page: Path) -> bool:
    """A sentence may name a command by its beginning: `kubectl describe`."""
    table = [*pages.RUN, *pages.not_run(page)]
    return any(pages.fits(pattern, command) or pattern.startswith(f"{command} ") for pattern in table)


@pytest.mark.parametrize(("page", "place", "command"), FOUND, ids=[f"{place}-{command}" for _, place, command in FOUND])
def test_a_command_is_run_by_a_test_or_the_page_says_why_not(page: Path, place: str, command: str) -> None:
    assert known(command, page), f"{place}: put it into tests/kit/pages.py, or into the table of the page"


@pytest.mark.parametrize("page", pages.PAGES, ids=markdown.name)
def test_what_a_page_names_as_not_run_is_on_it_and_not_run(page: Path) -> None:
    mine = [command for other, _, command in FOUND if other == page]

    for pattern, why in pages.not_run(page).items():
        assert any(pages.fits(pattern, command) for command in mine), f"{pattern} is not on the page"
        assert why.strip()
        assert not any(pages.fits(pattern, command) for command in pages.RUN), f"a test runs {pattern}"


def test_what_a_test_runs_is_on_a_page_and_the_test_is_there() -> None:
    commands = {command for _, _, command in FOUND}
    for command, test in pages.RUN.items():
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert command in commands, f"no page has {command}"
        assert name in {
            node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }, test


def test_a_command_that_nobody_runs_is_found() -> None:
    page = ROOT / "docs/troubleshooting.md"

    assert known("kubectl describe", page)
    assert known("kubectl get pod POD", page)
    assert not known("kubectl get pod OTHER", page)
    assert not known("kubectl delete pod POD --force", page)
