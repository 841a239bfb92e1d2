"""A kernel that refuses: the tests of `kernel_refusals.py`, each in a process of its own, and those that start processes.

The audit hook of `kernel_refusals.py` stays in a process for ever. With it, two threads that start at once under coverage can
fail in Python 3.11 ("Cannot install a trace function while another trace function is being installed").
"""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest
from gpuslice.commands import trouble
from gpuslice.standin.cluster import DRIVER, StandInCluster

from tests.kit.publishing import an_api_server

TESTS = Path(__file__).parent / "kernel_refusals.py"
NAMES = re.findall(r"^(?:async )?def (test_\w+)", TESTS.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.timeout(180)  # each kind of call fails once, and each time the steps begin anew
@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernel_refuses(name: str, unmeasured: None) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=150", f"{TESTS}::{name}"]

    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS.parents[1])

    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", ["gpus.json", "running.json"])
async def test_a_disk_that_takes_no_more_of_what_is_only_for_comfort_refuses_no_start(
    short: Path, unmeasured: None, name: str
) -> None:
    async with StandInCluster(short) as cluster:
        cluster.module = "tests.kit.kernel"
        refused = f"{short}|os.rename|/plugins/{DRIVER}/.{name}.*.tmp|ENOSPC"

        driver = await cluster.start(environment={"KERNEL": refused})

        assert f"{name}: No space left on device" in driver.log.read_text()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EROFS, errno.EIO, errno.ENOSPC, errno.ENOMEM])
def test_what_no_part_of_the_driver_foresaw_is_the_nodes_fault_all_the_same(number: int) -> None:
    sentence, code = trouble.sentence(OSError(number, "no", "/some/file"))

    assert code == 3
    assert sentence.startswith("cannot use /some/file: no; ")
    assert "mistake" not in sentence


@pytest.mark.parametrize("descriptors", [8, 12, 63])
def test_a_driver_without_descriptors_ends_with_a_sentence(short: Path, unmeasured: None, descriptors: int) -> None:
    with an_api_server(short / "api") as server:
        cluster = StandInCluster(short)
        cluster.api = server
        arguments = cluster.arguments("--http-endpoint", "127.0.0.1:0")
        ended = subprocess.run(
            ["prlimit", f"--nofile={descriptors}", sys.executable, "-m", "gpuslice", *arguments],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )

    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"gpuslice: this process may have {descriptors} files open")
