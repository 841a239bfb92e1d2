"""Files made ahead: what is written through them is what would have been written without, and nothing of them stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpuslice.errors import StateError
from gpuslice.system import files
from gpuslice.system.spares import Spares


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def filled(folder: Path, mode: int = 0o600, number: int = 1) -> Spares:
    spares = Spares(folder, mode)
    for _ in range(number):
        spares.refill()
    return spares


def test_a_file_written_through_a_spare_has_its_text_and_its_mode_and_no_other_file_stays(tmp_path: Path) -> None:
    spares = filled(tmp_path, 0o644)
    assert list(tmp_path.iterdir()) == []

    files.write_atomic(tmp_path / "a.json", "text", 0o644, spares=spares)

    assert (tmp_path / "a.json").read_text() == "text"
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert spares.link(str(tmp_path / "one more")) is None, "the spare was not used"


def test_without_a_spare_the_file_is_written_all_the_same(tmp_path: Path) -> None:
    spares = filled(tmp_path)

    for number in range(3):
        files.write_atomic(tmp_path / f"{number}.json", str(number), spares=spares)

    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["0", "1", "2"]


def test_a_file_that_is_there_is_replaced(tmp_path: Path) -> None:
    spares = filled(tmp_path, number=2)

    files.write_atomic(tmp_path / "a.json", "a longer text", spares=spares)
    files.write_atomic(tmp_path / "a.json", "text", spares=spares)

    assert (tmp_path / "a.json").read_text() == "text"


def test_a_new_file_appears_whole_and_one_that_is_there_stays(tmp_path: Path) -> None:
    spares = filled(tmp_path, 0o644, number=2)

    made = files.create(tmp_path / "a.json", "text", 0o644, spares)

    assert made == files.Version.of((tmp_path / "a.json").stat())
    assert (tmp_path / "a.json").read_text() == "text"
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
    assert files.create(tmp_path / "a.json", "another", 0o644, spares) is None
    assert (tmp_path / "a.json").read_text() == "text"
    assert files.create(tmp_path / "b.json", "text", 0o644, spares) is None, "no spare is left"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_umask_takes_nothing_of_a_new_file(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        files.create(tmp_path / "a.json", "text", 0o644, filled(tmp_path, 0o644))
    finally:
        os.umask(before)

    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644


def test_no_more_than_eight_are_kept_and_a_used_one_is_closed(tmp_path: Path) -> None:
    before = open_files()
    spares = filled(tmp_path, number=20)
    assert open_files() == before + 8

    for number in range(8):
        files.write_atomic(tmp_path / str(number), "", spares=spares)

    assert open_files() == before
    assert spares.link(str(tmp_path / "one more")) is None


def test_spares_that_nobody_has_any_more_are_closed(tmp_path: Path) -> None:
    before = open_files()
    spares = filled(tmp_path, number=3)

    del spares

    assert open_files() == before


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="/dev/shm is no file system of its own")
def test_a_folder_on_another_file_system_by_now_is_served_without_spares(tmp_path: Path) -> None:
    spares = filled(tmp_path)
    path = Path(f"/dev/shm/gpuslice-{os.getpid()}.test")

    files.write_atomic(path, "text", spares=spares)

    assert path.read_text() == "text"
    path.unlink()


def test_a_folder_that_has_gone_is_an_error_as_without_spares(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    spares = filled(folder)
    folder.rmdir()

    spares.refill()
    with pytest.raises(StateError, match="cannot write"):
        files.write_atomic(folder / "a.json", "text", spares=spares)
