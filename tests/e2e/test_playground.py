"""What `hack/cluster` says where it cannot: one sentence, with the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cluster.wanted import HACK_CLUSTER

SINCE = (1, 34)
STARTER = ("bash", "dirname", "cmp")  # what hack/cluster itself runs before it looks for anything


@pytest.fixture
def elsewhere() -> Iterator[dict[str, str]]:
    """An environment in which no cluster runs and nothing is built, with a PATH of its own."""
    folder = Path(tempfile.mkdtemp(prefix="gs-"))
    (folder / "bin").mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "XDG_CACHE_HOME": str(folder), "PATH": str(folder / "bin")}
    _put(environment, *STARTER)
    yield environment
    shutil.rmtree(folder)


def _put(environment: dict[str, str], *programs: str) -> None:
    """Have these on PATH too, and no others."""
    for program in programs:
        found = shutil.which(program)
        assert found is not None, f"there is no {program} on PATH"
        Path(environment["PATH"], program).symlink_to(found)


def _refused(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run([*HACK_CLUSTER, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    return done.stderr


def test_a_missing_program_is_named_with_the_package_that_has_it(elsewhere: dict[str, str]) -> None:
    assert "no runc on PATH" in _refused(elsewhere, "up")
    assert "apt-get install runc" in _refused(elsewhere, "up")


def test_without_go_nothing_can_be_built(elsewhere: dict[str, str]) -> None:
    _put(elsewhere, "runc", "openssl", "unshare", "mount", "busybox")

    assert "needs Go 1.26 or later, but there is no go on PATH; install Go" in _refused(elsewhere, "up")


def test_an_unknown_card_is_refused_before_anything_is_built(elsewhere: dict[str, str]) -> None:
    _put(elsewhere, "runc", "openssl", "unshare", "mount", "busybox")

    assert "product 'h9000' is unknown; simulate one of" in _refused(elsewhere, "up", "--gpus", "h9000x2")


def test_a_work_folder_that_is_too_deep_for_sockets_is_refused(elsewhere: dict[str, str]) -> None:
    _put(elsewhere, "runc", "openssl", "unshare", "mount", "busybox")
    deep = Path(elsewhere["TMPDIR"], "a" * 30)
    deep.mkdir()

    assert "set TMPDIR to a shorter path" in _refused({**elsewhere, "TMPDIR": str(deep)}, "up")


@pytest.mark.parametrize("command", ["status", "kubectl"])
def test_without_a_cluster_the_remedy_is_up(elsewhere: dict[str, str], command: str) -> None:
    assert "there is no cluster; hack/cluster up starts one" in _refused(elsewhere, command)


def test_a_work_folder_of_somebody_else_is_not_touched(elsewhere: dict[str, str]) -> None:
    _put(elsewhere, "runc", "openssl", "unshare", "mount", "busybox")
    Path(elsewhere["TMPDIR"], "gpuslice-cluster").symlink_to(elsewhere["PATH"])

    assert "is not a folder of hack/cluster" in _refused(elsewhere, "down")
