"""The Python packages of a pack: our package and its dependencies, for several Pythons in one folder.

Packages for several Pythons differ only in their compiled modules. The name of such a module contains the Python
("…cpython-312-x86_64-linux-gnu.so"), so all modules can be in the same folder.
"""

from __future__ import annotations

import platform
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

from hack.lib.gpu.errors import GpuError
from hack.lib.unused import unused

REPOSITORY = Path(__file__).resolve().parents[3]
TESTS = ("pytest", "pytest-asyncio", "pytest-timeout")  # the NVML contract is a test suite


def collect(target: Path, downloads: Path, pythons: Sequence[str]) -> None:
    """Put our package and its dependencies below `target`. GpuError if the package index refuses."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = downloads / "ours"
    _pip("wheel", "--quiet", "--no-deps", "--wheel-dir", str(ours), str(REPOSITORY))
    for python in pythons:
        folder = downloads / python
        _pip(
            *("download", "--quiet", "--dest", str(folder), "--python-version", python, "--only-binary", ":all:"),
            *(word for tag in _platforms() for word in ("--platform", tag)),
            *(*project["dependencies"], *TESTS),
        )
    for wheel in sorted(downloads.glob("*/*.whl")):
        _unzip(wheel, target)
    if not (target / "gpuslice").is_dir():
        raise GpuError(
            f"pip made no wheel of this project in {ours}; check that pip can build this project (pip wheel .)"
        )


def _platforms() -> tuple[str, ...]:
    machine = platform.machine()
    return tuple(f"{tag}_{machine}" for tag in ("manylinux2014", "manylinux_2_17", "manylinux_2_28"))


def _pip(command: str, *arguments: str) -> None:
    whole = [sys.executable, "-m", "pip", "--disable-pip-version-check", command, *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise GpuError(f"pip {command} failed: {last}; check that the package index can be reached")


def _unzip(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not unused(name):
                archive.extract(name, target)
