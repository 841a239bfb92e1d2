"""The lock on the work folder. The processes of a cluster hold it, so the lock shows whether a cluster runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from hack.lib.cluster.errors import PlaygroundError

TAKEN = (
    "a cluster is there already, and a machine can run only one; use that cluster (hack/cluster status) or end it first "
    "(hack/cluster down)"
)


@contextlib.contextmanager
def owned(root: Path) -> Iterator[int]:
    """Make and lock the work folder. PlaygroundError if a cluster has the lock."""
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=0o700)
    check_owner(root)
    lock = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if not _lock(lock):
            raise PlaygroundError(TAKEN)
        yield lock
    finally:
        os.close(lock)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def locked(root: Path) -> bool:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


def check_owner(root: Path) -> None:
    """PlaygroundError if another user has taken this name in a folder that everybody may write to."""
    found = root.lstat()
    if root.is_symlink() or not root.is_dir() or found.st_uid != os.geteuid():
        raise PlaygroundError(f"{root} is not a folder of hack/cluster; remove it, or set TMPDIR to another place")
