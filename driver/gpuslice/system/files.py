"""Files of the driver: atomic writes, and locks between two instances.

The atomic write does **not** fsync. Our files describe partitions, compute modes and MPS daemons, which do not survive a
reboot either. A killed process loses none of its writes, because the page cache belongs to the kernel. So fsync would only
protect records that the driver ignores after the next boot (`checkpoint.py` keeps one folder for each boot), and each
write of a prepare would take milliseconds longer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpuslice.errors import StateError
from gpuslice.system.refusals import refused, translated
from gpuslice.system.spares import Spares, named

log = logging.getLogger(__name__)


# Part of temporary names, because two driver pods of a rolling update may both be process 1 of their containers.
_MINE = f"{os.getpid()}-{os.urandom(4).hex()}"


_NO_PLAIN_FILE = "it is no plain file"
_BYTE = struct.Struct("hhqqi4x")  # struct flock of fcntl(2): type, whence, start, length, pid


class Version(NamedTuple):
    """Detects a change of a file's content without a read.

    The size is part of it, because the kernel's clock is coarse (4 ms) and an inode can be used again at once. So without the
    size, the third of three quick writes could look like the first.
    """

    inode: int
    mtime_ns: int
    size: int

    @classmethod
    def of(cls, stat: os.stat_result) -> Version:
        return cls(stat.st_ino, stat.st_mtime_ns, stat.st_size)


class Identity(NamedTuple):
    """Like `Version`, for a file that others may change. A chmod, a link or a folder in its place gives another identity."""

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
    """Whether a plain file of this mode exists with exactly this text."""
    there = Identity.at(path)
    if there is None or there.mode != stat.S_IFREG | mode:
        return False
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False


def read_plain(path: Path | str) -> bytes:
    """The content of a file of ours. OSError if it cannot be read. ValueError if it is no plain file, because a link may
    lead to a file of another user, and a pipe never ends."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as e:
        if e.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
            raise ValueError(_NO_PLAIN_FILE) from e
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(_NO_PLAIN_FILE)
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def clear(path: Path) -> None:
    """Remove a link or an empty folder from the place of a file of ours. StateError for a folder with content, which is
    not ours."""
    with translated("write", path):
        if path.is_symlink():
            path.unlink()
        else:
            path.rmdir()
    log.warning("removed %s, because a file of the driver belongs there", path)


def write_atomic(
    path: Path, text: str, mode: int = 0o600, *, mtime_ns: int | None = None, spares: Spares | None = None
) -> Version:
    """Write `text` to `path`. After an error, the file is unchanged. Readers see the old or the new text, never a part.

    `spares` must have the same folder and mode. Then no new file has to be created now.

    The temporary file is in the same folder, because CDI runtimes notice only such a rename (measured on containerd 1.7 and
    2.1). Its name has no suffix that they would read. The function uses plain system calls, because Python's file objects
    make three times as many, and each call releases the interpreter lock and waits for it again.
    """
    temporary = f"{path.parent}/.{path.name}.{_MINE}.tmp"
    try:
        descriptor = spares.link(temporary) if spares else None
        if descriptor is None:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            version = _fill(descriptor, text, mode, mtime_ns)
        finally:
            os.close(descriptor)
        _rename(temporary, path)
    except OSError as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)  # noqa: PTH108
        raise refused("write", path, e) from e
    return version


def create(path: Path, text: str, mode: int, spares: Spares) -> Version | None:
    """Make a new file with this text. It appears whole. None if there is a file already, or no spare.

    For folders whose readers need no rename: it changes the folder once, and `write_atomic` changes it twice.
    """
    descriptor = spares.take()
    if descriptor is None:
        return None
    try:
        version = _fill(descriptor, text, mode)
    except OSError as e:
        os.close(descriptor)
        raise refused("write", path, e) from e
    if named(descriptor, str(path)) is None:
        return None
    os.close(descriptor)
    return version


def _fill(descriptor: int, text: str, mode: int, mtime_ns: int | None = None) -> Version:
    _write(descriptor, text)
    if mtime_ns is not None:
        os.utime(descriptor, ns=(mtime_ns, mtime_ns))
    there = os.fstat(descriptor)
    if stat.S_IMODE(there.st_mode) != mode:  # the umask removed some bits
        os.fchmod(descriptor, mode)
    return Version.of(there)


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
    """Make a folder with at least these rights, for any umask. An existing folder of another user keeps its rights."""
    try:
        made = [parent for parent in path.parents if not parent.exists()] if mode & 0o001 else []
        path.mkdir(mode=mode, parents=True, exist_ok=True)
        for folder in (path, *made):  # other users must be able to pass new parents, too
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
    """Whether the open file still has this path. A lock on an unlinked file excludes no other process."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _open_lock(path: Path) -> int:
    """Open a lock without following links. Through a link, two names would be one lock, and a claim with two cards
    would wait for itself."""
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
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` (flock(2): per open file, so threads and processes exclude each other alike).

    Waits without a limit. The file stays, because a lock on an unlinked file excludes no other process.
    """
    descriptor = _open_lock(path)
    try:
        with translated("lock", path):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked_name(path: Path, name: str) -> Iterator[None]:
    """Hold an exclusive lock on a name in the file `path`, as `locked` does on a file; other names are free.

    It locks one byte, far behind the end of the empty file (F_OFD_SETLKW of fcntl(2), Linux 3.15). A lock file for each
    name would be made and removed each time, which costs 0.06 ms (measured, ext4).
    """
    place = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")  # below 2**63, an off_t
    descriptor = _open_lock(path)
    try:
        with translated("lock", path):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _BYTE.pack(fcntl.F_WRLCK, os.SEEK_SET, place, 1, 0))
        yield
    finally:
        os.close(descriptor)


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
