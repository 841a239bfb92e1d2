"""Records on disk: one file per claim, in one folder per boot.

A file has a line for each state of its record, and the last whole line counts: it appears whole (`files.write_atomic`), and
a line that was torn by a death was never written. Adding a line costs half of replacing the file, and a MIG claim's record
changes four times in a prepare. A bad file harms one claim, and readers ignore keys they do not know and default keys they
miss. The folder's name is the boot id: partitions do not survive a reboot, so records of another boot are dropped unread,
a torn file of a power loss among them.

Two instances may work on the same folder (rolling update): every read looks at the files. Parsed records are kept by
inode, time and size, and each write makes the file larger or another; so a prepare on a node with many claims parses only
what is new.

A file that is no record of its claim is left out and named, in the log once for each content: it is never guessed at, and it
takes no other claim along. Only where the process itself cannot read (no descriptors, no memory) nothing is answered at all,
because then a card in use would look free.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import stat
from pathlib import Path

from gpuslice.core import codec
from gpuslice.core.model import ClaimUid
from gpuslice.core.record import Record
from gpuslice.errors import StateError
from gpuslice.system import files, refusals
from gpuslice.system.files import Version
from gpuslice.system.spares import Spares

log = logging.getLogger(__name__)

_LONGEST = 256 * 1024  # bytes of a file that another line is added to; a claim of 14 partitions writes about 100 KiB
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Records:
    """The records in one folder, read only: also of a folder that is another user's."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._read: dict[str, tuple[Version, Record]] = {}

    def get(self, uid: ClaimUid) -> Record | None:
        """The record of the claim, or None. StateError if the record cannot be read."""
        return self._load(f"{uid}.json")

    def uids(self) -> frozenset[ClaimUid]:
        """Every claim that has a file here, also if the file cannot be read. StateError if the folder cannot be."""
        with refusals.translated("read", self.folder):
            try:
                names = os.listdir(self.folder)  # noqa: PTH208 - names, not paths
            except PermissionError as e:
                raise StateError(refusals.unreadable(self.folder, e)) from e
        return frozenset(uid for uid in map(_uid, names) if uid is not None)

    def records(self) -> dict[ClaimUid, Record]:
        """Every record that can be read; `broken` names the others. StateError if the process cannot read anything."""
        return self._all()[0]

    def broken(self) -> tuple[str, ...]:
        """One sentence for each record that cannot be read."""
        return tuple(self._all()[1].values())

    def _all(self) -> tuple[dict[ClaimUid, Record], dict[str, str]]:
        """The records, and what is wrong with each file that is none."""
        found: dict[ClaimUid, Record] = {}
        wrong: dict[str, str] = {}
        uids = sorted(self.uids())
        for uid in uids:
            try:
                record = self._load(f"{uid}.json")
            except StateError as e:
                if isinstance(e.__cause__, OSError) and e.__cause__.errno in _SHORTAGES:
                    raise
                wrong[f"{uid}.json"] = str(e)
                continue
            if record is not None:
                found[uid] = record
        for gone in self._read.keys() - {f"{uid}.json" for uid in uids}:
            self._read.pop(gone, None)
        return found, wrong

    def _load(self, name: str) -> Record | None:
        path = f"{self.folder}/{name}"
        try:
            status = os.lstat(path)  # several a claim; a Path costs more than the call
            version, known = Version.of(status), self._read.get(name)
            if known is not None and known[0] == version:
                return known[1]
            record = self._decode(path, status.st_mode)
            if f"{record.plan.ref.uid}.json" != name:
                raise ValueError(f"it is of claim {record.plan.ref}")
        except FileNotFoundError:
            self._read.pop(name, None)
            return None
        except OSError as e:
            raise StateError(f"record of claim {_uid(name)}: {refusals.unreadable(Path(path), e)}") from e
        except (ValueError, RecursionError) as e:
            raise StateError(
                f"record {path} of claim {_uid(name)} cannot be read ({type(e).__name__}: {e}); move the file away to "
                "give the claim up, then destroy its partition by hand"
            ) from e
        self._read[name] = (version, record)
        return record

    @staticmethod
    def _decode(path: str, mode: int) -> Record:
        if not stat.S_ISREG(mode):
            raise ValueError("it is no plain file")  # a link leads to what somebody else writes, a pipe never ends
        with open(path, "rb") as file:
            return codec.decode(json.loads(_last_line(file.read())))


class Checkpoint(Records):
    """The records of this boot, read and written by the driver. What cannot be read is logged."""

    def __init__(self, folder: Path, boot: str) -> None:
        """Open the records of this boot below `folder` and drop those of any other. StateError without permission."""
        files.ensure_folder(folder)
        with refusals.translated("read", folder):
            others = [other for other in folder.iterdir() if other.name != boot and other.is_dir()]
        for other in others:
            shutil.rmtree(other, ignore_errors=True)
        super().__init__(files.ensure_folder(folder / boot))
        self._reported: dict[str, str] = {}  # the sentence of each file that is left out
        self.spares = Spares(self.folder, 0o600)

    def records(self) -> dict[ClaimUid, Record]:
        """As `Records.records`; the log names the others too."""
        found, wrong = self._all()
        for name, sentence in wrong.items():
            if self._reported.get(name) != sentence:
                log.error("%s", sentence)
        self._reported = wrong
        return found

    def put(self, record: Record) -> None:
        """Write a state down; one that is there already is not written again, so that tries make no file grow."""
        path = self._path(record.plan.ref.uid)
        try:
            there = os.lstat(path)
        except OSError:
            there = None
        if there is not None and self._read.get(path.name) == (Version.of(there), record):
            return
        line = json.dumps(codec.encode(record), separators=(",", ":")) + "\n"
        if there is not None and there.st_size < _LONGEST:
            version = files.append(path, f"\n{line}")  # a torn line before it is ended first
        else:
            version = files.write_atomic(path, line, spares=self.spares)
        self._read[path.name] = (version, record)

    def drop(self, uid: ClaimUid) -> None:
        files.remove(self._path(uid))

    def _path(self, uid: ClaimUid) -> Path:
        return self.folder / f"{uid}.json"


def _last_line(data: bytes) -> bytes:
    """The last whole line with content. ValueError if there is none. What follows it was torn, and so never written."""
    return data[: data.rindex(b"\n")].rstrip().rpartition(b"\n")[2]


def _uid(name: str) -> ClaimUid | None:
    return ClaimUid(name.removesuffix(".json")) if name.endswith(".json") and not name.startswith(".") else None
