"""Tests on a real GPU. They read its settings and change none; MPS daemons of theirs have folders of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import Nvml
from gpuslice.nvml.real import RealNvml


def driver_root() -> Path:
    """Of the NVIDIA driver on this machine, by the variable that the driver itself knows."""
    return Path(os.environ.get("DRIVER_ROOT_CTR_PATH", "/"))


@pytest.fixture
def real() -> Iterator[Nvml]:
    try:
        nvml = RealNvml(driver_root() if driver_root() != Path("/") else None)
    except DeviceError as e:
        pytest.skip(f"no real GPU: {e}")
    if not nvml.gpus():
        pytest.skip(f"no real GPU can be read: {'; '.join(nvml.lost()) or 'NVML lists none'}")
    yield nvml
    nvml.close()
