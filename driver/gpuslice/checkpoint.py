"""Records on disk: one file per claim, in one folder per boot.

A file has a line for each state of its record, and the last whole line counts. A file appears whole (`files.write_atomic`). A
line that a killed process left incomplete does not count. An added line takes half the time of a new file, and the record of
a MIG claim changes four times in a prepare. A bad file harms one claim only. Readers ignore unknown keys and use defaults
for missing keys. The folder's name is the boot id, because partitions do not survive a reboot: records of another boot are
removed unread, including incomplete files of a power loss.

Two instances may work on the same folder (rolling update), so every read looks at the files. Parsed records are cached by
inode, time and size, and each write makes the file larger or replaces it. So a prepare on a node with many claims parses
only new states.

A file that is not a record of its claim is left out, and the log names it once for each content. The driver never guesses
its meaning, and no other claim is affected. Only if the process itself cannot read (no descriptors, no memory), there is no
answer at all, because then a card in use would look free.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

from gpuslice.core import codec, journal
from gpuslice.core.model import ClaimUid
from gpuslice.core.record import Record
from gpuslice.errors import StateError
from gpuslice.system import files, refusals
from gpuslice.system.files import Version
from gpuslice.system.spares import Spares

log = logging.getLogger(__name__)

_LONGEST = 256 * 1024  # bytes; a larger file gets no further line; a claim of 14 partitions writes about 100 KiB
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Records:
    """The records in one folder, read only. The folder may belong to another user."""

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
        """Every readable record; `broken` names the others. StateError if the process cannot read anything."""
        return self._all()[0]

    def broken(self) -> tuple[str, ...]:
        """One sentence for each record that cannot be read."""
        return tuple(self._all()[1].values())

    def _all(self) -> tuple[dict[ClaimUid, Record], dict[str, str]]:
        """The records, and a sentence for each file that is not a record."""
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
            # Several calls per claim; a Path costs more than the call.
            version, known = Version.of(os.lstat(path)), self._read.get(name)
            if known is not None and known[0] == version:
                return known[1]
            record = codec.decode(json.loads(journal.last(files.read_plain(path))))
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


class Checkpoint(Records):
    """The records of this boot, read and written by the driver. It logs unreadable records."""

    def __init__(self, folder: Path, boot: str) -> None:
        """Open the records of this boot below `folder` and drop those of any other boot. StateError without permission."""
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
        """Write a state down. If the record has this state already, nothing is written, so that retries do not grow the
        file."""
        path = self._path(record.plan.ref.uid)
        try:
            there = os.lstat(path)
        except OSError:
            there = None
        if there is not None and self._read.get(path.name) == (Version.of(there), record):
            return
        line = json.dumps(codec.encode(record), separators=(",", ":"))
        if there is not None and there.st_size < _LONGEST:
            version = files.append(path, journal.entry(line))
        else:
            version = self._replace(path, f"{line}\n", new=there is None)
        self._read[path.name] = (version, record)

    def _replace(self, path: Path, text: str, *, new: bool) -> Version:
        version = files.create(path, text, 0o600, self.spares) if new else None
        return version or files.write_atomic(path, text, spares=self.spares)

    def drop(self, uid: ClaimUid) -> None:
        files.remove(self._path(uid))

    def _path(self, uid: ClaimUid) -> Path:
        return self.folder / f"{uid}.json"


def _uid(name: str) -> ClaimUid | None:
    return ClaimUid(name.removesuffix(".json")) if name.endswith(".json") and not name.startswith(".") else None
