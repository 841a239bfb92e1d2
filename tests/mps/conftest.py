from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.mps_node import MpsNode


@pytest.fixture
def node(short: Path) -> Iterator[MpsNode]:
    """Two simulated H100; no supervisor yet."""
    there = MpsNode(short)
    yield there
    there.close()
