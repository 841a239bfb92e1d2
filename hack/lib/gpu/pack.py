"""`hack/gpu pack`: make one folder to copy to a machine without a network."""

from __future__ import annotations

import hashlib
import json
import lzma
import platform
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hack.lib.gpu import bundle, programs, wheels
from hack.lib.gpu.bundle import PROGRAMS, SITE, About
from hack.lib.gpu.errors import GpuError

PYTHONS = ("3.11", "3.12", "3.13")
LIMIT_MIB = 60  # 64 MiB with the work tree
_MIB = 1 << 20
# One solid block, because Kubernetes' programs contain the same libraries. The dictionary is large enough to reach them.
_FILTERS = [
    {"id": lzma.FILTER_X86},
    {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 256 * _MIB},
]
_OTHER_FILTERS = _FILTERS[1:]  # the first one is for x86 code

Say = Callable[[str], None]


def pack(folder: Path, *, facts: bool, compressed: bool, pythons: Sequence[str], version: str, say: Say) -> About:
    """Make the folder again. GpuError if a part cannot be made; then the folder has no `pack.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    before = _before(folder)
    with tempfile.TemporaryDirectory(prefix=".packing-", dir=folder) as work:
        parts = {SITE: Path(work, SITE)}
        say(f"packing Python packages for Python {', '.join(pythons)}")
        wheels.collect(parts[SITE], Path(work, "downloads"), pythons)
        if not facts:
            say("packing programs")
            parts[PROGRAMS] = Path(work, PROGRAMS)
            programs.collect(parts[PROGRAMS], version)
        contents = {_name(part, compressed): _content(source) for part, source in parts.items()}
        sizes = {part: _size(source) for part, source in parts.items()}
        new = [part for part in parts if before.get(_name(part, compressed)) != contents[_name(part, compressed)]]
        for path in folder.glob("*.tar*"):
            if path.name not in contents or path.name in [_name(part, compressed) for part in new]:
                path.unlink()
            else:
                say(f"{path.name} is up to date")
        with ThreadPoolExecutor(len(parts)) as threads:
            list(threads.map(lambda part: _write(parts[part], folder / _name(part, compressed), say), new))
    about = About(
        revision=_revision(),
        machine=platform.machine(),
        pythons=list(pythons),
        archives={name: bundle.digest(folder / name) for name in contents},
        contents=contents,
        kubernetes="" if facts else version,
        sizes=sizes,
    )
    about.write(folder)
    _check_size(folder, compressed)
    return about


def _before(folder: Path) -> Mapping[str, str]:
    """The contents of an older pack, by archive. Its `pack.json` is removed first. Empty if the older pack is incomplete."""
    try:
        about = About(**json.loads((folder / bundle.ABOUT).read_text(encoding="utf-8")))
        whole = all(bundle.digest(folder / name) == digest for name, digest in about.archives.items())
    except (OSError, ValueError, TypeError):
        return {}
    (folder / bundle.ABOUT).unlink()
    return about.contents if whole else {}


def _name(part: str, compressed: bool) -> str:
    return f"{part}.tar{'.xz' if compressed else ''}"


def _content(source: Path) -> str:
    """One digest of all names and contents below a folder."""
    whole = hashlib.sha256()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        whole.update(f"{path.relative_to(source)} {path.stat().st_mode:o} {bundle.digest(path)}\n".encode())
    return whole.hexdigest()


def _write(source: Path, path: Path, say: Say) -> None:
    begun = time.monotonic()
    if path.suffix == ".xz":
        filters = _FILTERS if platform.machine() == "x86_64" else _OTHER_FILTERS
        with lzma.open(path, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            _fill(tar, source)
    else:
        with tarfile.open(path, "w") as tar:
            _fill(tar, source)
    size = path.stat().st_size / _MIB
    say(f"{path.name}: {_size(source) / _MIB:.0f} MiB packed into {size:.1f} MiB, {time.monotonic() - begun:.0f} s")


def _fill(tar: tarfile.TarFile, source: Path) -> None:
    for path in _in_order(source):
        tar.add(path, path.relative_to(source), recursive=False)


def _in_order(source: Path) -> Iterator[Path]:
    """Folders first, then files by kind and by name, so that similar files are side by side."""
    paths = sorted(source.rglob("*"))
    yield from (path for path in paths if path.is_dir())
    yield from sorted((path for path in paths if not path.is_dir()), key=lambda path: (path.suffix, path.name))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _check_size(folder: Path, compressed: bool) -> None:
    size = _size(folder) / _MIB
    if compressed and size > LIMIT_MIB:
        raise GpuError(
            f"{folder} has {size:.1f} MiB, more than the limit of {LIMIT_MIB} MiB; pack for one release of Python only "
            "(--python 3.12)"
        )


def _revision() -> str:
    git = shutil.which("git")
    command = [str(git), "-C", str(wheels.REPOSITORY), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if git else None
    return done.stdout.strip() if done and done.returncode == 0 else "unknown"
