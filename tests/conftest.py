"""Fixtures and rules for all tests."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cluster import wanted


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cluster", action="store_true", help="run tests/e2e, and build the cluster's programs if need be"
    )
    parser.addoption(
        "--cluster-version", metavar="1.37.1", help="Kubernetes for tests/e2e; what hack/cluster has if not said"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Enable Ctrl-C. A shell disables it for processes in the background, and all processes of the tests inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Spread the tests of the whole driver among those of its rooms, if several processes run the tests.

    The former mostly wait for processes, the latter mostly calculate. Each process of pytest begins with a part of the list,
    so otherwise the cores have little to do at the end.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    places: dict[Path, float] = {}
    for group in ([item for item in items if _is_whole(item, config) is whole] for whole in (True, False)):
        for number, item in enumerate(group):
            places.setdefault(item.path, number / len(group))
    items.sort(key=lambda item: places[item.path])


def _is_whole(item: pytest.Item, config: pytest.Config) -> bool:
    return item.path.parent == config.rootpath / "tests"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if wanted.asked_for(config) and wanted.refusal(config):
        terminalreporter.write_line(f"tests/e2e is left out: {wanted.refusal(config)}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """If only tests were requested that cannot run, and the reason was printed, an empty run is no failure."""
    nothing = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if nothing and wanted.asked_for(session.config, alone=True) and wanted.refusal(session.config):
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture
def short(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder with a short name, because pytest's own folder leaves little of the 107 bytes of a socket path."""
    folder = Path(tempfile.mkdtemp(prefix="gs-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Child processes without coverage, which takes memory and writes files of its own."""
    for name in ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START"):
        monkeypatch.delenv(name, raising=False)
