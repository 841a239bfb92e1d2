"""NVIDIA's own programs, from wherever the driver is installed: found, run with a time limit, answered for in one sentence.

They are linked against the libraries of the driver root. Where that is not "/", its library folder cannot simply go into
LD_LIBRARY_PATH: it often holds the node's C library as well, which does not fit our loader. So NVIDIA's libraries are
linked into a folder of ours, and only that is named.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpuslice.errors import DeviceError, HungError

# Below the driver root. "usr" before its aliases, for "lib64" is often a link to it; the rest are driver folders of
# Debian's own packages, and of container-optimised systems that keep the driver in a folder without "usr".
PROGRAM_FOLDERS = (
    "usr/bin",
    "usr/sbin",
    "usr/lib/nvidia/current",
    "usr/local/bin",
    "bin",
    "sbin",
    "usr/local/nvidia/bin",
)
_ARCHES = ("x86_64-linux-gnu", "aarch64-linux-gnu")
LIBRARY_FOLDERS = (
    *(f"usr/lib/{arch}{tail}" for arch in _ARCHES for tail in ("", "/nvidia/current")),
    "usr/lib64",
    "usr/lib",
    *(f"lib/{arch}" for arch in _ARCHES),
    "lib64",
    "lib",
    "usr/local/nvidia/lib64",  # where virtual machines and images keep the driver apart
    "usr/local/nvidia/lib",
    "usr/local/glibc/usr/lib",  # Talos
)
_OURS = ("libcuda.so*", "libnvidia-*.so*")


def find(root: Path, name: str) -> Path:
    """The program below a driver root; DeviceError where there is none."""
    for folder in PROGRAM_FOLDERS:
        if os.access(path := root / folder / name, os.X_OK) and path.is_file():
            return path
    raise DeviceError(
        f"{name} is not in {root} ({', '.join(PROGRAM_FOLDERS)}); install the NVIDIA driver with its programs, "
        f"or name the folder that it is mounted in as the driver root"
    )


def environment(root: Path, links: Path) -> dict[str, str]:
    """What a program of this driver root needs besides our own environment; `links` is a folder to be filled."""
    if root == Path("/"):
        return {}
    links.mkdir(parents=True, exist_ok=True)
    for folder in reversed(LIBRARY_FOLDERS):  # the first folder wins
        for path in (path for pattern in _OURS for path in (root / folder).glob(pattern)):
            link = links / path.name
            if not (link.is_symlink() and link.readlink() == path):
                link.unlink(missing_ok=True)
                link.symlink_to(path)
    folders = os.pathsep.join(str(root / folder) for folder in PROGRAM_FOLDERS)
    return {"LD_LIBRARY_PATH": str(links), "PATH": f"{folders}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def run(
    command: Sequence[str], *, stdin: str = "", timeout_s: float, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and what it printed, errors included. DeviceError where it cannot start or runs out of time.

    `env` is added to our own environment. A program that hangs is killed with all that it started.
    """
    name = Path(command[0]).name
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as e:
        raise DeviceError(
            f"cannot run {shlex.join(command)}: {e.strerror}; check the driver root and the rights of that file"
        ) from e
    with process:
        try:
            text, _ = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as e:
            os.killpg(process.pid, 9)
            asked = f" when told {stdin.splitlines()[0]!r}" if stdin else ""
            raise HungError(
                f"{name} did not answer within {timeout_s:g} s{asked} and was killed; look at the GPU"
            ) from e
    return process.returncode, text
