"""Files of the driver: atomic writes, locks between two instances, notifications of deleted files.

The atomic write does **not** fsync. Our files describe partitions, compute modes and MPS daemons, which do not survive a
reboot either. A killed process loses none of its writes, because the page cache belongs to the kernel. So fsync would only
protect records that the driver ignores after the next boot (`checkpoint.py` keeps one folder for each boot), and it would
cost milliseconds for each write of a prepare.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpuslice.errors import StateError
from gpuslice.system import libc
from gpuslice.system.refusals import refused, translated
from gpuslice.system.spares import Spares

log = logging.getLogger(__name__)

_IN_DELETE, _IN_CREATE, _IN_MOVED_FROM, _IN_MOVED_TO = 0x200, 0x100, 0x40, 0x80
_EVENT = struct.Struct("iIII")  # struct inotify_event without its name (inotify(7))


# In temporary names: two driver pods of a rolling update may both be process 1 of their containers.
_MINE = f"{os.getpid()}-{os.urandom(4).hex()}"


class Version(NamedTuple):
    """Distinguishes contents of a file without reading them.

    The size is part of it because the kernel's clock is coarse (4 ms) and an inode is used again at once: of three quick
    writes the third may look like the first by those two alone.
    """

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Version:
        return cls(stat.st_ino, stat.st_mtime_ns, stat.st_size)


class Identity(NamedTuple):
    """As `Version`, of a file that others may change: no chmod, link or folder in its place has the same one."""

    inode: int
    ctime_ns: int
    size: int
    mode: int

    @classmethod
    def at(cls, path: Path) -> Identity | None:
        try:
            there = path.lstat()
        except OSError:
            return None
        return cls(there.st_ino, there.st_ctime_ns, there.st_size, there.st_mode)


def holds(path: Path, text: str, mode: int) -> bool:
    """Whether a plain file of this mode is there and holds exactly this text."""
    there = Identity.at(path)
    if there is None or there.mode != stat.S_IFREG | mode:
        return False
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def read_plain(path: Path) -> bytes:
    """The content of a file of ours. OSError if it cannot be read; ValueError if it is no plain file: a link leads to what
    somebody else writes, and a pipe never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no plain file")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Clear the place of a file of ours of a link or an empty folder. What a folder holds is somebody's: StateError."""
    with translated("write", path):
        if path.is_symlink():
            path.unlink()
        else:
            path.rmdir()
    log.warning("removed %s: a file of the driver belongs there, and it was none", path)


def write_atomic(
    path: Path, text: str, mode: int = 0o600, *, mtime_ns: int | None = None, spares: Spares | None = None
) -> Version:
    """Make `path` hold `text`, or leave it as it was; readers see the old text or the new one, never a part.

    With `spares`, which are of the same folder and mode, the file is not made here and now.

    The temporary file lies in the same folder: CDI runtimes notice a rename only from there (measured on
    containerd 1.7 and 2.1), and its name has no suffix that they would read. Plain system calls: Python's file objects
    make three times as many, each of which lets go of the interpreter and queues for it again.
    """
    temporary = f"{path.parent}/.{path.name}.{_MINE}.tmp"
    try:
        descriptor = spares.link(temporary) if spares else None
        if descriptor is None:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            _write(descriptor, text)
            if mtime_ns is not None:
                os.utime(descriptor, ns=(mtime_ns, mtime_ns))
            there = os.fstat(descriptor)
            if stat.S_IMODE(there.st_mode) != mode:  # the umask took some of it
                os.fchmod(descriptor, mode)
            version = Version.of(there)
        finally:
            os.close(descriptor)
        _rename(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise refused("write", path, e) from e
    return version


def _rename(temporary: str, path: Path) -> None:
    try:
        os.rename(temporary, path)  # noqa: PTH104 - hot
    except IsADirectoryError:
        clear(path)
        os.rename(temporary, path)  # noqa: PTH104


def _write(descriptor: int, text: str) -> None:
    left = memoryview(text.encode())
    while left:
        left = left[os.write(descriptor, left) :]


def append(path: Path, text: str) -> Version:
    """Add `text` to the end of an existing file. A process that is killed here may leave a part of the text."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            _write(descriptor, text)
            return Version.of(os.fstat(descriptor))
        finally:
            os.close(descriptor)
    except OSError as e:
        raise refused("write", path, e) from e


def remove(path: Path) -> bool:
    """Remove a file, or what is in its place. False if nothing existed."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    except IsADirectoryError:
        clear(path)
    except OSError as e:
        raise refused("remove", path, e) from e
    return True


def ensure_folder(path: Path, mode: int = 0o750) -> Path:
    """Have a folder with at least these rights, whatever the umask; those of a folder of somebody else stay as they are."""
    try:
        made = [parent for parent in path.parents if not parent.exists()] if mode & 0o001 else []
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        for folder in (path, *made):  # others have to pass the parents that we made, too
            there = folder.stat()
            if there.st_mode & mode != mode and there.st_uid == os.geteuid():
                folder.chmod(stat.S_IMODE(there.st_mode) | mode)
    except OSError as e:
        raise StateError(f"cannot create folder {path}: {_obstacle(path, e)}") from e
    if not os.access(path, os.W_OK | os.X_OK):
        raise StateError(
            f"folder {path} is not writable for uid {os.getuid()}; give the driver the right to write there"
        )
    return path


def _obstacle(path: Path, error: OSError) -> str:
    """Why this folder cannot be created, and the remedy."""
    try:
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except OSError:
        file = None
    if file is not None:
        return f"{file} is a file; move the file away, or name another folder"
    return f"{error.strerror}; create it, or give the driver the right to"


def _same_file(descriptor: int, path: Path) -> bool:
    """Whether the open file is still what the path names: a lock on an unlinked file excludes no other process."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _open_lock(path: Path) -> int:
    """A link would let two names be one lock, for which a claim with two cards waits for ever."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except OSError as e:
        if e.errno == errno.ENOENT:
            ensure_folder(path.parent)
        elif e.errno in (errno.ELOOP, errno.EISDIR):
            clear(path)
        else:
            raise refused("lock", path, e) from e
    with translated("lock", path):
        return os.open(path, flags, 0o600)


@contextlib.contextmanager
def locked(path: Path, *, unlink: bool = False, spares: Spares | None = None) -> Iterator[None]:
    """Hold an exclusive lock on `path` (flock(2): per open file, so threads and processes exclude each other alike).

    Waits as long as it takes. `unlink` removes the file while the lock is held, so that locks named by claims leave
    nothing behind; never set it for a lock that lives as long as the node (a GPU's). `spares` as in `write_atomic`.
    """
    while True:
        descriptor = spares.link(str(path)) if spares else None
        if descriptor is None:
            descriptor = _open_lock(path)
        try:
            with translated("lock", path):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not unlink or _same_file(descriptor, path):  # only a lock that is unlinked can be an old one
                try:
                    yield
                finally:
                    if unlink:
                        _unlock(path)
                return
        finally:
            os.close(descriptor)


def _unlock(path: Path) -> None:
    """Remove the file of a lock that is held. One that stays is locked again the next time, so that the work is done."""
    try:
        path.unlink(missing_ok=True)
    except OSError as e:
        log.warning("%s", refused("remove", path, e))


def try_lock(path: Path) -> int | None:
    """Take the lock now and keep it until the process ends. None if another process has it. The descriptor is the lock."""
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(descriptor)
            if e.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            raise refused("lock", path, e) from e
        if _same_file(descriptor, path):
            return descriptor
        os.close(descriptor)


class FolderWatch:
    """Names of files that are deleted from (or, with `arrivals`, leave or appear in) a folder, by inotify(7), whoever did it.

    Without `arrivals` renames are no news: each atomic write is one.

    `fileno` becomes readable when there is something to `read`; nothing is missed between construction and `close`.
    """

    def __init__(self, folder: Path, *, arrivals: bool = False) -> None:
        # A bound socket appears by IN_CREATE, a file that was written atomically by IN_MOVED_TO.
        mask = _IN_DELETE | (_IN_MOVED_FROM | _IN_MOVED_TO | _IN_CREATE if arrivals else 0)
        try:
            self._fd = libc.watch_folder(folder, mask)
        except OSError as e:
            raise StateError(
                f"cannot watch {folder}: {e.strerror}; raise fs.inotify.max_user_instances of the node, or the limit of open "
                "files, or check the folder"
            ) from e

    def fileno(self) -> int:
        return self._fd

    def read(self) -> list[str]:
        """Names since the last read; empty when there is none. An overflow of the kernel's queue is the name ""."""
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(data):
            _, _, _, length = _EVENT.unpack_from(data, at)
            names.append(data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0").decode())
            at += _EVENT.size + length
        return names

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
