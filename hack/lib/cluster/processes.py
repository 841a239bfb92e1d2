"""The processes of the cluster's parts, from the view of process 1 of their namespace."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import REPOSITORY, Place
from hack.lib.cluster.parts import Command

TIMEOUT_S = 120.0
_GLANCE_S = 0.05  # pause of a poll, because the thing sends no event
_PAUSE_S = 1.0  # before an ended part is started again


class Processes:
    """The running parts, by name. `restart_ended` starts ended parts again."""

    def __init__(self, place: Place, programs: Path, environment: Mapping[str, str]) -> None:
        """`programs` has the programs of containerd, which find each other on PATH."""
        self._place = place
        path = f"{programs}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        self._environment = {**environment, "PATH": path}
        self._commands: dict[str, Command] = {}
        self._pids: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._due: dict[str, float] = {}  # when each ended part is started again
        self._wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def spawn(self, name: str, command: Command) -> None:
        self._commands[name] = command
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY, env=self._environment
            )
        self._pids[name] = process.pid
        process.returncode = 0  # this class waits for the process, not the Popen object
        self._note()

    def until(self, name: str, ready: Callable[[], bool], what: str) -> None:
        """Return when `ready`. PlaygroundError if any part ends before that, or if `name` takes too long."""
        end = time.monotonic() + TIMEOUT_S
        while not ready():
            self._reap()
            for part, status in self._ended.items():
                raise PlaygroundError(f"{part} ended (status {status}) before {what}; {self.last_words(part)}")
            if time.monotonic() > end:
                raise PlaygroundError(f"{what} took longer than {TIMEOUT_S:.0f} s; {self.last_words(name)}")
            self._rest(_GLANCE_S)

    def restart_ended(self) -> None:
        """Start parts again that have ended and that no command stopped. Return when something may have changed."""
        self._reap()
        now = time.monotonic()
        ended = {name for name in self._ended if not (self._place.stopped / name).exists()}
        self._due = {name: self._due.get(name, now + _PAUSE_S) for name in ended}
        for name in [name for name, at in self._due.items() if at <= now]:
            self.start(name)
        self._rest(min(self._due.values()) - now if self._due else None)

    def replace(self, commands: Mapping[str, Command]) -> None:
        """Start these parts by other commands from now on. Running parts stay as they are."""
        self._commands |= commands

    def start(self, name: str) -> None:
        """Start an ended part again, now."""
        self._due.pop(name, None)
        self._ended.pop(name, None)
        self.spawn(name, self._commands[name])

    def end_all_but(self, names: Sequence[str]) -> None:
        """Kill every other process of this namespace, containers included. Return when all have ended."""
        kept = {os.getpid(), *(pid for name, pid in self._pids.items() if name in names)}
        while others := {int(path.name) for path in Path("/proc").glob("[0-9]*")} - kept:
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            self._rest(_GLANCE_S)

    def log(self, name: str) -> Path:
        return self._place.logs / f"{name}.log"

    def last_words(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()[-5:]
        return "its last words:\n" + "\n".join(f"  {line[:400]}" for line in lines)

    def _rest(self, seconds: float | None) -> None:
        """Wait until a child ends, or for this time."""
        select.select([self._wake], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _reap(self) -> None:
        names = {pid: name for name, pid in self._pids.items()}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] in names:
                    name = names[found[0]]
                    self._ended[name] = os.waitstatus_to_exitcode(found[1])
                    del self._pids[name]
                    self._note()

    def _note(self) -> None:
        """Write down all parts. One that has ended stays a part of the cluster, with the process id 0."""
        written = self._place.pids.with_suffix(".new")
        written.write_text(json.dumps(dict.fromkeys(self._commands, 0) | self._pids))
        written.rename(self._place.pids)
