"""The files of an image in memory, and as a tar archive that depends on nothing else."""

from __future__ import annotations

import io
import os.path
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Entry:
    """A file, a symbolic link (with a `target`) or a folder. All belong to root."""

    content: bytes = b""
    mode: int = 0o644
    target: str = ""
    is_folder: bool = False

    @property
    def is_file(self) -> bool:
        return not self.target and not self.is_folder


Tree = dict[str, Entry]  # path in the image, without the first slash → entry


def folder(mode: int = 0o755) -> Entry:
    return Entry(mode=mode, is_folder=True)


def link(target: str) -> Entry:
    return Entry(mode=0o777, target=target)


def followed(tree: Mapping[str, Entry], path: str) -> Entry | None:
    """The file at this path, or the target of a link there. None if there is no file."""
    entry = tree.get(path)
    if entry is not None and entry.target:
        entry = tree.get(os.path.normpath(os.path.join("/", os.path.dirname(path), entry.target)).lstrip("/"))  # noqa: PTH118, PTH120
    return entry if entry is not None and entry.is_file else None


def size(tree: Mapping[str, Entry]) -> int:
    """The bytes of all files together."""
    return sum(len(entry.content) for entry in tree.values())


def archive(tree: Mapping[str, Entry], epoch_s: int) -> bytes:
    """A tar archive. It is sorted, root owns all entries, and all have one time. Folders come before their contents."""
    parents = {str(parent): folder() for path in tree for parent in Path(path).parents if str(parent) != "."}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, entry in sorted({**parents, **tree}.items()):
            member = tarfile.TarInfo(path)
            member.mode, member.mtime, member.size = entry.mode, epoch_s, len(entry.content)
            if entry.is_folder:
                member.type = tarfile.DIRTYPE
            elif entry.target:
                member.type, member.linkname = tarfile.SYMTYPE, entry.target
            tar.addfile(member, io.BytesIO(entry.content))
    return buffer.getvalue()


def write(tree: Mapping[str, Entry], root: Path) -> None:
    """Unpack a tree into an empty or a new folder."""
    for path, entry in sorted(tree.items()):
        place = root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        if entry.target:
            place.symlink_to(entry.target)
        elif entry.is_folder:
            place.mkdir(exist_ok=True)
            place.chmod(entry.mode)
        else:
            place.write_bytes(entry.content)
            place.chmod(entry.mode)
