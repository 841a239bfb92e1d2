"""The place of NVIDIA's driver on this machine. Standard library only."""

from __future__ import annotations

import subprocess
from pathlib import Path

# Known roots of the driver beside or below the node's own files.
_ROOTS = ("/usr/local/nvidia", "/home/kubernetes/bin/nvidia", "/run/nvidia/driver", "/opt/nvidia")
_LIBRARIES = ("lib64", "lib", "usr/lib64", "usr/lib/x86_64-linux-gnu", "usr/lib")


def find_root() -> Path | None:
    """The folder that has the driver's own files, not links to them. None without a driver."""
    for root in map(Path, _ROOTS):
        if any((root / folder / "libcuda.so.1").exists() for folder in _LIBRARIES):
            return root
    return Path("/") if _known_to_the_loader() else None


def libraries(root: Path) -> list[Path]:
    """Folders for LD_LIBRARY_PATH, for a driver that the dynamic loader does not find by itself."""
    return [root / folder for folder in _LIBRARIES if (root / folder / "libcuda.so.1").exists()]


def _known_to_the_loader() -> bool:
    for program in ("/sbin/ldconfig", "ldconfig"):
        try:
            return "libcuda.so.1" in subprocess.run([program, "-p"], capture_output=True, text=True, check=False).stdout
        except OSError:
            continue
    return False
