"""Notifications of files that appear in a folder or leave it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from gpuslice.errors import StateError
from gpuslice.system import libc

_IN_DELETE, _IN_CREATE, _IN_MOVED_FROM, _IN_MOVED_TO = 0x200, 0x100, 0x40, 0x80
_EVENT = struct.Struct("iIII")  # struct inotify_event without its name (inotify(7))


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
                f"cannot watch {folder}: {e.strerror}; raise fs.inotify.max_user_instances of the node, or the limit of "
                "open files, or check the folder"
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
