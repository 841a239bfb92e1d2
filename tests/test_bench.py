"""The benchmark itself: that it measures and reports. What it measures is asserted nowhere; machines differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "GRPC_VERBOSITY": "NONE"}
    return subprocess.run(
        [sys.executable, str(ROOT / "hack" / "benchmark"), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=50,
        check=False,
    )


def test_the_benchmark_measures_a_driver_process_and_prints_json() -> None:
    small = ("--rounds", "1", "--calls", "8", "--claims", "16")

    done = _bench("--json", *small, *("--only", "start"), *("--only", "calls"), *("--only", "hang"))

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    figures = {figure["key"]: figure for figure in report["figures"]}
    assert report["what"] == "driver overhead, simulated"
    assert any("PYTHONDONTWRITEBYTECODE" in note for note in report["notes"])
    assert {"start_s", "prepare_mig_eight_p50_ms", "unprepare_card_p99_ms", "hang_get_info_ms"} <= figures.keys()
    assert all(figure["median"]["this tree"] > 0 for figure in figures.values())
    assert figures["start_s"]["reached"] in (True, False)


def test_the_table_shows_measure_target_figure_and_whether_it_is_reached() -> None:
    done = _bench("--rounds", "1", "--claims", "16", "--only", "memory")

    assert done.returncode == 0, done.stderr
    header, _, *lines = done.stdout.splitlines()
    assert header.split() == ["measure", "target", "this", "tree", "rounds", "reached"]
    assert any("<= 75 MB" in line and line.endswith(("yes", "NO")) for line in lines)


def test_a_revision_that_cannot_be_measured_is_an_error_of_one_sentence() -> None:
    done = _bench("--vs", "no-such-revision", "--only", "start")

    assert done.returncode == 1
    assert done.stderr.startswith("hack/bench: git worktree add failed")
