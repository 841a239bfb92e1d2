"""A driver root with a libnvidia-ml.so.1 of our own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def driver_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no gcc here, which builds the stand-in for libnvidia-ml.so.1")
    root = tmp_path_factory.mktemp("driver-root")
    (root / "usr/lib64").mkdir(parents=True)
    library = root / "usr/lib64/libnvidia-ml.so.1"
    flags = ["-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["gcc", *flags, "-o", library, Path(__file__).parent / "stub/nvml.c"], check=True)
    return root
