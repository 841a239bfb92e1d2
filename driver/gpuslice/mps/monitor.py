"""Keeps one daemon equal to its spec: a thread waits for the end of the process, checks it regularly, and restarts it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from gpuslice.errors import DeviceError, DriverError, HungError
from gpuslice.mps import daemon as daemons
from gpuslice.mps.api import DaemonSpec, DaemonStatus
from gpuslice.mps.daemon import MpsDaemon, Timeouts
from gpuslice.mps.paths import Paths
from gpuslice.mps.process import Wakeup, wait
from gpuslice.system.files import write_atomic
from gpuslice.system.threads import ThreadWatch

log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0
_AGAIN_S = 1.0


class GoneError(DeviceError):
    """The monitor was stopped in the meantime; the caller may make a new one."""


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """The state for readers, replaced as a whole. Without a process the daemon is down and has to start again."""

    daemon: DaemonSpec
    process: MpsDaemon | None
    running: DaemonStatus

    def well(self, daemon: DaemonSpec) -> bool:
        """Whether the daemon runs with this spec and without a problem."""
        same = self.daemon == daemon and not self.running.problem
        return same and self.process is not None and not self.process.pidfd.ended()


def pause_s(failures: int) -> float:
    """The pause before a start. The first start after a healthy daemon is at once; then the pauses double."""
    return min(_LONGEST_PAUSE_S, 2.0 ** (failures - 1)) if failures else 0.0


class DaemonMonitor:
    """Keeps one daemon running. A read of `running` never waits. Only one change runs at a time."""

    def __init__(
        self, paths: Paths, key: str, command: Sequence[str], timeouts: Timeouts, threads: ThreadWatch
    ) -> None:
        self._paths, self._key, self._command, self._timeouts = paths, key, command, timeouts
        self._turn = threading.Lock()
        self._state: _Snapshot | None = None
        self._failures = 0  # ends and failed starts since the last check without a problem
        self._why = ""  # the last problem: one clause of a sentence
        self._due = 0.0  # time.monotonic() of the next probe, or start
        self._retired = threading.Event()
        self._wakeup = Wakeup()
        self._threads, self._watching = threads, False

    # ------------------------------------------------------------ what the driver asks

    @property
    def running(self) -> DaemonStatus | None:
        state = self._state
        return state.running if state else None

    @property
    def gone(self) -> bool:
        """Stopped, or never started."""
        return self._retired.is_set()

    def ensure(self, daemon: DaemonSpec) -> DaemonStatus:
        """Make the daemon run with this spec. Returns at once if it does. If the first start fails, nothing is left."""
        state = self._state
        if state and state.well(daemon):
            return state.running
        with self._turn:
            if self._retired.is_set():
                raise GoneError(f"MPS daemon {self._key} is stopping; try again")
            try:
                return self._ensure(daemon)
            finally:
                if self._state is None:
                    self._end_failed_start()

    def _ensure(self, daemon: DaemonSpec) -> DaemonStatus:
        state = self._state
        process = state.process if state else None
        restarts = state.running.restarts if state else 0
        if state and (process is None or process.pidfd.ended()):
            restarts += 1
        if state and process and not process.pidfd.ended() and state.daemon.device == daemon.device:
            self._limit(state, process, daemon)
        else:
            process = self._replace(state, daemon)
        self._failures, self._why = 0, ""
        return self._show(daemon, process, restarts, "")

    def _limit(self, state: _Snapshot, process: MpsDaemon, daemon: DaemonSpec) -> None:
        try:
            process.limit(daemon)
            daemons.remember(self._paths, daemon, process)
        except HungError:
            self._due = 0.0  # the watch checks now, and replaces the daemon
            self._wakeup.set()
            raise
        except DriverError as e:
            # The status shows the problem, so that the next `ensure` does not take the daemon for well.
            self._show(state.daemon, process, state.running.restarts, str(e))
            raise

    def _replace(self, state: _Snapshot | None, daemon: DaemonSpec) -> MpsDaemon:
        if state and state.process:
            how = state.process.stop()
            log.info("an MPS daemon %s, and a new one replaces it key=%s device=%s", how, self._key, daemon.device)
        self._failures += 1
        try:
            process = daemons.start(self._paths, daemon, self._command, self._timeouts.answer_s)
        except DriverError as e:
            if state:
                self._why = f"the MPS daemon of {daemon.device} cannot be started"
                self._down(daemon, state.running.restarts, f": {e}")
            raise
        log.info("started an MPS daemon key=%s device=%s pid=%d", self._key, daemon.device, process.pid)
        return process

    def adopt(self) -> None:
        """Adopt the daemon of a former supervisor; start it again if it ended. DeviceError if there is none to adopt."""
        with self._turn:
            daemon, process = daemons.adopt(self._paths, self._key, self._command, self._timeouts.answer_s)
            if process is None:
                self._why = f"the MPS daemon of {daemon.device} ended while no supervisor ran"
                self._start_again(daemon, 0)
                return
            problem = ""
            try:
                if process.ceilings != (daemon.memory_mib, daemon.threads_percent):
                    process.limit(daemon)
            except DeviceError as e:
                problem = str(e)
            self._show(daemon, process, 0, problem)
            log.info(
                "adopted an MPS daemon of a former supervisor key=%s pid=%d problem=%r", self._key, process.pid, problem
            )

    def stop(self) -> None:
        """Drain and end the daemon, and remove its folder."""
        with self._turn:
            if not self._retired.is_set():
                self._end()
                daemons.remove(self._paths, self._key)

    def close(self) -> None:
        """Drain and end the daemon because the supervisor ends. Its folder stays, because containers have it mounted.

        The folder says that the daemon has ended, so that claims can be unprepared while no supervisor runs.
        """
        with self._turn:
            if not self._retired.is_set():
                self._end()
                try:
                    write_atomic(self._paths.ended(self._key), "")
                except DriverError as e:
                    log.warning(
                        "claims of an MPS daemon are not unprepared without a supervisor key=%s: %s", self._key, e
                    )

    def _end(self) -> None:
        self._retire()
        if self._state and self._state.process:
            how = self._state.process.stop()
            log.info("stopped an MPS daemon key=%s: it %s", self._key, how)

    def _end_failed_start(self) -> None:
        self._retire()
        with suppress(DeviceError):  # the first failure is the one to report
            daemons.remove(self._paths, self._key)

    def _retire(self) -> None:
        self._retired.set()
        self._wakeup.set()

    # ------------------------------------------------------------ what readers see

    def _show(self, daemon: DaemonSpec, process: MpsDaemon, restarts: int, problem: str) -> DaemonStatus:
        running = self._status(daemon, process, restarts, problem)
        self._set(_Snapshot(daemon, process, running), self._timeouts.probe_s)
        return running

    def _down(self, daemon: DaemonSpec, restarts: int, more: str) -> None:
        """Record that nothing runs. The next start comes after a pause."""
        pause = pause_s(self._failures)
        problem = f"{self._why}{more}; it is started again in {pause:g} s"
        self._set(_Snapshot(daemon, None, self._status(daemon, None, restarts, problem)), pause)
        log.error("an MPS daemon is down key=%s: %s", self._key, problem)

    def _status(self, daemon: DaemonSpec, process: MpsDaemon | None, restarts: int, problem: str) -> DaemonStatus:
        memory_mib, threads_percent = process.ceilings if process else (None, None)
        return DaemonStatus(
            key=self._key,
            device=daemon.device,
            pid=process.pid if process else 0,
            memory_mib=memory_mib,
            threads_percent=threads_percent,
            restarts=restarts,
            problem=problem,
        )

    def _set(self, state: _Snapshot, due_s: float) -> None:
        self._due = time.monotonic() + due_s
        self._state = state
        if not self._watching:
            self._watching = True
            self._threads.start(f"mps-{self._key}", self._watch, over=self._retired.is_set)
        self._wakeup.set()  # the thread waits for another process now

    # ------------------------------------------------------------ the watch

    def _watch(self) -> None:
        while not self._retired.is_set():
            try:
                self._wait_and_check()
            except Exception:
                # No descriptors, no memory, a bug: if the thread ended, nothing would keep the daemon running.
                log.exception("the check of an MPS daemon failed; the next try is in %g s key=%s", _AGAIN_S, self._key)
                self._retired.wait(_AGAIN_S)

    def _wait_and_check(self) -> None:
        state = self._state
        assert state is not None, "the thread starts with the first state"
        process = (state.process.pidfd.descriptor,) if state.process else ()
        wait(max(0.0, self._due - time.monotonic()), self._wakeup.descriptor, *process)
        if self._wakeup.clear():
            return
        with self._turn:
            if not self._retired.is_set() and self._state is state:
                self._check(state)

    def _check(self, state: _Snapshot) -> None:
        process, restarts = state.process, state.running.restarts
        if process is None:
            self._start_again(state.daemon, restarts)
            return
        wrong, hung = self._probe(process)
        ended = process.pidfd.ended()
        if not (wrong or ended):
            self._failures = 0
            self._due = time.monotonic() + self._timeouts.probe_s
            return
        how = process.stop(drain=not hung)
        self._why = f"the MPS daemon of {state.daemon.device} {how}" if ended else wrong
        log.warning("an MPS daemon failed and is replaced key=%s pid=%d: %s", self._key, process.pid, self._why)
        if self._failures:
            self._down(state.daemon, restarts, "")
        else:
            self._start_again(state.daemon, restarts)

    def _probe(self, process: MpsDaemon) -> tuple[str, bool]:
        """The problem of the daemon, "" if it is well or has ended; and whether no command can reach it."""
        if process.pidfd.ended():
            return "", True
        try:
            return process.probe(), False
        except DeviceError as e:
            return str(e), True

    def _start_again(self, daemon: DaemonSpec, restarts: int) -> None:
        """Start the daemon again at the same paths, because containers have them mounted."""
        self._failures += 1
        try:
            process = daemons.start(self._paths, daemon, self._command, self._timeouts.answer_s)
        except DriverError as e:
            self._down(daemon, restarts, f", and it cannot be started again: {e}")
            return
        self._show(daemon, process, restarts + 1, f"{self._why}; it was started again, and its clients were lost")
        log.warning("an MPS daemon was started again key=%s pid=%d: %s", self._key, process.pid, self._why)
