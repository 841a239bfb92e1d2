"""NVML for the rest of the process: the session may be missing, and it may be replaced by a new one.

Without a loaded NVIDIA driver there is no session. The process serves nevertheless: after a reboot pods wait for their
unprepare, and NVIDIA's driver container waits for these pods before it loads the driver. Every verb then refuses with the
reason, so that each card counts as lost.

A `Pulse` gets the start and the end of each call. One call that does not return means a hung card. Many calls that take
long together do not.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterator

from gpuslice.core.model import Gpu, GpuUuid, LiveGpu, MigUuid, Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import ComputeMode, GpuProcess, Memory, Nvml, XidEvent

log = logging.getLogger(__name__)

_RENEW_S = 10.0  # the shortest time between two new sessions; more would not help cards that stay lost


class Pulse:
    """The last sign of a thread's calls, and the call in progress. Another thread reads it."""

    def __init__(self) -> None:
        self.beat = time.monotonic()
        self.call = ""

    @contextlib.contextmanager
    def during(self, call: str) -> Iterator[None]:
        self.call, self.beat = call, time.monotonic()
        try:
            yield
        finally:
            self.call, self.beat = "", time.monotonic()

    def listen(self, context: contextvars.Context) -> None:
        """Record the calls that run in this context."""
        context.run(_pulse.set, self)


_pulse: contextvars.ContextVar[Pulse] = contextvars.ContextVar("pulse")


class Session:
    """`Nvml` over the result of `opener`."""

    def __init__(self, opener: Callable[[], Nvml]) -> None:
        self._opener = opener
        self._lock = threading.Lock()
        self._nvml: Nvml | None = None
        self._calls = 0
        self._refusal = DeviceError("NVML has not been started yet")
        self._unlisted = ""
        self._renewed_at = -_RENEW_S
        self._open()

    @property
    def problem(self) -> str:
        """The reason why no card can be listed, or "" if cards can be listed."""
        return str(self._refusal) if self._nvml is None else self._unlisted

    def renew(self) -> bool:
        """Replace this session by a new one and list the cards. False if NVML does not start, if a call runs in this
        session, or if the session is too young."""
        with self._lock:
            if self._nvml is None or self._calls or time.monotonic() - self._renewed_at < _RENEW_S:
                return False
            self._close()
            self._open()
            self._renewed_at = time.monotonic()
        self.gpus()  # finds the handles of the cards again
        log.warning("started NVML again, because no card could be read: %s", self.problem or "it answers")
        return True

    def comes(self) -> bool:
        """Whether the cards can be listed now. Blocks, and starts NVML if it is not started."""
        with self._lock:
            if self._nvml is None:
                self._open()
        self.gpus()
        return not self.problem

    def close(self) -> None:
        with self._lock:
            self._close()

    def _open(self) -> None:
        try:
            self._nvml = self._opener()
        except DeviceError as e:
            self._refusal = e

    def _close(self) -> None:
        self._refusal = DeviceError("NVML was closed, because the driver ends")
        if self._nvml is not None:
            self._nvml.close()
        self._nvml = None

    @contextlib.contextmanager
    def _call(self, name: str, device: str = "this node") -> Iterator[Nvml]:
        """The present NVML, counted as in use. DeviceError if there is none."""
        pulse = _pulse.get(None)
        with contextlib.nullcontext() if pulse is None else pulse.during(f"{name} on {device}"):
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

    # ------------------------------------------------------------ the verbs

    def gpus(self) -> tuple[Gpu, ...]:
        """As `Nvml.gpus`. If nothing can be listed, it is empty and `problem` has the reason."""
        self._unlisted = ""
        try:
            with self._call("gpus") as nvml:
                return nvml.gpus()
        except DeviceError as e:
            self._unlisted = str(e)
        return ()

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
        with self._call("set_mig_mode", gpu) as nvml:
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
        with self._call("set_compute_mode", gpu) as nvml:
            nvml.set_compute_mode(gpu, mode)

    def time_slice(self, gpu: GpuUuid) -> int:
        with self._call("time_slice", gpu) as nvml:
            return nvml.time_slice(gpu)

    def set_time_slice(self, gpu: GpuUuid, level: int) -> None:
        with self._call("set_time_slice", gpu) as nvml:
            nvml.set_time_slice(gpu, level)

    def wait_event(self, timeout_s: float) -> XidEvent | None:
        with self._call("wait_event") as nvml:
            return nvml.wait_event(timeout_s)
