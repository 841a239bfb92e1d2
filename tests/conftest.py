"""What every test may ask for."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with a short name: pytest's own leaves little of the 107 bytes of a socket path."""
    folder = Path(tempfile.mkdtemp(prefix="gs-"))
    yield folder
    shutil.rmtree(folder)
