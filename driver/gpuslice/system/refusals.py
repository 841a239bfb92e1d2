"""A refusal of the kernel as one sentence: the file, the reason, and what a person can do."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from gpuslice.errors import StateError

# Remedies by the error's number. The default remedy is about permissions and space.
_REMEDIES = {
    errno.EMFILE: "raise the limit of open files of the driver's container",
    errno.ENFILE: "raise fs.file-max of the node",
    errno.ENOMEM: "give the driver's container more memory",
    errno.EROFS: "mount its file system writable, or look in the kernel log for the reason",
    errno.EIO: "its disk fails; look in the kernel log, and drain the node",
    errno.ELOOP: "it is a link, but files of the driver are not links; remove it",
    errno.EISDIR: "it is a folder, but the driver needs a file there; move it away",
    errno.ENOTEMPTY: "it is a folder, but the driver needs a file there; move it away",
    errno.ENAMETOOLONG: "give the driver a shorter folder",
}


@contextlib.contextmanager
def translated(verb: str, path: Path | str) -> Iterator[None]:
    """Turn an OSError into a StateError that names the failed action and the path."""
    try:
        yield
    except OSError as e:
        raise refused(verb, path, e) from e


def refused(verb: str, path: Path | str, error: OSError) -> StateError:
    remedy = _REMEDIES.get(error.errno or 0, "check permissions and free space of its folder")
    return StateError(f"cannot {verb} {path}: {error.strerror or error}; {remedy}")


def untranslated(error: OSError) -> StateError:
    """The error for a refusal of the kernel that no code below has translated, for the entry points of this process."""
    return refused("use", error.filename or "a file or socket of the node", error)


def unreadable(path: Path, error: OSError) -> str:
    """The sentence about a file or folder of the driver that this process cannot read."""
    if isinstance(error, PermissionError):
        return f"{path} is not readable for uid {os.getuid()}; use the user of the driver, which is root in most cases"
    return f"cannot read {path}: {error.strerror}; check the file system and its permissions"
