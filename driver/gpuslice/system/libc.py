"""The three calls of the C library that Python does not offer."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path

_CLOEXEC, _NONBLOCK = 0o2000000, 0o4000  # <sys/inotify.h>
_M_ARENA_MAX = -8  # <malloc.h>


def watch_folder(folder: Path, mask: int) -> int:
    """A non-blocking inotify(7) descriptor for these events of the folder. OSError if the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.inotify_init1(_CLOEXEC | _NONBLOCK)
    if descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(folder), mask) >= 0:
        return descriptor
    error = ctypes.get_errno()
    if descriptor >= 0:
        os.close(descriptor)
    raise OSError(error, os.strerror(error), str(folder))


def use_one_arena() -> None:
    """Make glibc keep one heap for all threads. One heap per thread costs 1 MB each (measured), and the interpreter's lock
    lets only one thread allocate at a time anyway. Call this before any thread starts. It does nothing with another C library.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
