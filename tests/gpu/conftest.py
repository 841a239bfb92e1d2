"""Tests on a real GPU. They read its settings and change none; MPS daemons of theirs have folders of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import Nvml
from gpuslice.nvml.real import RealNvml


@pytest.fixture
def real() -> Iterator[Nvml]:
    try:
        nvml = RealNvml()
    except DeviceError as e:
        pytest.skip(f"no real GPU: {e}")
    if not nvml.gpus():
        pytest.skip(f"no real GPU can be read: {'; '.join(nvml.lost()) or 'NVML lists none'}")
    yield nvml
    nvml.close()
