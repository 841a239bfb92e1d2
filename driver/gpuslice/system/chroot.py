"""Paths below a root, resolved in the same way as in a process with chroot(2) into that root.

Other programs fill the driver root: a driver container, an image, a mount. An absolute link in it means a path below it. A
link that leaves the root with ".." is refused, because its target must not be mounted or run. The kernel would clamp such
a link to the root, but the result would be another file than the author of the link wanted.
"""

from __future__ import annotations

import errno
import fnmatch
from collections.abc import Iterable
from pathlib import Path

from gpuslice.errors import DeviceError

_MOST_LINKS = 40  # as in the kernel (path_resolution(7)); a longer chain counts as a circle
_NO_LINK = (errno.EINVAL, errno.ENOENT, errno.ENOTDIR)
_REMEDY = "name the folder that holds the NVIDIA driver's own files as the driver root"


def resolve(root: Path, path: Path | str) -> Path:
    """The path below the root with all links followed. The file need not exist.

    DeviceError if a link leads out of the root or in a circle. The sentence names the link.
    """
    todo: list[tuple[str, Path | None]] = [(part, None) for part in reversed(Path(path).parts)]
    here: list[str] = []
    links = 0
    while todo:
        part, origin = todo.pop()
        if part == "/":
            here = []
        elif part == ".." and not here and root != Path("/"):
            raise DeviceError(_outside(root, origin or root / path))
        elif part == "..":
            here = here[:-1]
        elif (target := _target(place := root.joinpath(*here, part))) is None:
            here.append(part)
        elif (links := links + 1) > _MOST_LINKS:
            raise DeviceError(f"{root / str(path).lstrip('/')} is behind links that lead in a circle; {_REMEDY}")
        else:
            todo += [(step, place) for step in reversed(target.parts)]
    return root.joinpath(*here)


def regular_file(root: Path, path: Path | str) -> Path | None:
    """The regular file behind this path, with links followed. None if there is none below the root."""
    try:
        real = resolve(root, path)
        return real if real.is_file() else None
    except (DeviceError, OSError):
        return None


def glob(root: Path, pattern: str) -> list[tuple[str, Path]]:
    """Regular files by a pattern of paths: the path of each ("/usr/lib64/libcuda.so.1"), and the file behind its links."""
    found = ((place, regular_file(root, place)) for place in _places(root, pattern))
    return [(str(place), real) for place, real in found if real is not None]


def refusal(root: Path, patterns: Iterable[str]) -> str | None:
    """Which link of these places is refused and why, for an error when nothing was found. None if no link is refused."""
    for pattern in patterns:
        for place in (Path("/", pattern).parent, *_places(root, pattern)):
            try:
                resolve(root, place)
            except DeviceError as e:
                return str(e)
    return None


def _places(root: Path, pattern: str) -> list[Path]:
    places = [Path("/")]
    for part in Path(pattern.lstrip("/")).parts:
        places = [place / name for place in places for name in _names(root, place, part)]
    return places


def _target(place: Path) -> Path | None:
    """The target of the link. None if this is not a link."""
    try:
        return place.readlink()
    except OSError as e:
        if e.errno in _NO_LINK:
            return None
        raise DeviceError(f"cannot read {place}: {e.strerror}; check the driver root and its rights") from e


def _outside(root: Path, link: Path) -> str:
    to = f"is a link to {target}, which" if (target := _target(link)) else "is a path that"
    return f"{link} {to} is not below the driver root {root}; {_REMEDY}"


def _names(root: Path, folder: Path, pattern: str) -> list[str]:
    """Names in a folder below the root that match one part of a pattern."""
    if not any(sign in pattern for sign in "*?["):
        return [pattern]
    try:
        return sorted(fnmatch.filter((path.name for path in resolve(root, folder).iterdir()), pattern))
    except (DeviceError, OSError):
        return []
