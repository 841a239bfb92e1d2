"""A simulated node with an MPS supervisor, in this process or as its own process; and stand-in CUDA programs."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gpuslice.core.model import GpuUuid, MigUuid
from gpuslice.mps import control
from gpuslice.mps.api import DaemonSpec
from gpuslice.mps.client import MpsClient
from gpuslice.mps.daemon import Timeouts
from gpuslice.mps.supervisor import Supervisor
from gpuslice.nvml.sim.node import SimNode

from tests.kit import mps_client as program

SOON_S = 20.0
QUICK = Timeouts(probe_s=0.2, answer_s=0.5)


class StandInProgram:
    """A running stand-in CUDA program."""

    def __init__(self, pipe: Path, uid: int = 0, *, inside: Sequence[str] = (), **environment: str) -> None:
        """`inside`: a command that runs a program in other namespaces."""
        self.process = subprocess.Popen(
            [*inside, sys.executable, "-S", "-E", program.__file__, str(pipe), str(uid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, **environment},
        )
        self.pid = self.process.pid

    @classmethod
    def of_environment(cls, environment: Mapping[str, str]) -> StandInProgram:
        """A program in a container with this environment from its CDI file."""
        limits = {k: v for k, v in environment.items() if k.startswith("CUDA_MPS_") and "DIRECTORY" not in k}
        return cls(Path(environment["CUDA_MPS_PIPE_DIRECTORY"]), 0, **limits)

    def says(self) -> str:
        """Its next line; "" after its end."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], SOON_S)
        assert ready, "the program says nothing"
        return self.process.stdout.readline().strip()

    def got(self) -> tuple[str, str]:
        """(memory in MiB or "none", percent): its limits at the start."""
        words = self.says().split()
        assert words[0] == "server", words
        return words[3], words[5]

    def allocates(self, mib: int) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"allocate {mib}\n")
        return self.says()

    def quiet(self) -> bool:
        """Whether it runs and has printed nothing more."""
        assert self.process.stdout is not None
        return self.process.poll() is None and not select.select([self.process.stdout], [], [], 0)[0]

    def wait(self) -> int:
        return self.process.wait(SOON_S)

    def end(self) -> int:
        """Let it end by itself. Returns its exit status, even if it has ended already."""
        self.process.communicate(timeout=SOON_S)
        return self.process.returncode


class LogRecords(logging.Handler):
    """The log of the supervisor in this process. `wait` waits for a line with these words."""

    def __init__(self) -> None:
        super().__init__()
        self._lines: list[str] = []
        self._more = threading.Condition()
        logger = logging.getLogger("gpuslice.mps")
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        with self._more:
            self._lines.append(record.getMessage())
            self._more.notify_all()

    def lines(self, words: str) -> list[str]:
        with self._more:
            return [line for line in self._lines if words in line]

    def wait(self, words: str, times: int = 1) -> str:
        with self._more:
            assert self._more.wait_for(lambda: sum(words in line for line in self._lines) >= times, SOON_S), self._lines
            return next(line for line in reversed(self._lines) if words in line)


@contextlib.contextmanager
def a_node(folder: Path) -> Iterator[MpsNode]:
    """Two simulated H100, and no supervisor yet."""
    node = MpsNode(folder)
    try:
        yield node
    finally:
        node.close()


class MpsNode:
    def __init__(self, folder: Path, spec: str = "h100x2") -> None:
        self.folder, self.spec = folder, spec
        self.sim = SimNode(folder / "node", spec)
        self.root = folder / "mps"
        self.command: Sequence[str] = control.stand_in(self.sim.folder)
        self.client = MpsClient(self.root)
        self.logged = LogRecords()
        self.programs: list[StandInProgram] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.supervisor: Supervisor | None = None

    def supervise(self, timeouts: Timeouts | None = None) -> Supervisor:
        self.supervisor = Supervisor(self.root, self.command, timeouts=timeouts or Timeouts())
        self.supervisor.open()
        return self.supervisor

    def supervise_in_process(
        self, *prefix: str, simulated: bool = True, more: Sequence[str] = ()
    ) -> subprocess.Popen[str]:
        """Start the supervisor as on a node. Returns when it serves."""
        process = self.spawn("gpuslice", *prefix, simulated=simulated, more=more)
        assert process.stderr is not None
        lines = []
        while "serves" not in (line := process.stderr.readline()):
            lines.append(line)
            assert line, lines
        return process

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.communicate(timeout=SOON_S)
        if self.supervisor is not None:
            self.supervisor.close()
        for running in self.programs:
            running.end()
        self.sim.close()
        logging.getLogger("gpuslice.mps").removeHandler(self.logged)

    def spawn(
        self, module: str, *prefix: str, simulated: bool = True, more: Sequence[str] = (), **environment: str
    ) -> subprocess.Popen[str]:
        """Start the supervisor by this Python module. `prefix`: the words before the Python program."""
        arguments = ["--mps-root", str(self.root), *more]
        arguments += ["--simulate", self.spec, "--simulate-folder", str(self.sim.folder)] if simulated else []
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, "mps-supervisor", *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self.processes.append(process)
        return process

    def outlive(self, supervisor: subprocess.Popen[str]) -> subprocess.Popen[str]:
        """Kill this supervisor and start the next one, which finds the daemons of the first."""
        supervisor.kill()
        supervisor.communicate()
        self.processes.remove(supervisor)
        return self.supervise_in_process()

    def daemons_of(self, key: str) -> list[int]:
        """The pids of the daemon of this key and of its servers: all MPS processes of its pipe."""
        wanted = f"CUDA_MPS_PIPE_DIRECTORY={self.client.pipe(key)}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "comm").read_text().startswith("nvidia-cuda-mps"):
                    found += [int(entry.name)] if wanted in (entry / "environ").read_bytes().split(b"\0") else []
        return found

    # ------------------------------------------------------------ what a test asks for

    def uuid(self, gpu: int = 0) -> GpuUuid:
        return self.sim.cards[gpu].uuid

    def daemon(
        self, gpu: int = 0, *, memory_mib: int | None = 10240, threads_percent: int | None = 40, device: str = ""
    ) -> DaemonSpec:
        uuid = MigUuid(device) if device else self.uuid(gpu)
        return DaemonSpec(key=f"gpu-{gpu}", device=uuid, memory_mib=memory_mib, threads_percent=threads_percent)

    def program(self, gpu: int = 0, uid: int = 0, **environment: str) -> StandInProgram:
        self.programs.append(StandInProgram(self.client.pipe(f"gpu-{gpu}"), uid, **environment))
        return self.programs[-1]

    def cue(self, name: str) -> Path:
        """Cue a fault of the stand-in (mps/sim/daemon.py). Remove the file to withdraw the fault."""
        path = self.sim.folder / "mps" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        return path

    def log(self, key: str = "gpu-0") -> list[str]:
        """The commands that the daemon of this key received."""
        text = (self.client.log(key) / "control.log").read_text(encoding="utf-8")
        return [line.partition("command ")[2] for line in text.splitlines()]
