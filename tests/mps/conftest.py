from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.mps_node import MpsNode, a_node


@pytest.fixture
def node(short: Path) -> Iterator[MpsNode]:
    with a_node(short) as node:
        yield node
