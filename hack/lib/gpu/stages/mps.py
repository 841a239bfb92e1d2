"""NVIDIA's own MPS programs with our CUDA programs, in private folders: which statements about MPS are true.

The card's settings stay as they are: no compute mode is set.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from hack.lib.gpu.results import Results
from hack.lib.gpu.stages.machine import Machine
from hack.lib.gpu.stages.program import CudaProgram, numbers

_CEILING_MIB = 4096
_ROUNDS = 4_000_000  # of the timed kernel; they take much longer than its start


def run(machine: Machine, results: Results) -> None:
    control = _control(machine)
    if control is None:
        results.leave_out("an MPS daemon runs", "there is no nvidia-cuda-mps-control among the driver's files")
        return
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        daemon = Daemon(machine, control, Path(folder))
        results.check("an MPS daemon runs in folders of its own", daemon.start() == 0, daemon.folder)
        try:
            for trial in (_ceilings, _own_figures, _fight, _managed, _multiprocessors, _uids, _killed, _escape, _fault):
                with results.trying(trial.__name__.strip("_").replace("_", " ")):
                    trial(daemon, results)
        finally:
            results.check("it ends after quit", daemon.end(), "")
            logs = [path.read_text(errors="replace") for path in sorted(Path(folder).glob("log/*.log"))]
            print("\n".join(logs)[-6000:])


class Daemon:
    def __init__(self, machine: Machine, control: Path, folder: Path) -> None:
        self._machine, self._control, self.folder = machine, control, folder
        self.environment = {
            "CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"),
            "CUDA_MPS_LOG_DIRECTORY": str(folder / "log"),
        }
        for name in ("pipe", "log"):
            (folder / name).mkdir()
        folder.chmod(0o755)

    def start(self) -> int:
        path = f"{self._control.parent}:{os.environ['PATH']}"  # the control program looks for the server program there
        environment = {**self._machine.program_environment(), **self.environment, "PATH": path}
        command = [str(self._control), "-d", *(["-multiuser-server"] if os.geteuid() == 0 else [])]
        return subprocess.run(command, env=environment, check=False, timeout=20).returncode

    def tell(self, *lines: str) -> str:
        environment = {**self._machine.program_environment(), **self.environment}
        text = "".join(f"{line}\n" for line in lines)
        done = subprocess.run(
            [str(self._control)], input=text, env=environment, capture_output=True, text=True, check=False, timeout=20
        )
        answer = " ".join((done.stdout + done.stderr).split())
        print(f"  > {'; '.join(lines)}: {answer}", flush=True)
        return answer

    def program(self, *before: str, **more: str) -> CudaProgram:
        return CudaProgram(self._machine, *before, **self.environment, **more)

    def server(self) -> str:
        return (self.tell("get_server_list").split() or [""])[0]

    def status(self) -> str:
        server = self.server()
        return self.tell(f"get_server_status {server}") if server else "no server"

    def end(self) -> bool:
        self.tell("quit -t 5")
        deadline = time.monotonic() + 8
        while (self.folder / "pipe" / "nvidia-cuda-mps-control.pid").exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # its end sends no event
        return not (self.folder / "pipe" / "nvidia-cuda-mps-control.pid").exists()


def _control(machine: Machine) -> Path | None:
    """NVIDIA's control program. None if the driver root has none."""
    if machine.driver_root is None:
        return None
    from gpuslice.errors import DeviceError
    from gpuslice.system import programs

    try:
        return programs.find(machine.driver_root, "nvidia-cuda-mps-control")
    except DeviceError:
        return None


def _ceilings(daemon: Daemon, results: Results) -> None:
    device = "0"
    daemon.tell(f"set_default_device_pinned_mem_limit {device} {_CEILING_MIB}M")
    read = daemon.tell(f"get_default_device_pinned_mem_limit {device}")
    results.check("the memory ceiling is read back", "4G" in read or "4096M" in read, read)
    begun = time.perf_counter()
    program = daemon.program()
    took = time.perf_counter() - begun
    results.check(
        "the first program starts, and the server with it",
        program.first.startswith("ok"),
        f"{took:.2f} s, {program.first}",
    )
    results.check("the server is ACTIVE then", "ACTIVE" in daemon.status(), daemon.status())
    results.check("it sees less memory than the ceiling", numbers(program.first)["free"] <= _CEILING_MIB, program.first)
    answers = [program.does("allocate 3000"), program.does("allocate 3000")]
    results.check("the ceiling holds", answers[0].startswith("ok") and answers[1].startswith("error 2"), answers)
    program.end()


def _own_figures(daemon: Daemon, results: Results) -> None:
    program = daemon.program(CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=1G")
    answers = [program.first, program.does("allocate 512"), program.does("allocate 1024")]
    results.check("a program's own lower figure holds", answers[2].startswith("error 2"), answers)
    program.end()


def _fight(daemon: Daemon, results: Results) -> None:
    program = daemon.program(CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=100G", CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="100")
    answers = [program.first, program.does("allocate 5000")]
    results.check("a program cannot raise the ceiling by its environment", answers[1].startswith("error 2"), answers)
    one, other = (daemon.program() for _ in range(2))
    answers += [one.does("allocate 3000"), other.does("allocate 3000")]
    results.check(
        "the ceiling is each program's own, not that of all together", answers[-1].startswith("ok"), answers[-2:]
    )
    for each in (program, one, other):
        each.end()


def _managed(daemon: Daemon, results: Results) -> None:
    program = daemon.program()
    answer = program.does(f"managed {2 * _CEILING_MIB}")
    results.check("managed memory is kept within the ceiling too", answer.startswith("error"), answer)
    program.end()


def _multiprocessors(daemon: Daemon, results: Results) -> None:
    rows = []
    for percent in ("100", "50", "25"):
        program = daemon.program(CUDA_MPS_ACTIVE_THREAD_PERCENTAGE=percent)
        program.does("spin 1000")
        rows.append((percent, numbers(program.first)["sms"], numbers(program.does(f"spin {_ROUNDS}"))["ms"]))
        program.end()
    text = "; ".join(f"{percent} %: {sms:.0f} multiprocessors, {ms:.0f} ms" for percent, sms, ms in rows)
    slower = rows[2][2] / rows[0][2]
    text += f"; {slower:.2f} times as long"
    results.check("a quarter of the multiprocessors takes about four times as long", 3 < slower < 5.5, text)


def _uids(daemon: Daemon, results: Results) -> None:
    other = daemon.program("setpriv", "--reuid=1000", "--regid=1000", "--clear-groups")
    results.check("a program of another user runs under root's daemon", other.first.startswith("ok"), other.first)
    both = daemon.program()
    results.check("two users at once", both.first.startswith("ok"), f"{both.first}; {daemon.tell('get_server_list')}")
    print(other.does("uid") if other.first.startswith("ok") else "")
    other.end()
    both.end()


def _killed(daemon: Daemon, results: Results) -> None:
    program, other = daemon.program(), daemon.program()
    program.does("touch 2048")
    program.tell("second 5")
    time.sleep(0.5)  # then it runs its kernels
    program.process.send_signal(signal.SIGKILL)
    program.process.wait()
    results.check(
        "a client that is killed at work leaves the other alone",
        other.does("spin 1000").startswith("ok"),
        daemon.status(),
    )
    after = daemon.program()
    results.check("and the next one starts", after.first.startswith("ok"), after.first)
    after.end()
    other.end()


def _escape(daemon: Daemon, results: Results) -> None:
    """Without compute mode EXCLUSIVE_PROCESS, a program that does not know the daemon can use the whole card."""
    program = daemon.program()
    free = CudaProgram(daemon._machine)
    answer = free.does(f"allocate {2 * _CEILING_MIB}")
    results.check("compute mode DEFAULT lets a program go past the daemon", answer.startswith("ok"), answer)
    free.end()
    program.end()


def _fault(daemon: Daemon, results: Results) -> None:
    one, other = daemon.program(), daemon.program()
    fault = one.does("fault")
    results.check("a fault ends the program with an error of CUDA's", fault.startswith("error"), fault)
    results.check("the status of the server after it", True, daemon.status())
    hit = other.does("spin 1000")
    results.check("the other program of the daemon is hit too", hit.startswith("error"), hit)
    one.end()
    other.end()
    begun = time.perf_counter()
    after = daemon.program()
    took = time.perf_counter() - begun
    text = f"{took:.2f} s, {after.first}, {daemon.status()}"
    results.check("the daemon serves again when both have ended", after.first.startswith("ok"), text)
    after.end()
