"""Locks in files: who excludes whom, in one process and in several."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from gpuslice.system import files

HOLDS = """
import sys; from pathlib import Path; from gpuslice.system import files
with files.locked_name(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_name_in_a_file_is_held_by_one_thread_at_a_time(tmp_path: Path) -> None:
    path, order, tried = tmp_path / "claims.lock", list[str](), threading.Event()

    def second() -> None:
        tried.set()
        with files.locked_name(path, "u-1"):
            order.append("second")

    with files.locked_name(path, "u-1"):
        thread = threading.Thread(target=second)
        thread.start()
        tried.wait(5)
        thread.join(0.1)
        order.append("first")
    thread.join(5)

    assert order == ["first", "second"]


def test_another_name_in_the_file_is_free(tmp_path: Path) -> None:
    with (
        files.locked_name(tmp_path / "claims.lock", "u-1"),
        files.locked_name(tmp_path / "claims.lock", "u-2"),
    ):
        pass

    assert (tmp_path / "claims.lock").read_bytes() == b""


def test_another_process_waits_for_a_name_and_its_death_frees_the_name(tmp_path: Path) -> None:
    path, got = tmp_path / "claims.lock", threading.Event()

    def wait() -> None:
        with files.locked_name(path, "u-1"):
            got.set()

    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path), "u-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with files.locked_name(path, "u-2"):
            thread = threading.Thread(target=wait, daemon=True)
            thread.start()
            assert not got.wait(0.1)
            holder.kill()
            assert got.wait(10)
        thread.join(10)
