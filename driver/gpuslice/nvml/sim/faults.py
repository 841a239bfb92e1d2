"""Injected faults (cues) and XID events of the simulated node: files in its folder, so that any process can create them.

cues/<id>.json      a fault and the call that it hits; removing the file withdraws the fault and ends its hang
cues/<id>.<n>.hung  exists while a call hangs on this cue
events/<n>.json     the raised XIDs, in order; a reboot keeps them; a reader gets only XIDs after its first call
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from gpuslice.core.model import GpuUuid
from gpuslice.errors import ConfigError
from gpuslice.nvml.api import Code, XidEvent
from gpuslice.system.files import locked, remove, write_atomic
from gpuslice.system.folder_watch import FolderWatch

_ANYWHERE = frozenset({Code.UNINITIALIZED, Code.INVALID_ARGUMENT, Code.NOT_SUPPORTED, Code.GPU_IS_LOST, Code.UNKNOWN})
_CHANGE = _ANYWHERE | {Code.NO_PERMISSION, Code.IN_USE}
_INSTANCE = _CHANGE | {Code.NOT_FOUND}

# The codes that nvml.h documents for the functions behind each verb. A cue with another code is refused, because no real
# node returns it.
CODES: Mapping[str, frozenset[Code]] = {
    "start": frozenset({Code.DRIVER_NOT_LOADED, Code.NO_PERMISSION, Code.LIB_RM_VERSION_MISMATCH, Code.UNKNOWN}),
    "gpus": _ANYWHERE | {Code.NO_PERMISSION, Code.NOT_FOUND, Code.DRIVER_NOT_LOADED, Code.LIB_RM_VERSION_MISMATCH},
    "look": _ANYWHERE | {Code.NO_PERMISSION, Code.NOT_FOUND, Code.INSUFFICIENT_SIZE},
    "minor": _ANYWHERE,
    "set_mig_mode": _CHANGE | {Code.RESET_REQUIRED},
    "create_gpu_instance": _CHANGE | {Code.INSUFFICIENT_RESOURCES},
    "create_compute_instance": _INSTANCE | {Code.INSUFFICIENT_RESOURCES},
    "destroy_compute_instance": _INSTANCE,
    "destroy_gpu_instance": _INSTANCE,
    "processes": _ANYWHERE | {Code.NO_PERMISSION, Code.INSUFFICIENT_SIZE},
    "memory": _ANYWHERE | {Code.NO_PERMISSION, Code.NOT_FOUND},
    "compute_mode": _ANYWHERE,
    "set_compute_mode": _ANYWHERE | {Code.NO_PERMISSION},
    # Not from NVML: the output of nvidia-smi is translated to these codes.
    "time_slice": _ANYWHERE | {Code.NO_PERMISSION},
    "set_time_slice": _ANYWHERE | {Code.NO_PERMISSION},
    "wait_event": frozenset({Code.UNINITIALIZED, Code.INVALID_ARGUMENT, Code.GPU_IS_LOST, Code.UNKNOWN}),
}

Effect = Literal["fail", "hang", "lose"]
_KEPT_EVENTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """One planned fault. `call`: a verb of `Nvml` or "*". `gpu`: None for any card. The first `skip` calls succeed, then the
    fault hits `times` calls (None: until withdrawn). `done`: the call takes effect first, and only then fails or hangs."""

    effect: Effect
    call: str = "*"
    gpu: GpuUuid | None = None
    code: int = int(Code.UNKNOWN)
    times: int | None = 1
    skip: int = 0
    done: bool = False

    def check(self) -> None:
        """Check the cue: ConfigError if it can never hit a call."""
        if self.call != "*" and self.call not in CODES:
            raise ConfigError(f"{self.call!r} is not a call of the simulated NVML; use one of {', '.join(CODES)}, or *")
        codes = _ANYWHERE if self.call == "*" else CODES[self.call]
        if self.effect == "fail" and self.code not in codes:
            names = ", ".join(code.name for code in sorted(codes))
            raise ConfigError(f"NVML does not document code {self.code} for {self.call}; use one of {names}")
        if (self.times is not None and self.times < 1) or self.skip < 0:
            raise ConfigError(
                f"a cue skips 0 or more calls and then hits 1 or more, not {self.skip} and {self.times}; change skip or times"
            )

    def meets(self, call: str, gpu: GpuUuid | None, done: bool) -> bool:
        calls = (call,) if call == "start" else ("*", call)  # "*" means any call on a started node
        return self.call in calls and self.gpu in (None, gpu) and self.done == done


class Cues:
    """The folder of cues. `close` ends the hangs of this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = folder.parent / "cues.lock"  # its mtime grows with each new cue
        with locked(self._lock):  # created if missing; its mtime stays
            pass
        self._none_at: int | None = None  # at this mtime, no cue was pending
        self._hanging: set[int] = set()  # one eventfd(2) for each hang of this process
        self._guard = threading.Lock()
        self._closed = False

    def add(self, cue: Cue) -> str:
        cue.check()
        name = str(uuid.uuid4())
        with locked(self._lock):
            self._put(name, cue)
            after = max(time.time_ns(), self._added_at() + 1)
            os.utime(self._lock, ns=(after, after))
        return name

    def withdraw(self, name: str | None) -> None:
        """Remove one cue, or all cues with None; calls that hang on it return."""
        with locked(self._lock):
            for file in self._folder.glob("*.json") if name is None else [self._folder / f"{name}.json"]:
                remove(file)

    def pending(self) -> dict[str, Cue]:
        """Cues that are planned or in effect, by name."""
        added_at = self._added_at()
        if added_at == self._none_at:
            return {}
        found = self._found()
        self._none_at = None if found else added_at  # read before the folder, so that a cue added in between counts
        return found

    def _added_at(self) -> int:
        return os.stat(self._lock).st_mtime_ns  # noqa: PTH116  each simulated call begins here

    def _found(self) -> dict[str, Cue]:
        names = (name[:-5] for name in os.listdir(self._folder) if name.endswith(".json") and name[0] != ".")  # noqa: PTH208
        return {name: cue for name in sorted(names) if (cue := self._get(name)) is not None}

    def take(self, call: str, gpu: GpuUuid | None, done: bool) -> tuple[str, Cue] | None:
        """The cue that hits this call; it is counted as used. A hang stays until it is withdrawn."""
        if not any(cue.meets(call, gpu, done) for cue in self.pending().values()):
            return None
        with locked(self._lock):
            for name, cue in self.pending().items():
                if cue.meets(call, gpu, done) and self._use(name, cue):
                    return name, cue
        return None

    def _use(self, name: str, cue: Cue) -> bool:
        if cue.skip:
            self._put(name, replace(cue, skip=cue.skip - 1))
            return False
        if cue.times == 0:
            return False
        if cue.times is not None and (cue.times > 1 or cue.effect == "hang"):
            self._put(name, replace(cue, times=cue.times - 1))
        elif cue.times is not None:
            remove(self._folder / f"{name}.json")
        return True

    def hang(self, name: str) -> bool:
        """Block until the cue is withdrawn. False if this process closed the node instead."""
        mark = self._folder / f"{name}.{os.getpid()}-{uuid.uuid4().hex}.hung"
        with contextlib.closing(FolderWatch(self._folder)) as watch, self._closing() as closing:
            try:
                write_atomic(mark, "")
                while (self._folder / f"{name}.json").exists():
                    if closing in select.select([watch.fileno(), closing], [], [])[0]:
                        return False
                    watch.read()
                return True
            finally:
                remove(mark)

    @contextlib.contextmanager
    def _closing(self) -> Iterator[int]:
        """A descriptor that becomes readable when this process closes the node."""
        with self._guard:
            descriptor = os.eventfd(int(self._closed), os.EFD_CLOEXEC)
            self._hanging.add(descriptor)
        try:
            yield descriptor
        finally:
            with self._guard:
                self._hanging.remove(descriptor)
                os.close(descriptor)

    def wait_hung(self, name: str, timeout_s: float) -> bool:
        """Block until a call hangs on this cue; False after the timeout."""
        with contextlib.closing(FolderWatch(self._folder, arrivals=True)) as watch:
            until = time.monotonic() + timeout_s
            while not any(self._folder.glob(f"{name}.*.hung")):
                left = until - time.monotonic()
                if left <= 0 or not select.select([watch.fileno()], [], [], left)[0]:
                    return False
                watch.read()
            return True

    def close(self) -> None:
        with self._guard:
            self._closed = True
            for descriptor in self._hanging:
                os.eventfd_write(descriptor, 1)

    def _put(self, name: str, cue: Cue) -> None:
        write_atomic(self._folder / f"{name}.json", json.dumps(asdict(cue)) + "\n")

    def _get(self, name: str) -> Cue | None:
        try:
            return Cue(**json.loads((self._folder / f"{name}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


class Events:
    """The folder of XID events. `next` has one caller, and returns only events after its first call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = folder.parent / "events.lock"
        self._seen = 0
        self._watch: FolderWatch | None = None
        self._waiting = threading.Lock()
        self._closing = -1  # an eventfd(2) from the first call on

    def add(self, event: XidEvent) -> None:
        with locked(self._lock):
            numbers = list(self._numbers())
            number = numbers[-1] + 1 if numbers else 1
            write_atomic(self._folder / f"{number}.json", json.dumps(asdict(event)) + "\n")
            for old in numbers[:-_KEPT_EVENTS]:
                remove(self._folder / f"{old}.json")

    def subscribe(self) -> None:
        """Start to collect events. A second call does nothing."""
        if self._watch is None:
            self._watch = FolderWatch(self._folder, arrivals=True)
            self._closing = os.eventfd(0, os.EFD_CLOEXEC)
            self._seen = max(self._numbers(), default=0)

    def next(self, timeout_s: float) -> XidEvent | None:
        """The next event. None after the timeout, or if the node is closed in the meantime."""
        with self._waiting:
            self.subscribe()
            return None if self._closing < 0 else self._next(time.monotonic() + timeout_s)

    def _next(self, until: float) -> XidEvent | None:
        assert self._watch is not None
        while True:
            for number in self._numbers():
                if number > self._seen and (event := self._get(number)) is not None:
                    self._seen = number
                    return event
            left = until - time.monotonic()
            ready = select.select([self._watch.fileno(), self._closing], [], [], left)[0] if left > 0 else []
            if not ready or self._closing in ready:
                return None
            self._watch.read()

    def close(self) -> None:
        """End the wait of `next`, then close the folder. Do not call `next` again."""
        if self._watch is not None and self._closing >= 0:
            os.eventfd_write(self._closing, 1)
            with self._waiting:
                self._watch.close()
                os.close(self._closing)
                self._closing = -1

    def _numbers(self) -> Iterator[int]:
        return iter(sorted(int(file.stem) for file in self._folder.glob("*.json") if file.stem.isdigit()))

    def _get(self, number: int) -> XidEvent | None:
        try:
            return XidEvent(**json.loads((self._folder / f"{number}.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
