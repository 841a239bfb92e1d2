"""Records on disk: complete or absent. A bad file harms one claim only. Records of another boot are dropped unread."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from gpuslice.checkpoint import Checkpoint, Records
from gpuslice.core.model import ClaimRef, ClaimUid
from gpuslice.core.record import Plan, Record
from gpuslice.errors import StateError


def a_record(name: str = "one") -> Record:
    return Record(Plan(ClaimRef("default", name, ClaimUid(f"uid-{name}")), (), ()))


def test_what_was_put_is_there_for_another_process(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "boot-1").put(a_record())

    other = Checkpoint(tmp_path, "boot-1")
    assert other.get(ClaimUid("uid-one")) == a_record()
    assert other.records() == {"uid-one": a_record()}


def test_what_another_process_changes_is_seen_at_once(tmp_path: Path) -> None:
    ours, theirs = Checkpoint(tmp_path, "boot-1"), Checkpoint(tmp_path, "boot-1")
    ours.put(a_record())
    changed = replace(a_record(), plan=replace(a_record().plan, ref=replace(a_record().plan.ref, name="renamed")))

    theirs.put(changed)
    assert ours.get(ClaimUid("uid-one")) == changed
    theirs.drop(ClaimUid("uid-one"))
    assert ours.get(ClaimUid("uid-one")) is None
    assert ours.records() == {}


def a_renamed(name: str) -> Record:
    plan = a_record().plan
    return Record(replace(plan, ref=replace(plan.ref, name=name)))


def test_a_line_that_a_death_tore_was_never_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    checkpoint.put(a_record())
    checkpoint.put(a_renamed("second"))
    path = checkpoint.folder / "uid-one.json"
    whole = path.read_bytes()
    lengths = range(whole.index(b"\n") + 1, len(whole))

    seen = []
    for length in lengths:
        path.write_bytes(whole[:length])
        seen.append(Checkpoint(tmp_path, "boot-1").get(ClaimUid("uid-one")))

    assert seen == [a_record()] * len(lengths)


def test_what_is_put_after_a_torn_line_counts(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "boot-1").put(a_record())
    path = tmp_path / "boot-1" / "uid-one.json"
    path.write_bytes(path.read_bytes() + b'\n{"format": 1, "cl')

    Checkpoint(tmp_path, "boot-1").put(a_renamed("third"))

    assert Checkpoint(tmp_path, "boot-1").get(ClaimUid("uid-one")) == a_renamed("third")


def test_records_of_another_boot_are_dropped(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "boot-1").put(a_record())

    assert Checkpoint(tmp_path, "boot-2").records() == {}
    assert Checkpoint(tmp_path, "boot-1").records() == {}


def test_dropping_what_is_not_there_is_fine(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "boot-1").drop(ClaimUid("uid-none"))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 99}', "\x00\x01"])
def test_a_bad_file_is_named_and_harms_nobody_else(tmp_path: Path, text: str) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    checkpoint.put(a_record("fine"))
    (checkpoint.folder / "uid-bad.json").write_text(text)

    with pytest.raises(StateError, match=r"uid-bad.json of claim uid-bad cannot be read .*move the file away"):
        checkpoint.get(ClaimUid("uid-bad"))
    assert checkpoint.records() == {"uid-fine": a_record("fine")}
    assert len(checkpoint.broken()) == 1


def test_a_record_under_the_name_of_another_claim_is_not_read_as_that_claim_s(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    checkpoint.put(a_record("fine"))
    shutil.copy(checkpoint.folder / "uid-fine.json", checkpoint.folder / "uid-bad.json")

    assert checkpoint.records() == {"uid-fine": a_record("fine")}
    assert "it is of claim default/fine (uid-fine)" in checkpoint.broken()[0]


def test_what_cannot_be_read_is_logged_once_for_each_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    for text in ("{}\n", "{}\n", "[]\n"):
        (checkpoint.folder / "uid-bad.json").write_text(text)
        checkpoint.records()
        checkpoint.records()

    assert [("has no format" in line, "an object" in line) for line in caplog.messages] == [
        (True, False),
        (False, True),
    ]


def test_a_state_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    checkpoint.put(a_record())
    size = (checkpoint.folder / "uid-one.json").stat().st_size

    for _ in range(1440):
        checkpoint.put(a_record())

    assert (checkpoint.folder / "uid-one.json").stat().st_size == size


def test_a_file_that_has_grown_long_is_written_anew(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    for number in range(6000):
        checkpoint.put(a_renamed(f"name-{number}"))

    assert (checkpoint.folder / "uid-one.json").stat().st_size < 300_000
    assert Checkpoint(tmp_path, "boot-1").get(ClaimUid("uid-one")) == a_renamed("name-5999")


def test_a_process_without_descriptors_reads_nothing_rather_than_a_part(
    tmp_path: Path,
) -> None:
    Checkpoint(tmp_path, "boot-1").put(a_record())
    checkpoint = Checkpoint(tmp_path, "boot-1")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # the usual three are open already
    try:
        with pytest.raises(StateError, match="raise the limit of open files"):
            checkpoint.records()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    assert checkpoint.records() == {"uid-one": a_record()}


def test_a_folder_or_a_record_of_another_user_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Checkpoint(tmp_path, "boot-1").put(a_record())
    records = Records(tmp_path / "boot-1")

    def refused(*_: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(os, "lstat", refused)
        assert records.records() == {}
        assert [f"uid-one.json is not readable for uid {os.getuid()}" in line for line in records.broken()] == [True]
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", refused)
        with pytest.raises(StateError, match=r"boot-1 is not readable for uid \d+; use the user of the driver"):
            records.records()
    assert records.records() == {"uid-one": a_record()}


def test_records_are_read_by_who_may_not_write_and_nothing_is_made(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "boot-1").put(a_record())
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "boot-1").chmod(0o500)

    assert Records(tmp_path / "boot-1").records() == {"uid-one": a_record()}
    assert sorted(tmp_path.rglob("*")) == before


def test_temporary_files_of_a_killed_writer_are_no_records(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path, "boot-1")
    (checkpoint.folder / ".uid-one.json.123.tmp").write_text("{")

    assert checkpoint.records() == {}
    assert checkpoint.broken() == ()


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "claims").write_text("")

    with pytest.raises(StateError, match="cannot create folder"):
        Checkpoint(tmp_path / "claims", "boot-1")
