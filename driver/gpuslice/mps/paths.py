"""Paths below the supervisor's root. A path never changes while a claim holds the daemon, because containers mount it.

supervisor.sock  supervisor.lock
<key>/pipe       CUDA_MPS_PIPE_DIRECTORY: control sockets and pid file, NVIDIA's names
<key>/shm        /dev/shm of the daemon and of its clients
<key>/log        CUDA_MPS_LOG_DIRECTORY, and "console": what the daemon prints
<key>/daemon.json  the daemon's spec and its process, for the next supervisor
<key>/ended      exists if a supervisor that ended in order has ended this daemon; removed when the daemon starts again
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from gpuslice.errors import DeviceError
from gpuslice.system import refusals

_KEY = re.compile(r"[a-z0-9]([-a-z0-9]{0,22}[a-z0-9])?")
_SOCKET_PATH = 107  # bytes of sun_path without its end (unix(7)); with a longer path the daemon fails silently
_LONGEST_SOCKET = "control_privileged"  # NVIDIA's longest name in the pipe directory


@dataclass(frozen=True, slots=True)
class Paths:
    root: Path

    @property
    def socket(self) -> Path:
        return self.root / "supervisor.sock"

    def folder(self, key: str) -> Path:
        return self.root / key

    def pipe(self, key: str) -> Path:
        return self.root / key / "pipe"

    def shm(self, key: str) -> Path:
        return self.root / key / "shm"

    def log(self, key: str) -> Path:
        return self.root / key / "log"

    def record(self, key: str) -> Path:
        return self.root / key / "daemon.json"

    def ended(self, key: str) -> Path:
        return self.root / key / "ended"

    def known(self) -> tuple[str, ...]:
        """The keys of all folders that look like the folder of a daemon."""
        with refusals.translated("read", self.root):
            return tuple(
                sorted(path.name for path in self.root.iterdir() if path.is_dir() and _KEY.fullmatch(path.name))
            )

    def check(self, key: str) -> None:
        """Check a key: DeviceError if no daemon can have it below this root."""
        if not _KEY.fullmatch(key):
            raise DeviceError(f"{key!r} is not the key of an MPS daemon; a key has 1 to 24 of a-z, 0-9 and dashes")
        _check_length(self.pipe(key) / _LONGEST_SOCKET)

    def check_socket(self) -> None:
        """Check the path of the supervisor's socket: DeviceError if it is too long."""
        _check_length(self.socket)

    def make(self, key: str) -> None:
        """Make the folders of a daemon and remove old sockets. DeviceError if they belong to another user."""
        self.check(key)
        folder = self.folder(key)
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            _own(folder)
            folder.chmod(0o711)
            # Clients have other uids. Sticky, like /dev/shm, so that they cannot remove each other's files.
            for path, mode in ((self.pipe(key), 0o755), (self.shm(key), 0o1777), (self.log(key), 0o755)):
                path.mkdir(exist_ok=True)
                _own(path)
                path.chmod(mode)
            for old in self.pipe(key).iterdir():
                if not old.is_dir():
                    old.unlink()
        except OSError as e:
            raise DeviceError(
                f"cannot make folder {folder} of an MPS daemon: {e.strerror} ({e.filename}); check its owner and rights"
            ) from e

    def own(self, key: str) -> None:
        """Check the folder of a daemon: DeviceError if it is missing or belongs to another user."""
        try:
            _own(self.folder(key))
        except OSError as e:
            raise DeviceError(
                f"cannot look at folder {self.folder(key)} of an MPS daemon: {e.strerror}; check its rights"
            ) from e

    def remove(self, key: str) -> None:
        """Remove the folder of a daemon with its content, if it exists."""
        folder = self.folder(key)
        try:
            _own(folder)
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as e:
            raise DeviceError(
                f"cannot remove folder {folder} of an MPS daemon: {e.strerror}; check its rights, then remove it"
            ) from e


def _check_length(path: Path) -> None:
    if (length := len(os.fsencode(path))) > _SOCKET_PATH:
        raise DeviceError(
            f"socket path {path} has {length} bytes, more than the {_SOCKET_PATH} that Linux accepts; "
            f"start the MPS supervisor with a shorter root folder"
        )


def _own(folder: Path) -> None:
    """Refuse a folder of another user, who could replace the sockets of a daemon. The files of that user must stay."""
    there = folder.lstat()
    if not stat.S_ISDIR(there.st_mode):
        raise DeviceError(
            f"{folder} is not a folder of gpuslice; remove it, or start the MPS supervisor with another root"
        )
    if there.st_uid != os.geteuid():
        raise DeviceError(
            f"folder {folder} belongs to uid {there.st_uid}, and the MPS supervisor runs as {os.geteuid()}; "
            f"remove it, or start the supervisor with another root"
        )
