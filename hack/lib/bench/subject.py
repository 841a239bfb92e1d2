"""The driver to measure: the one of this working tree, or of another revision in its own worktree."""

from __future__ import annotations

import compileall
import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
_WITHOUT = Path(__file__).resolve().parent / "without"  # hides packages that only a development environment has


class BenchError(Exception):
    """A measurement failed. One sentence with the reason."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A driver to measure: its name in the table, its package, and the folder of the package."""

    name: str
    root: Path
    module: str

    def environment(self) -> Mapping[str, str]:
        """PYTHONSAFEPATH, because `python -m` would otherwise load the package of the current folder."""
        return {"PYTHONPATH": f"{self.root}:{_WITHOUT}", "PYTHONSAFEPATH": "1"}

    def known(self, arguments: Sequence[str]) -> list[str]:
        """The arguments without flags that this revision does not have: `run`, then pairs of flag and value."""
        command, *pairs = arguments
        flags = self._flags()
        kept = (pair for pair in zip(pairs[::2], pairs[1::2], strict=True) if pair[0] in flags)
        return [command, *(text for pair in kept for text in pair)]

    @cache  # noqa: B019 - two subjects in a run
    def _flags(self) -> frozenset[str]:
        environment = {**os.environ, **self.environment()}
        command = [sys.executable, "-m", self.module, "run", "--help"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise BenchError(f"the driver of {self.name} cannot be run: {done.stderr.strip()[-300:]}")
        return frozenset(re.findall(r"--[a-z-]+", done.stdout))


def here() -> Subject:
    return _subject("this tree", ROOT)


def _subject(name: str, tree: Path) -> Subject:
    """The driver in a work tree: `driver/gpuslice`, or `driver` in revisions before 0.2. BenchError if there is none."""
    for root, module in ((tree / "driver", "gpuslice"), (tree, "driver")):
        if (root / module / "__main__.py").exists():
            return Subject(name, root, module)
    raise BenchError(f"{name} has no driver/gpuslice/__main__.py to run; name a revision that can be started")


@contextlib.contextmanager
def at_revision(revision: str) -> Iterator[Subject]:
    """The driver of a git revision, checked out beside this tree while the context is open."""
    with tempfile.TemporaryDirectory(prefix="gpuslice-rev-") as folder:
        tree = Path(folder, "tree")
        _git("worktree", "add", "--detach", str(tree), revision)
        try:
            yield _subject(revision, tree)
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"git {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def with_byte_code(subjects: list[Subject]) -> list[str]:
    """Compile the drivers, and allow Python to compile their libraries. Returns notes for the reader.

    A driver that compiles at each start is several MB larger and starts up to 3.5 times slower (measured). The warm-up
    start compiles the libraries.
    """
    notes = []
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        notes.append("PYTHONDONTWRITEBYTECODE was set here; the drivers were started without it")
    bare = [s.name for s in subjects if not compileall.compile_dir(str(s.root / s.module), quiet=2)]
    if bare:
        notes.append(f"byte-code of {', '.join(bare)} could not be written: memory and start look worse than they are")
    return notes
