"""Our CUDA program, as a process that takes commands."""

from __future__ import annotations

import re
import select
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from hack.lib.gpu import programs
from hack.lib.gpu.errors import GpuError
from hack.lib.gpu.stages.machine import Machine

_TIMEOUT_S = 40.0


def find(machine: Machine) -> Path:
    """The packed program, or a program that is compiled here. GpuError if neither is possible."""
    packed = machine.programs / "bin" / programs.PROGRAM if machine.programs else None
    if packed is not None and packed.exists():
        return packed
    target = Path(tempfile.gettempdir(), f"gpuslice-{programs.PROGRAM}")
    if not target.exists():
        if shutil.which("gcc") is None:
            raise GpuError("the CUDA program is not packed, and there is no gcc to compile it")
        programs.compile_program(target)
    return target


class CudaProgram:
    """One process on the card. `first` is its first line, which describes the card."""

    def __init__(self, machine: Machine, *before: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [*before, str(find(machine)), "-"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env={**machine.program_environment(), **environment},
        )
        self.first = self.says()

    def says(self) -> str:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], _TIMEOUT_S)[0]:
            return "silent"
        return self.process.stdout.readline().strip()

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def does(self, line: str) -> str:
        self.tell(line)
        return self.says()

    def end(self) -> int:
        """Close the input of the process. Returns its exit status. Kills it if it does not end."""
        try:
            self.process.communicate(timeout=_TIMEOUT_S)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        return self.process.returncode


def numbers(answer: str) -> Mapping[str, float]:
    """{"free": 3825.0, …} from "ok free=3825 total=…"."""
    return {name: float(value) for name, value in re.findall(r"(\w+)=([0-9.]+)\b", answer)}
