"""MPS limits with NVIDIA's own daemon and real CUDA programs, in private folders. What holds, and what does not."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.errors import DeviceError
from gpuslice.mps import control
from gpuslice.mps.api import DaemonSpec
from gpuslice.mps.client import MpsClient
from gpuslice.mps.supervisor import Supervisor
from gpuslice.nvml.api import Nvml

from tests.gpu import program
from tests.gpu.conftest import driver_root

CEILING_MIB = 4096
OUT_OF_MEMORY = "2"  # cuda.h, CUDA_ERROR_OUT_OF_MEMORY


class Program:
    """A CUDA program on the daemon of this pipe directory."""

    def __init__(self, pipe: Path, **limits: str) -> None:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_")}
        self._process = subprocess.Popen(
            [sys.executable, program.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**mine, "CUDA_MPS_PIPE_DIRECTORY": str(pipe), **limits},
        )

    def says(self) -> str:
        assert self._process.stdout is not None
        assert select.select([self._process.stdout], [], [], 60)[0], "the program says nothing"
        return self._process.stdout.readline().strip()

    def allocates(self, mib: int) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"allocate {mib}\n")
        return self.says()

    def end(self) -> int:
        self._process.communicate(timeout=60)
        return self._process.returncode


@pytest.fixture
def client(real: Nvml, short: Path) -> Iterator[MpsClient]:
    gpu = next((gpu for gpu in real.gpus() if not real.look(gpu.uuid).mig), None)
    if gpu is None:
        pytest.skip("no real GPU with MIG mode off, and these tests switch nothing")
    try:
        command = control.program(driver_root(), links=short / "libraries")
    except DeviceError as e:
        pytest.skip(f"no MPS: {e}")
    supervisor = Supervisor(short / "mps", command)
    supervisor.open()
    there = MpsClient(short / "mps")
    there.ensure(DaemonSpec(key="mine", device=gpu.uuid, memory_mib=CEILING_MIB, threads_percent=50))
    yield there
    there.stop("mine")
    supervisor.close()


def test_a_real_daemon_reads_its_ceilings_back(client: MpsClient) -> None:
    (running,) = client.running()

    assert (running.memory_mib, running.threads_percent, running.problem) == (CEILING_MIB, 50, "")


def test_two_real_programs_at_once_keep_to_their_own_figures_and_to_the_daemon_s(client: MpsClient) -> None:
    small = Program(client.pipe("mine"), CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=1024M")
    large = Program(client.pipe("mine"))

    assert small.says().startswith("ready")
    assert large.says().startswith("ready")
    assert small.allocates(256) == "ok"
    assert small.allocates(1024) == OUT_OF_MEMORY
    assert large.allocates(2048) == "ok"
    assert large.allocates(CEILING_MIB) == OUT_OF_MEMORY
    assert (small.end(), large.end()) == (0, 0)


def test_a_real_daemon_that_goes_takes_its_folder_along(client: MpsClient) -> None:
    folder = client.pipe("mine").parent

    client.stop("mine")

    assert client.running() == ()
    assert not folder.exists()
