"""The folder of a playground: its path, whether the playground runs, and how to remove the rest of a killed one.

The background process holds a lock while it runs. Each process of a playground has the path of the folder in its
environment. So processes that survive a SIGKILL are found without a list.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shlex
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from gpuslice.errors import ConfigError
from gpuslice.mps import launch
from gpuslice.mps.process import PidfdProcess, ProcessId
from gpuslice.system import files

MARK = "GPUSLICE_PLAYGROUND"
# The kernel accepts 107 bytes of socket path, and our names need up to 32 of them: /mps/0db83714-19-6/pipe/control.
_LONGEST = 75
_END_S = 10.0


class PlaygroundError(Exception):
    """A playground command failed: one sentence with the remedy."""


class PlaygroundFolder:
    """Paths of one playground. ConfigError: the paths of its sockets would be too long."""

    def __init__(self, chosen: Path | None) -> None:
        self.path = (chosen or _usual()).absolute()
        if len(os.fsencode(self.path)) > _LONGEST:
            raise ConfigError(
                f"folder {self.path} is longer than the {_LONGEST} bytes that leave room for sockets; choose a shorter one"
            )
        self.lock, self.socket = self.path / "lock", self.path / "playground.sock"
        self.log, self.plugins = self.path / "playground.log", self.path / "plugins"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def flag(self) -> str:
        """The flag that selects this playground on a command line; "" for the usual folder."""
        return "" if self.path == _usual().absolute() else f" --folder {shlex.quote(str(self))}"

    def check(self) -> None:
        """PlaygroundError if something else is at this path."""
        try:
            status = self.path.lstat()
        except FileNotFoundError:
            return
        ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not ours or (not self.lock.exists() and any(self.path.iterdir())):
            raise PlaygroundError(f"{self} is not a folder of your playground; choose another folder with --folder")

    def take(self) -> int | None:
        """Make the folder and take its lock. None if a playground runs there."""
        self.check()
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            return files.try_lock(self.lock)
        except OSError as e:
            raise PlaygroundError(f"cannot use folder {self} ({e.strerror}); choose another one with --folder") from e

    def alive(self) -> bool:
        """Whether its background process runs."""
        try:
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)
        return False

    def wait_dead(self) -> None:
        """Return when its background process has ended."""
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            finally:
                os.close(descriptor)

    def clear(self, *, keep_lock: bool = False) -> int:
        """Kill the processes that a dead playground left, and remove its files. Returns the number of processes."""
        found = list(self._left())
        for process in found:
            process.kill()
        for process in found:
            process.ended(_END_S)
        for shm in self.path.glob("mps/*/shm"):
            launch.take_tmpfs(str(shm))
        for path in self.path.iterdir() if self.path.is_dir() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not (keep_lock and path == self.lock):
                path.unlink(missing_ok=True)
        if not keep_lock:
            with contextlib.suppress(FileNotFoundError):
                self.path.rmdir()
        return len(found)

    def _left(self) -> Iterator[PidfdProcess]:
        mark = os.fsencode(f"{MARK}={self}")
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):  # it has ended, or belongs to another user
                    process = PidfdProcess(ProcessId.of(int(entry.name)))
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        yield process


def _usual() -> Path:
    name = f"gpuslice-playground-{os.getuid()}"
    folder = Path(tempfile.gettempdir(), name)
    return folder if len(os.fsencode(folder.absolute())) <= _LONGEST else Path("/tmp", name)
