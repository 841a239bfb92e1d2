"""`hack/gpu run`: install from the packed folder, without a network, and run the stages one after the other.

Each stage is a process of its own with a time limit. Its results are on disk when it ends. The most valuable stages come
first, because the machine may be taken away early.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hack.lib.gpu import bundle, driver
from hack.lib.gpu.bundle import PROGRAMS, SITE
from hack.lib.gpu.errors import GpuError
from hack.lib.gpu.results import Results

LOG = "log.txt"
_GRACE_S = 5.0  # between SIGTERM and SIGKILL of a stage that is too slow

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class StageSpec:
    name: str
    limit_s: float
    programs: bool = False  # whether it needs the packed programs


STAGES = (
    StageSpec("machine", 15),
    StageSpec("facts", 30),
    StageSpec("stack", 190, programs=True),
    StageSpec("mps", 90),
    StageSpec("contract", 45),
    StageSpec("cdi", 20),
    StageSpec("sharing", 30),
    StageSpec("times", 40),
)


def run(folder: Path, out: Path | None, only: str, driver_root: Path | None, say: Say) -> int:
    """Run the stages. 0 if each one ran to its end. GpuError if no stage can run."""
    about = bundle.read(folder)
    chosen = _chosen(only)
    target = (out or Path(os.environ.get("OUT") or folder / "results")).resolve()
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("*"):
        old.unlink()
    site_archive, programs_archive = (bundle.archive(folder, about, part) for part in (SITE, PROGRAMS))
    assert site_archive is not None
    with tempfile.TemporaryDirectory(prefix="gpuslice-gpu-") as work:
        site, programs = Path(work, SITE), Path(work, PROGRAMS)
        begun = time.monotonic()
        bundle.unpack(site_archive, site)
        say(f"pack {about.revision} for Python {', '.join(about.pythons)}; packages unpacked, {_since(begun)}")
        unpacking = _Unpacking(programs_archive, programs)
        root = driver_root or driver.find_root()
        say(f"NVIDIA driver root: {root or 'none found'}")
        codes = []
        for stage in chosen:
            there = unpacking.wait() if stage.programs else unpacking.ready()
            codes.append(run_stage(stage, site, programs if there else None, root, target, say))
        say(f"the results are in {target}, {_since(begun)} in all; hack/gpu report {target} shows them")
    return 1 if any(codes) else 0


def _chosen(only: str) -> tuple[StageSpec, ...]:
    known = {stage.name: stage for stage in STAGES}
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise GpuError(f"there is no stage {name!r}; there are {', '.join(known)}")
    return tuple(stage for stage in STAGES if not names or stage.name in names)


class _Unpacking:
    """Unpacks the large archive while the first stages run."""

    def __init__(self, archive: Path | None, target: Path) -> None:
        self._done = threading.Event()
        self._there = False
        self._thread = threading.Thread(target=self._unpack, args=(archive, target), daemon=True)
        self._thread.start()

    def _unpack(self, archive: Path | None, target: Path) -> None:
        try:
            if archive is not None:
                bundle.unpack(archive, target)
                bundle.lay_out_programs(target)
                self._there = True
        finally:
            self._done.set()

    def ready(self) -> bool:
        return self._done.is_set() and self._there

    def wait(self) -> bool:
        self._done.wait()
        return self._there


def run_stage(stage: StageSpec, site: Path, programs: Path | None, root: Path | None, out: Path, say: Say) -> int:
    """Run one stage to its end or to its time limit. Returns its exit code. Its results are in `out` then."""
    results = Results(out, stage.name)
    if stage.programs and programs is None:
        results.leave_out(
            "the stage runs", "this pack has no programs; make it again with hack/gpu pack without --facts"
        )
        return 0
    begun = time.monotonic()
    say(f"stage {stage.name}, at most {stage.limit_s:.0f} s")
    environment = bundle.environment(site, programs) | _given(root, programs, out)
    log = out / LOG
    with log.open("ab") as file:
        file.write(f"==== {stage.name}\n".encode())
        file.flush()
        command = [sys.executable, "-m", "hack.lib.gpu.stages", stage.name]
        process = subprocess.Popen(
            command,
            cwd=bundle.TREE,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        code = _end(process, stage.limit_s)
    if code:
        ended = (
            f"it took longer than {stage.limit_s:.0f} s" if code == -signal.SIGTERM else f"it ended with status {code}"
        )
        results.check("the stage ran to its end", False, f"{ended}; see {LOG}")
    say(f"stage {stage.name}: {'done' if code == 0 else 'not finished'}, {_since(begun)}")
    return code


def _end(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """The exit code of the process; negative if it was too slow."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(limit_s)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
            break
    return -signal.SIGTERM


def _given(root: Path | None, programs: Path | None, out: Path) -> dict[str, str]:
    return {
        "GPU_DRIVER_ROOT": str(root or ""),
        "GPU_PROGRAMS": str(programs or ""),
        "GPU_OUT": str(out),
        "DRIVER_ROOT_CTR_PATH": str(root or "/"),
        "NVIDIA_DRIVER_ROOT": str(root or "/"),
    }


def _since(begun: float) -> str:
    return f"{time.monotonic() - begun:.1f} s"
