"""Processes that a command under test has started, and their end."""

from __future__ import annotations

import contextlib
import os
import re
import select
import time
from pathlib import Path


def with_environment(variable: str, begins: Path) -> list[str]:
    """Command lines of the processes that have this variable with a value that begins so. Children inherit the variable."""
    mark, found = f"{variable}={begins}".encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if any(entry.startswith(mark) for entry in (path / "environ").read_bytes().split(b"\0")):
                found.append((path / "cmdline").read_text(errors="replace").replace("\0", " "))
    return found


def named_in(said: str) -> int:
    """The process id that a command printed: "(process 4711…"."""
    found = re.search(r"process (\d+)", said)
    assert found is not None, said
    return int(found[1])


def wait_end(descriptor: int) -> None:
    """Return when the process of this pidfd has ended."""
    assert select.select([descriptor], [], [], 20)[0], "it goes on"
    os.close(descriptor)


def wait_asleep(pid: int) -> None:
    """Return when the main thread of a process waits for something. A poll, because the kernel sends no event for that."""
    while Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)
