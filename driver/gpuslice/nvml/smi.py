"""Functions that only nvidia-smi has: NVML has no call for the time slice (NVIDIA's own driver runs nvidia-smi, too).

Its output format may change, so the level is the word after "Timeslice", in any layout.
"""

from __future__ import annotations

import re
from pathlib import Path

from gpuslice.core.model import INTERVALS, GpuUuid
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import Code
from gpuslice.system import programs

_LEVEL = re.compile(rf"time-?\s?slice\b[^a-z]*\b({'|'.join(INTERVALS)})\b", re.IGNORECASE)
_TIMEOUT_S = 20.0  # nvidia-smi opens a session of its own: seconds if nothing else keeps the driver loaded
# Output of nvidia-smi, and NVML's code for it.
_CODES = (
    ("not supported", Code.NOT_SUPPORTED),
    ("insufficient permissions", Code.NO_PERMISSION),
    ("no permission", Code.NO_PERMISSION),
    ("not found", Code.NOT_FOUND),
    ("no devices were found", Code.NOT_FOUND),
    ("gpu is lost", Code.GPU_IS_LOST),
)


class Smi:
    """`nvidia-smi compute-policy` of one driver root. `library`: the libnvidia-ml for it (None: its own)."""

    def __init__(self, driver_root: Path | None, library: Path | None) -> None:
        self._root = driver_root or Path("/")
        self._env = {} if library is None or self._root == Path("/") else {"LD_PRELOAD": str(library)}

    def time_slice(self, gpu: GpuUuid, label: str) -> int:
        """The present level, an index of INTERVALS."""
        text = self._policy(gpu, label, "read its time slice", "--list")
        if (level := _level(text)) is None:
            raise DeviceError(
                f"{label}: nvidia-smi does not say which time slice is set: {_line(text)!r}", Code.UNKNOWN
            )
        return level

    def set_time_slice(self, gpu: GpuUuid, label: str, level: int) -> None:
        """Set the level and read it back. Another level is an error. An unreadable list is no error, because it proves
        nothing."""
        what = f"set time slice {level}"
        self._policy(gpu, label, what, f"--set-timeslice={level}")
        shown = _level(self._policy(gpu, label, what, "--list"))
        if shown not in (None, level):
            raise DeviceError(
                f"{label}: nvidia-smi accepted time slice {INTERVALS[level]} and then shows {INTERVALS[shown or 0]}; "
                f"check for another program that sets it",
                Code.UNKNOWN,
            )

    def _policy(self, gpu: GpuUuid, label: str, what: str, option: str) -> str:
        try:
            program = programs.find(self._root, "nvidia-smi")
        except DeviceError as e:
            raise DeviceError(f"{label}: cannot {what}: {e}", Code.LIBRARY_NOT_FOUND) from e
        status, text = programs.run(
            [str(program), "compute-policy", "-i", gpu, option], timeout_s=_TIMEOUT_S, env=self._env
        )
        code = next((code for phrase, code in _CODES if phrase in text.lower()), Code.UNKNOWN)
        # Its exit status is not documented, so a printed refusal counts as a failure too.
        if status or code == Code.NOT_SUPPORTED:
            raise DeviceError(
                f"{label}: cannot {what}: {code.name}; nvidia-smi compute-policy says {_line(text)!r}", code
            )
        return text


def _level(text: str) -> int | None:
    match = _LEVEL.search(text)
    return INTERVALS.index(match[1].lower()) if match else None


def _line(text: str) -> str:
    """The first line that is not empty."""
    return next((line.strip("| ").strip() for line in text.splitlines() if re.search(r"\w", line)), "nothing")
