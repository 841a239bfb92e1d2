"""Which driver is measured: the one of this working tree, or another revision's in a worktree of its own."""

from __future__ import annotations

import compileall
import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class BenchError(Exception):
    """It could not be measured; one sentence that says why."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A driver to measure: its name in the table, and the folder in which its package `driver` lies."""

    name: str
    root: Path

    def environment(self) -> Mapping[str, str]:
        """Without PYTHONSAFEPATH `python -m driver` would take the package of the current folder, whatever the path."""
        return {"PYTHONPATH": str(self.root), "PYTHONSAFEPATH": "1"}


def here() -> Subject:
    return Subject("this tree", ROOT)


@contextlib.contextmanager
def at_revision(revision: str) -> Iterator[Subject]:
    """The driver of a git revision, checked out beside this tree for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="gpuslice-rev-") as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), revision)
        try:
            if not (tree / "driver" / "__main__.py").exists():
                raise BenchError(f"revision {revision} has no driver/__main__.py to run; name one that can be started")
            yield Subject(revision, tree)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def with_byte_code(subjects: list[Subject]) -> list[str]:
    """Compile the drivers and see to it that what they import is compiled too; notes for the reader.

    A driver that compiles at each start is several MB larger and starts up to 3.5 times slower (measured). Libraries
    are compiled by the warm-up start, which only needs to be allowed to.
    """
    notes = []
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        notes.append("PYTHONDONTWRITEBYTECODE was set here; the drivers were started without it")
    bare = [s.name for s in subjects if not compileall.compile_dir(str(s.root / "driver"), quiet=2)]
    if bare:
        notes.append(f"byte-code of {', '.join(bare)} could not be written: memory and start look worse than they are")
    return notes
