"""The benchmark itself: that it measures and reports. What it measures is asserted nowhere; machines differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hack.lib.bench.exposition import Exposition, Histogram
from hack.lib.bench.table import Report, Row, figures, table

ROOT = Path(__file__).parents[2]
TOLD = """\
# HELP calls_seconds How long calls took.
calls_seconds_bucket{call="one \\"a\\"",code="OK",le="0.1"} 1
calls_seconds_bucket{call="one \\"a\\"",code="OK",le="0.2"} 3
calls_seconds_bucket{call="one \\"a\\"",code="OK",le="+Inf"} 4
calls_seconds_sum{call="one \\"a\\"",code="OK"} 1.5
calls_seconds_count{call="one \\"a\\"",code="OK"} 4
calls_seconds_bucket{call="two",code="lost",le="0.1"} 0
calls_seconds_bucket{call="two",code="lost",le="0.2"} 0
calls_seconds_bucket{call="two",code="lost",le="+Inf"} 2
calls_seconds_sum{call="two",code="lost"} 6e+00
calls_seconds_count{call="two",code="lost"} 2
others_total 7
"""


def _bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "GRPC_VERBOSITY": "NONE",
        **environment,
    }
    return subprocess.run(
        [sys.executable, "-m", "hack.lib.bench", *arguments],
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--cluster", "--vs", "HEAD"), "--vs is only for runs with stand-ins"),
        (("--cluster", "--calls", "3"), "--calls is only for runs with stand-ins"),
        (("--cluster", "--only", "mig"), "this kind has pods, successors, churn, rest"),
        (("--only", "churn"), "--only churn belongs to the other kind of run"),
        (("--cluster-version", "1.36.3"), "add --cluster"),
    ],
)
def test_options_of_the_other_kind_of_run_are_refused(arguments: tuple[str, ...], said: str) -> None:
    done = _bench(*arguments)

    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert said in done.stderr


def test_where_no_cluster_can_run_one_sentence_says_why(tmp_path: Path) -> None:
    done = _bench("--cluster", PATH=str(tmp_path), TMPDIR=str(tmp_path))

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("hack/bench: ")
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- what programs tell of themselves


def test_totals_are_over_all_labels_that_match() -> None:
    told = Exposition.of(TOLD, "calls_")

    assert told.total("calls_seconds_count") == 6
    assert told.total("calls_seconds_count", call="two") == 2
    assert told.total("calls_seconds_count", call="*", code="OK") == 4
    assert told.total("calls_seconds_count", call="three") == 0
    assert told.total("others_total") == 0, "not of a family that was asked for"


def test_a_histogram_joins_label_sets() -> None:
    histogram = Exposition.of(TOLD, "calls_").histogram("calls_seconds")

    assert histogram == Histogram({0.1: 1, 0.2: 3, float("inf"): 6}, 7.5, 6)
    assert histogram.mean() == 1.25


@pytest.mark.parametrize(
    ("q", "seconds"),
    [(0.125, 0.05), (0.25, 0.1), (0.5, 0.15), (0.75, 0.2), (0.95, 0.2)],
    ids=["within the first", "at a bound", "within a further one", "at the last bound", "above the last bound"],
)
def test_quantiles_are_interpolated_within_their_bucket(q: float, seconds: float) -> None:
    histogram = Exposition.of(TOLD, "calls_").histogram("calls_seconds", code="OK")

    assert histogram.quantile(q) == pytest.approx(seconds)


def test_empty_buckets_before_the_first_observation_are_passed_over() -> None:
    assert Histogram({0.1: 0, 0.2: 0, 0.4: 2, float("inf"): 2}, 0.6, 2).quantile(0.5) == pytest.approx(0.3)


def test_only_what_was_added_counts() -> None:
    whole = Exposition.of(TOLD, "calls_")
    earlier = whole.histogram("calls_seconds", code="OK")

    assert whole.histogram("calls_seconds").since(earlier).mean() == 3.0
    assert earlier.since(Exposition.of("", "calls_").histogram("calls_seconds")) == earlier
    with pytest.raises(ValueError, match="without observations"):
        earlier.since(earlier).mean()
    with pytest.raises(ValueError, match="without observations"):
        earlier.since(earlier).quantile(0.5)


# ---------------------------------------------------------------- the table


def _report(*rows: Row, **found: list[dict[str, float]]) -> Report:
    machine = {"cpus": 2, "busy_with_others": 0.1, "python": "3.11.7"}
    told = figures(rows, found)
    return Report(what="trial", size={}, extent="2 round(s)", machine=machine, notes=["a note"], figures=told)


def test_the_median_of_the_rounds_is_held_against_the_target() -> None:
    rows = [Row("a_ms", "a", 2.0), Row("b_count", "b", 0.0), Row("c_rate", "c"), Row("d_s", "was not measured", 1.0)]

    shown = table(_report(*rows, one=[{"a_ms": 1.0, "b_count": 1.0, "c_rate": 5.0}, {"a_ms": 2.5, "b_count": 0.0}]))

    _, _, *lines = (line.split() for line in shown.splitlines())
    assert lines[:3] == [
        ["a", "<=", "2", "ms", "1.75", "ms", "1.00-2.50", "yes"],
        ["b", "<=", "0", "0.50", "0.00-1.00", "NO"],
        ["c", "5.00", "pods/s"],
    ]
    assert "was not measured" not in shown
    assert shown.endswith("medians of 2 round(s)\na note")


def test_of_two_revisions_the_latter_has_the_target_and_the_change_is_shown() -> None:
    shown = table(_report(Row("a_ms", "a", 2.0), old=[{"a_ms": 1.0}], new=[{"a_ms": 3.0}]))

    assert shown.splitlines()[2].split() == ["a", "<=", "2", "ms", "1.00", "ms", "3.00", "ms", "+2.00", "NO"]
