"""The packed folder: its contents, whether it is complete and fits this machine, and how it is unpacked.

Standard library only: this runs where nothing of ours is installed yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import tarfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hack.lib.gpu.errors import GpuError

FORMAT = 1
ABOUT = "pack.json"
SITE = "site"  # Python packages, for all Pythons of the pack
PROGRAMS = "programs"  # Kubernetes, containerd and what they need; missing in a pack with --facts
_SHARED_LIBRARIES = "lib"
TREE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """`pack.json`: written last, so that a folder without it is incomplete."""

    revision: str  # of the source, from `git describe`
    machine: str  # from `uname -m`
    pythons: list[str]  # "3.12"
    archives: dict[str, str]  # file name: SHA-256
    contents: dict[str, str]  # file name: one SHA-256 of its contents, independent of the compression
    kubernetes: str = ""  # version; "" in a pack with --facts
    sizes: dict[str, int] = field(default_factory=dict)  # bytes of each part before packing
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        (folder / ABOUT).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> About:
    """GpuError if the folder is not a pack, is incomplete, or was made for another machine or another Python."""
    again = "make it again with hack/gpu pack"
    try:
        about = About(**json.loads((folder / ABOUT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise GpuError(
            f"{folder} has no {ABOUT}, so it is not a packed folder, or an incomplete one; {again}"
        ) from None
    except (ValueError, TypeError) as e:
        raise GpuError(f"{folder / ABOUT} cannot be read ({e}); {again}") from e
    if about.format != FORMAT:
        raise GpuError(f"{folder} has format {about.format}, and this tree reads format {FORMAT}; {again}")
    if about.machine != platform.machine():
        raise GpuError(
            f"{folder} was packed for {about.machine}, and this machine is {platform.machine()}; {again} there"
        )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here not in about.pythons:
        raise GpuError(
            f"{folder} was packed for Python {', '.join(about.pythons)}, and this is Python {here}; run it by one of "
            f"those (PYTHON=python3.x hack/gpu run), or pack with --python {here}"
        )
    for name in about.archives:
        if not (folder / name).is_file():
            raise GpuError(f"{folder} lacks {name}, so it is incomplete; {again}")
    return about


def archive(folder: Path, about: About, part: str) -> Path | None:
    """The archive of a part, with a checked sum. None if this pack has no such part. GpuError if the archive is damaged."""
    name = next((name for name in about.archives if name.partition(".")[0] == part), None)
    if name is None:
        return None
    found = digest(folder / name)
    if found != about.archives[name]:
        raise GpuError(f"{folder / name} is damaged: its SHA-256 is not that of {ABOUT}; copy the folder again")
    return folder / name


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(source) as tar:
        # It is our own archive with a checked sum. `filter=` is newer than Python 3.11.2 (Debian 12), so this is an
        # attribute.
        tar.extraction_filter = lambda member, _: member
        tar.extractall(target)


def lay_out_programs(programs: Path) -> None:
    """Fill `bin/` for PATH. A program with its own libraries gets a starter script that finds them."""
    for program in sorted((programs / "own-libraries").glob("*")):
        starter = programs / "bin" / program.name
        libraries = programs / _SHARED_LIBRARIES
        starter.write_text(f'#!/bin/sh\nLD_LIBRARY_PATH={libraries} exec {program} "$@"\n', encoding="utf-8")
        starter.chmod(0o755)


def environment(site: Path, programs: Path | None) -> dict[str, str]:
    """The environment of a stage: our packages, and the packed programs before those of the machine."""
    path = os.environ.get("PATH", os.defpath)
    mine = {"PYTHONPATH": f"{site}:{TREE}", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    if programs is None:
        return {**os.environ, **mine}
    return {**os.environ, **mine, "PATH": f"{programs / 'bin'}:{path}", "XDG_CACHE_HOME": str(programs / "cache")}
