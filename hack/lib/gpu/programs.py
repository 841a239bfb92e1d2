"""The programs of a pack: those of `hack/cluster`, NVIDIA's container tools, and our CUDA program."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from hack.lib.cluster import software
from hack.lib.cluster.binaries import Binaries, toolkit
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.gpu.errors import GpuError

SOURCE = Path(__file__).with_name("program.c")
PROGRAM = "cuda-program"
_OF_THE_MACHINE = ("runc", "openssl")
# Every machine has its own C library, and no other C library fits its kernel and its programs.
_C_LIBRARY = re.compile(r"(?:linux-vdso|ld-linux\S*|lib(?:c|m|dl|rt|pthread|resolv))\.so")


def collect(target: Path, version: str) -> None:
    """Put all programs below `target`. GpuError if one is missing and cannot be built."""
    binaries = Binaries(version)
    try:
        binaries.ensure()
        tools = toolkit()
        busybox = software.busybox()
    except PlaygroundError as e:
        raise GpuError(str(e)) from e
    cache = target / "cache" / "gpuslice" / "cluster"
    for source in (binaries.kube, *sorted(binaries.runtime.iterdir())):
        _copy(source, cache / source.parent.name / source.name)
    _copy(busybox, target / "bin" / "busybox")
    for tool in tools:
        _copy(tool, target / "bin" / tool.name)
    for name in _OF_THE_MACHINE:
        _with_libraries(name, target)
    compile_program(target / "bin" / PROGRAM)


def compile_program(target: Path) -> None:
    command = ["gcc", "-O2", "-o", str(target), str(SOURCE), "-ldl"]
    if shutil.which("gcc") is None:
        raise GpuError("there is no gcc on PATH to compile the CUDA program; apt-get install gcc libc6-dev")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GpuError(f"{SOURCE.name} does not compile: {done.stderr.strip()[-300:]}")


def _with_libraries(name: str, target: Path) -> None:
    """Copy a program of this machine with the libraries that another machine may lack."""
    found = shutil.which(name)
    if found is None:
        raise GpuError(f"there is no {name} on PATH, but the cluster needs it; apt-get install {name}")
    _copy(Path(found), target / "own-libraries" / name)
    listing = subprocess.run(["ldd", found], capture_output=True, text=True, check=False).stdout
    for library, path in re.findall(r"(\S+) => (/\S+)", listing):
        if not _C_LIBRARY.match(library):
            _copy(Path(path), target / "lib" / library)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source.resolve(), target)
