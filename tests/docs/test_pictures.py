"""The pictures of README and docs are what their script draws, and name modules that are there."""

import re
from pathlib import Path

import pytest

from hack.lib.docs import pictures

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_its_script_draws(name: str) -> None:
    stored = (pictures.FOLDER / name).read_bytes()

    assert stored == pictures.PICTURES[name]().encode(), "draw it again: hack/pictures"


def test_every_stored_picture_has_its_script() -> None:
    assert {path.name for path in pictures.FOLDER.iterdir()} == set(pictures.PICTURES)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_names_modules_that_are_there(name: str) -> None:
    named = set(re.findall(r">([a-z_/]+(?:\.py|/))<", pictures.PICTURES[name]()))

    assert [module for module in sorted(named) if not (ROOT / "driver/gpuslice" / module).exists()] == []


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_used(name: str) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]

    assert any(f"img/{name}" in page.read_text(encoding="utf-8") for page in pages)
