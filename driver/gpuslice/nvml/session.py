"""NVML for the rest of the process: the session may be missing, and it may be replaced by a new one.

Without a loaded NVIDIA driver there is no session, and none while the start of NVML hangs. The process serves all the
same: after a reboot pods wait for their unprepare, and NVIDIA's driver container waits for these pods before it loads the
driver. Without a session every verb refuses with the reason, so each card counts as lost.

The start and the end of NVML run in threads of their own (`listing.Attempt`). A thread that hangs is left behind. So a dead
driver hangs neither the start of this process, nor its other calls, nor its end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from gpuslice.core.model import Gpu, GpuUuid, LiveGpu, MigUuid, Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import FOR_GOOD, ComputeMode, GpuProcess, Memory, Nvml, XidEvent
from gpuslice.nvml.listing import LIMIT_S, Attempt
from gpuslice.nvml.pulse import during

log = logging.getLogger(__name__)

_RENEW_S = 10.0  # the shortest time between two new sessions; more of them do not help lost cards
_START_S = 2 * LIMIT_S  # a start takes seconds for each card if nothing else keeps the NVIDIA driver loaded
_END_S = 5.0
_GLANCE_S = 1.0  # the limit of a look whether NVML has come


class Session:
    """`Nvml` over the result of `opener`."""

    def __init__(self, opener: Callable[[], Nvml], *, start_s: float = _START_S, end_s: float = _END_S) -> None:
        """`start_s`, `end_s`: a start or an end of NVML that takes longer counts as hung."""
        self._start_s, self._end_s = start_s, end_s
        self._start = Attempt("the start of NVML", opener)
        self._list = Attempt("the list of this node's GPUs", self.gpus)
        self._ends: list[Attempt[None]] = []  # those that hang
        self._changing = threading.Lock()  # held while NVML starts or ends
        self._lock = threading.Lock()  # guards the fields below; never held during a call
        self._nvml: Nvml | None = None
        self._calls = 0
        self._refusal = DeviceError("NVML has not been started yet")
        self._unlisted = ""
        self._refused: dict[tuple[GpuUuid, str], str] = {}
        self._renewed_at = -_RENEW_S
        self._open(start_s)

    @property
    def hangs(self) -> bool:
        """Whether a start or an end of NVML has not returned. Then only `_exit` ends the process."""
        return self._start.hangs or any(end.hangs for end in self._ends)

    @property
    def problem(self) -> str:
        """The reason why no card can be listed, or "" if cards can be listed."""
        return str(self._refusal) if self._nvml is None else self._unlisted

    def refused(self) -> Mapping[tuple[GpuUuid, str], str]:
        """The settings that a card refused for good in this session, by card and verb, each with NVML's sentence.

        A look does not find every refusal: a card may tell its compute mode and still refuse another one. To try a set would
        change the card under its users. So a new process learns of a refusal from the first claim that fails.
        """
        return dict(self._refused)

    def renew(self) -> bool:
        """Open a new session instead of this one, and list the cards.

        False if there is no session, if a call is under way in it, or if the session is too young.
        """
        with self._changing:
            with self._lock:
                if self._nvml is None or self._calls or time.monotonic() - self._renewed_at < _RENEW_S:
                    return False
                nvml = self._take("NVML is being started anew; the kubelet tries again")
            self._shut(nvml)
            self._open(self._start_s)
            self._renewed_at = time.monotonic()
        self.gpus()  # finds the handles of the cards again
        log.warning("started NVML again, because no card could be read: %s", self.problem or "it answers")
        return True

    def comes(self) -> bool:
        """Whether the cards can be listed now. Starts NVML if necessary. Blocks for two seconds at most."""
        with self._changing:
            if self._nvml is None:
                self._open(_GLANCE_S)
        try:
            self._list.result(_GLANCE_S)
        except DeviceError as e:
            self._unlisted = str(e)
        return not self.problem

    def close(self) -> None:
        with self._lock:
            nvml = self._take("NVML was closed, because the driver ends")
        self._shut(nvml)

    def _open(self, limit_s: float) -> None:
        try:
            self._nvml = self._start.result(limit_s)
        except DeviceError as e:
            self._refusal = e

    def _take(self, refusal: str) -> Nvml | None:
        """The present NVML. From now on no call gets it."""
        nvml, self._nvml = self._nvml, None
        self._refused = {}
        self._refusal = DeviceError(refusal)
        return nvml

    def _shut(self, nvml: Nvml | None) -> None:
        if nvml is None:
            return
        end = Attempt("the end of NVML", nvml.close)
        try:
            end.result(self._end_s)
        except DeviceError as e:
            self._ends.append(end)
            log.error("%s", e)

    @contextlib.contextmanager
    def _call(self, name: str, device: str = "this node") -> Iterator[Nvml]:
        """The present NVML, counted as in use. DeviceError if there is none."""
        with during(f"{name} on {device}"):
            with self._lock:
                nvml = self._nvml
                if nvml is None:
                    raise DeviceError(str(self._refusal), self._refusal.code)
                self._calls += 1
            try:
                yield nvml
            finally:
                with self._lock:
                    self._calls -= 1

    @contextlib.contextmanager
    def _setting(self, verb: str, gpu: GpuUuid, *, on: bool) -> Iterator[Nvml]:
        """As `_call`, for a verb that a claim needs. `on`: False to undo a setting, which MIG mode may refuse."""
        try:
            with self._call(verb, gpu) as nvml:
                yield nvml
        except DeviceError as e:
            if on and e.code in FOR_GOOD:
                self._refused = {**self._refused, (gpu, verb): str(e)}
            raise
        self._refused = {key: text for key, text in self._refused.items() if key != (gpu, verb)}

    # ------------------------------------------------------------ the verbs

    def gpus(self) -> tuple[Gpu, ...]:
        """As `Nvml.gpus`. Empty if the list fails; then `problem` says why."""
        try:
            with self._call("gpus") as nvml:
                found = nvml.gpus()
        except DeviceError as e:
            self._unlisted = str(e)
            return ()
        self._unlisted = ""
        return found

    def lost(self) -> tuple[str, ...]:
        nvml = self._nvml
        return (self.problem,) if nvml is None or self._unlisted else nvml.lost()

    def notes(self) -> tuple[str, ...]:
        nvml = self._nvml
        return () if nvml is None else nvml.notes()

    def look(self, gpu: GpuUuid) -> LiveGpu:
        with self._call("look", gpu) as nvml:
            return nvml.look(gpu)

    def minor(self, gpu: GpuUuid) -> int:
        with self._call("minor", gpu) as nvml:
            return nvml.minor(gpu)

    def set_mig_mode(self, gpu: GpuUuid, on: bool) -> None:
        with self._setting("set_mig_mode", gpu, on=on) as nvml:
            nvml.set_mig_mode(gpu, on)

    def create_gpu_instance(self, gpu: GpuUuid, profile: int, placement: Placement) -> int:
        with self._call("create_gpu_instance", gpu) as nvml:
            return nvml.create_gpu_instance(gpu, profile, placement)

    def create_compute_instance(self, gpu: GpuUuid, gi: int) -> tuple[int, MigUuid]:
        with self._call("create_compute_instance", gpu) as nvml:
            return nvml.create_compute_instance(gpu, gi)

    def destroy_compute_instance(self, gpu: GpuUuid, gi: int, ci: int) -> None:
        with self._call("destroy_compute_instance", gpu) as nvml:
            nvml.destroy_compute_instance(gpu, gi, ci)

    def destroy_gpu_instance(self, gpu: GpuUuid, gi: int) -> None:
        with self._call("destroy_gpu_instance", gpu) as nvml:
            nvml.destroy_gpu_instance(gpu, gi)

    def processes(self, gpu: GpuUuid) -> tuple[GpuProcess, ...]:
        with self._call("processes", gpu) as nvml:
            return nvml.processes(gpu)

    def memory(self, device: GpuUuid | MigUuid) -> Memory:
        with self._call("memory", device) as nvml:
            return nvml.memory(device)

    def compute_mode(self, gpu: GpuUuid) -> ComputeMode:
        with self._call("compute_mode", gpu) as nvml:
            return nvml.compute_mode(gpu)

    def set_compute_mode(self, gpu: GpuUuid, mode: ComputeMode) -> None:
        with self._setting("set_compute_mode", gpu, on=mode != ComputeMode.DEFAULT) as nvml:
            nvml.set_compute_mode(gpu, mode)

    def time_slice(self, gpu: GpuUuid) -> int:
        with self._call("time_slice", gpu) as nvml:
            return nvml.time_slice(gpu)

    def set_time_slice(self, gpu: GpuUuid, level: int) -> None:
        with self._setting("set_time_slice", gpu, on=level > 0) as nvml:
            nvml.set_time_slice(gpu, level)

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        with self._call("wait_event") as nvml:
            return nvml.wait_event(timeout_s)
