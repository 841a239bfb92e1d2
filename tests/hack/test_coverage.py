"""The table of `hack/test --coverage`."""

from __future__ import annotations

from hack.lib.coverage import Room, rooms, table


def summary(statements: int, lines: int, branches: int, taken: int) -> dict[str, int]:
    return {
        "num_statements": statements,
        "covered_lines": lines,
        "num_branches": branches,
        "covered_branches": taken,
    }


def test_files_of_a_folder_are_one_room_and_the_least_covered_comes_first() -> None:
    files = {"core/a.py": summary(8, 8, 2, 2), "core/b.py": summary(10, 9, 0, 0), "mps/c.py": summary(6, 3, 4, 2)}

    assert rooms(files) == [Room("mps", 10, 5), Room("core", 20, 19)]


def test_the_table_ends_with_all_rooms_together() -> None:
    text = table([Room("mps", 10, 5), Room("core", 20, 19)])

    assert text.splitlines()[1].split() == ["mps", "10", "50.0", "%"]
    assert text.splitlines()[-1].split() == ["all", "30", "80.0", "%"]
