"""Records on disk: one file per claim, in one folder per boot.

A file has a line for each state of its record, and the last whole line counts: it appears whole (`files.write_atomic`), and
a line that was torn by a death was never written. Adding a line costs half of replacing the file, and a MIG claim's record
changes four times in a prepare. A bad file harms one claim, and readers ignore keys they do not know and default keys they
miss. The folder's name is the boot id: partitions do not survive a reboot, so records of another boot are dropped unread,
a torn file of a power loss among them.

Two instances may work on the same folder (rolling update): every read looks at the files. Parsed records are kept by
inode, time and size, and each write makes the file larger or another; so a prepare on a node with many claims parses only
what is new.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from gpuslice.core import codec
from gpuslice.core.model import ClaimUid
from gpuslice.core.record import Record
from gpuslice.errors import StateError
from gpuslice.system import files
from gpuslice.system.files import Version
from gpuslice.system.spares import Spares


class Records:
    """The records of one boot, read only: of a folder that may be gone, or another user's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[Version, Record]] = {}

    def get(self, uid: ClaimUid) -> Record | None:
        """The record of the claim, or None. StateError if the record cannot be read."""
        name = f"{uid}.json"
        try:
            stat = os.stat(f"{self.folder}/{name}")  # noqa: PTH116 - several a claim; a Path costs more than the call
        except FileNotFoundError:
            self._read.pop(name, None)
            return None
        except OSError as e:
            raise StateError(files.unreadable(self.folder / name, e)) from e
        return self._load(name, Version.of(stat))

    def records(self) -> dict[ClaimUid, Record]:
        """Every record that can be read; `broken` names the others."""
        found: dict[ClaimUid, Record] = {}
        names = set()
        for entry in self._entries():
            uid = _uid(entry.name)
            if uid is None:
                continue
            names.add(entry.name)
            try:
                record = self._load(entry.name, Version.of(entry.stat()))
            except (OSError, StateError):
                continue
            if record is not None:
                found[uid] = record
        for gone in self._read.keys() - names:
            self._read.pop(gone, None)
        return found

    def broken(self) -> tuple[str, ...]:
        """One sentence for each record that cannot be read."""
        sentences = []
        for name in sorted(entry.name for entry in self._entries()):
            uid = _uid(name)
            try:
                if uid is not None:
                    self.get(uid)
            except StateError as e:
                sentences.append(str(e))
        return tuple(sentences)

    def _entries(self) -> list[os.DirEntry[str]]:
        try:
            return list(os.scandir(self.folder))
        except FileNotFoundError:
            return []
        except OSError as e:
            raise StateError(files.unreadable(self.folder, e)) from e

    def _load(self, name: str, version: Version) -> Record | None:
        known = self._read.get(name)
        if known is not None and known[0] == version:
            return known[1]
        path = self.folder / name
        try:
            record = codec.decode(json.loads(_last_line(path.read_bytes())))
        except FileNotFoundError:
            return None
        except OSError as e:
            raise StateError(files.unreadable(path, e)) from e
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
            raise StateError(
                f"record {path} of claim {path.stem} cannot be read ({type(e).__name__}: {e}); move the file away to "
                "give the claim up, then destroy its partition by hand"
            ) from e
        self._read[name] = (version, record)
        return record


class Checkpoint(Records):
    def __init__(self, folder: Path, boot: str) -> None:
        """Open the records of this boot below `folder` and drop those of any other. StateError without permission."""
        files.ensure_folder(folder)
        for other in folder.iterdir():
            if other.name != boot and other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
        super().__init__(files.ensure_folder(folder / boot))
        self.spares = Spares(self.folder, 0o600)

    def put(self, record: Record) -> None:
        path = self._path(record.plan.ref.uid)
        line = json.dumps(codec.encode(record), separators=(",", ":")) + "\n"
        # In a file that is there, a torn line before it is ended first.
        there = path.exists()
        version = files.append(path, f"\n{line}") if there else files.write_atomic(path, line, spares=self.spares)
        self._read[path.name] = (version, record)

    def drop(self, uid: ClaimUid) -> None:
        files.remove(self._path(uid))

    def _path(self, uid: ClaimUid) -> Path:
        return self.folder / f"{uid}.json"


def _last_line(data: bytes) -> bytes:
    """The last whole line that says something; ValueError where there is none. What follows it was torn: never written."""
    return data[: data.rindex(b"\n")].rstrip().rpartition(b"\n")[2]


def _uid(name: str) -> ClaimUid | None:
    return ClaimUid(name.removesuffix(".json")) if name.endswith(".json") and not name.startswith(".") else None
