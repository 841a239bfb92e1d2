"""NVIDIA's own programs: find them below a driver root, and run them with a time limit.

NVIDIA's programs are linked against the libraries of the driver root. If that root is not "/", its library folder cannot
be in LD_LIBRARY_PATH: it often has the node's C library as well, which does not fit our loader. So a folder of ours gets
links to NVIDIA's libraries and programs, and only this folder is named. Each link names a file below the root, because
the root's own links may be made for a process that runs in that root.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from gpuslice.errors import DeviceError, HungError
from gpuslice.system import chroot

# Below the driver root. "usr" comes before its aliases, because "lib64" is often a link to it. The rest are folders of
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
    "usr/local/nvidia/lib64",  # the driver's own folder on virtual machines and images
    "usr/local/nvidia/lib",
    "usr/local/glibc/usr/lib",  # Talos
)
_LIBRARIES = ("libcuda.so*", "libnvidia-*.so*")


def candidates(root: Path, name: str) -> list[tuple[str, Path]]:
    """Files of this program below a driver root, in order: the path of each, and the file behind its links."""
    return [item for folder in PROGRAM_FOLDERS for item in chroot.glob(root, f"{folder}/{name}")]


def find(root: Path, name: str) -> Path:
    """The program below a driver root. DeviceError if there is none."""
    for _, real in candidates(root, name):
        if os.access(real, os.X_OK):
            return real
    text = f"{name} is not in {root} ({', '.join(PROGRAM_FOLDERS)}); install the NVIDIA driver with its programs, "
    text += "or name the folder that it is mounted in as the driver root"
    raise DeviceError(chroot.refusal(root, (f"{folder}/{name}" for folder in PROGRAM_FOLDERS)) or text)


def environment(root: Path, ours: Path) -> dict[str, str]:
    """The variables that a program of this driver root needs besides our own environment.

    `ours` is a folder that gets links to NVIDIA's libraries, and to the programs that NVIDIA's programs start.
    """
    if root == Path("/"):
        return {}
    ours.mkdir(parents=True, exist_ok=True)
    wanted = _wanted(root)
    for link in [path for path in ours.iterdir() if path.is_symlink()]:
        if link.readlink() != wanted.get(link.name):
            link.unlink()
    for name in wanted.keys() - {path.name for path in ours.iterdir()}:
        (ours / name).symlink_to(wanted[name])
    return {"LD_LIBRARY_PATH": str(ours), "PATH": f"{ours}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def _wanted(root: Path) -> dict[str, Path]:
    """Names of NVIDIA's libraries and programs, each with its file. If several folders have a name, the first one counts."""
    patterns = [f"{folder}/{name}" for folder in LIBRARY_FOLDERS for name in _LIBRARIES]
    patterns += [f"{folder}/nvidia-*" for folder in PROGRAM_FOLDERS]
    found: dict[str, Path] = {}
    for place, real in (item for pattern in patterns for item in chroot.glob(root, pattern)):
        found.setdefault(Path(place).name, real)
    return found


def run(
    command: Sequence[str], *, stdin: str = "", timeout_s: float, env: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Exit status and output, errors included. DeviceError if the program cannot start or exceeds its time.

    `env` is added to our own environment. A program that hangs is killed with everything that it started.
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
            asked = f" to {stdin.splitlines()[0]!r}" if stdin else ""
            raise HungError(
                f"{name} did not answer within {timeout_s:g} s{asked} and was killed; look at the kernel log of the "
                "node, and reset the GPU if it hangs"
            ) from e
    return process.returncode, text
