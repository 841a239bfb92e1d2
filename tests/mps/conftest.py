from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.mps_node import Node


@pytest.fixture
def node(short: Path) -> Iterator[Node]:
    """Two simulated H100; no supervisor yet."""
    there = Node(short)
    yield there
    there.close()
