"""The process that owns the MPS daemons: `gpuslice mps-supervisor`. It speaks wire.py on `<root>/supervisor.sock`.

Each root has one supervisor. A second one is refused and does not wait: a silent wait would hide the wrong configuration,
and the kubelet or systemd starts it again anyway.

SIGTERM drains and ends all daemons, but leaves their folders: containers have them mounted, and the next supervisor starts
the daemons in them again. SIGKILL or a crash leaves the daemons running, unless the container or unit ends them too. The
next supervisor adopts them, and their clients notice nothing.

It must stay small, because it is resident on every node: no event loop, no gRPC, no Kubernetes, no Prometheus, no YAML.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from gpuslice import __version__
from gpuslice.core.json import UncheckedBody
from gpuslice.errors import DeviceError, DriverError
from gpuslice.mps import daemon as daemons
from gpuslice.mps import wire
from gpuslice.mps.api import DaemonSpec, DaemonStatus
from gpuslice.mps.daemon import Timeouts
from gpuslice.mps.monitor import DaemonMonitor, GoneError
from gpuslice.mps.paths import Paths
from gpuslice.system import files, logs, refusals
from gpuslice.system.threads import ThreadWatch

log = logging.getLogger(__name__)

_TIMEOUTS = Timeouts()
_TALK_S = 10.0  # time for a client to send its request
_NO_ACCEPT_S = 0.5
_PROGRAM_PERIOD_S = 2.0  # between two looks for a control program that was missing at the start
_BACKLOG = 64
_FAILED = 1  # cli.py: the command ran and failed


class Supervisor:
    """The daemons of one root, and the socket. `open` adopts, then listens. `close` ends the daemons of this supervisor."""

    def __init__(
        self,
        root: Path,
        command: Sequence[str],
        *,
        timeouts: Timeouts = _TIMEOUTS,
        threads: ThreadWatch | None = None,
        missing: str = "",
    ) -> None:
        """`missing`: why there is no `command` yet. `stop` works without it. `ensure` works after `equip`."""
        self._paths, self._command, self._timeouts = Paths(root), command, timeouts
        self.incarnation = str(uuid.uuid4())
        self._monitors: dict[str, DaemonMonitor] = {}
        self._lock = threading.Lock()  # only for the dict; never held during an action
        self._closing = threading.Event()
        self._threads, self._missing = threads or ThreadWatch(), missing

    def open(self) -> None:
        """Adopt the daemons that run, then listen. DriverError if the root is unusable or another supervisor serves it."""
        root = self._paths.root
        self._paths.check_socket()
        files.ensure_folder(root, 0o711)
        lock = files.try_lock(root / "supervisor.lock")
        if lock is None:
            raise DeviceError(f"another MPS supervisor serves {root}; stop that one first, or use another root")
        self._root_lock = lock
        try:
            if not self._missing:
                self._adopt()
            with refusals.translated("listen on", self._paths.socket):
                self._listener = _listener(self._paths.socket)
        except DriverError:
            os.close(lock)
            raise
        self._threads.start("mps-accept", self._accept, over=self._closing.is_set)

    def close(self) -> None:
        """Drain and end all daemons at the same time. Their folders stay."""
        self._closing.set()
        with contextlib.suppress(OSError):  # the next supervisor replaces the socket
            self._paths.socket.unlink(missing_ok=True)
        self._listener.shutdown(socket.SHUT_RDWR)  # `close` alone would not wake the accepting thread
        self._listener.close()
        with self._lock:
            monitors = list(self._monitors.values())
        _at_once(monitor.close for monitor in monitors)
        os.close(self._root_lock)

    def equip(self, command: Sequence[str]) -> None:
        """Take the control program that was missing at the start, and adopt the daemons that run."""
        self._command = command
        self._adopt()
        self._missing = ""

    def _adopt(self) -> None:
        """Adopt the running daemons before the first request. A daemon that is not adopted would seem to be gone."""
        _at_once(partial(self._adopt_one, key) for key in self._paths.known())

    def _adopt_one(self, key: str) -> None:
        monitor = self._monitor(key)
        try:
            monitor.adopt()
        except Exception as e:  # one odd folder must not stop the adoption of the other daemons
            if not isinstance(e, DriverError):
                log.exception("the adoption of an MPS daemon failed unexpectedly key=%s", key)
            self._forget(key, monitor)
            log.warning("cannot adopt the MPS daemon of a former supervisor, so it is ended key=%s: %s", key, e)
            try:
                daemons.clear(self._paths, key)
            except DriverError as error:
                log.warning("cannot remove the folder of an MPS daemon key=%s: %s", key, error)

    def _monitor(self, key: str) -> DaemonMonitor:
        with self._lock:
            if self._closing.is_set():
                raise DeviceError("the MPS supervisor is ending; try again when the next one runs")
            if key not in self._monitors:
                self._monitors[key] = DaemonMonitor(self._paths, key, self._command, self._timeouts, self._threads)
            return self._monitors[key]

    def _forget(self, key: str, monitor: DaemonMonitor) -> None:
        with self._lock:
            if self._monitors.get(key) is monitor:
                del self._monitors[key]

    # ------------------------------------------------------------ requests of a driver

    def ensure(self, daemon: DaemonSpec) -> DaemonStatus:
        self._paths.check(daemon.key)
        if self._missing:
            raise DeviceError(f"cannot start an MPS daemon yet: {self._missing}")
        while True:
            monitor = self._monitor(daemon.key)
            try:
                return monitor.ensure(daemon)
            except GoneError:
                continue  # the old monitor was stopping; a new one starts the daemon again
            finally:
                if monitor.gone:
                    self._forget(daemon.key, monitor)

    def stop(self, key: str) -> None:
        self._paths.check(key)
        with self._lock:
            monitor = self._monitors.get(key)
        if monitor is None:
            daemons.discard(self._paths, key)  # the rest of a failed removal, or a daemon that is not adopted yet
            return
        try:
            monitor.stop()
        finally:
            self._forget(key, monitor)  # the daemon is gone, even if its folder stays

    def statuses(self) -> tuple[DaemonStatus, ...]:
        with self._lock:
            monitors = sorted(self._monitors.items())
        return tuple(running for _, monitor in monitors if (running := monitor.running) is not None)

    # ------------------------------------------------------------ the socket

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                connection, _ = self._listener.accept()
                connection.settimeout(_TALK_S)
                threading.Thread(target=self._talk, args=(connection,), name="mps-talk", daemon=True).start()
            except Exception as e:  # noqa: BLE001 - if this thread ended, no driver would get an answer
                # Out of descriptors or threads: the client still waits, so a try at once would only use CPU time.
                if not self._closing.wait(_NO_ACCEPT_S):
                    log.error("the MPS supervisor cannot accept a connection socket=%s: %r", self._paths.socket, e)

    def _talk(self, connection: socket.socket) -> None:
        """One greeting, one request. Each in its own thread, so that a slow client does not block others."""
        try:
            with connection, connection.makefile("rwb") as stream:
                wire.write(stream, self._converse(stream))
        except TimeoutError:
            log.warning("a client connected to the MPS supervisor and sent no request within %g s", _TALK_S)
        except OSError as e:
            log.info("a client of the MPS supervisor closed its connection before the answer: %s", e)

    def _converse(self, stream: wire.Stream) -> UncheckedBody:
        try:
            greeting = wire.read(stream) or {}
            if wire.GREETING not in greeting:
                raise ValueError(f"no greeting: {json.dumps(greeting)[:40]}")
            theirs = greeting[wire.GREETING]
            version = wire.common(theirs)
            if version is None:
                return {"error": wire.disagreement(theirs, str(greeting.get("release", "of unknown release")))}
            wire.write(
                stream,
                {
                    wire.GREETING: list(wire.VERSIONS),
                    "version": version,
                    "incarnation": self.incarnation,
                    "release": __version__,
                },
            )
            request = wire.read(stream)
            return {} if request is None else self._answer(request)
        except ValueError as e:
            return {
                "error": (
                    f"the MPS supervisor does not understand the request ({e}); update the older one of driver and "
                    "supervisor"
                )
            }

    def _answer(self, request: UncheckedBody) -> UncheckedBody:
        try:
            running = self._obey(request)
        except (DriverError, OSError) as error:
            e = refusals.untranslated(error) if isinstance(error, OSError) else error
            log.error("refused a request to the MPS supervisor op=%s: %s", request.get("op"), e)
            return {"error": str(e)}
        except Exception as e:
            log.exception("a request to the MPS supervisor failed unexpectedly op=%s", request.get("op"))
            return {"error": f"the MPS supervisor failed unexpectedly ({type(e).__name__}: {e}); see its log"}
        return {"running": [wire.running_body(one) for one in running]}

    def _obey(self, request: UncheckedBody) -> Sequence[DaemonStatus]:
        match request.get("op"):
            case "hello":
                return ()
            case "running":
                return self.statuses()
            case "ensure":
                return (self.ensure(wire.daemon_of(request.get("daemon"))),)
            case "stop":
                self.stop(str(request.get("key")))
                return ()
            case other:
                raise DeviceError(
                    f"the MPS supervisor does not know operation {json.dumps(other)}; update the supervisor, because "
                    "the driver is newer"
                )


def run(root: Path, find: Callable[[], Sequence[str]], level: str = "info") -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit code. `find` returns the command of the control program (control.py).

    The supervisor also serves without the program, because pods with MPS shares must be able to end before an NVIDIA driver
    comes. It looks for the program until it finds it.
    """
    logs.setup(level)
    ended = threading.Event()
    # Handlers and no blocked signals, because the daemons would inherit a mask.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    threads = ThreadWatch(lambda _: ended.set())
    command, missing = _found(find)
    supervisor = Supervisor(root, command, threads=threads, missing=missing)
    if missing:
        log.error("no MPS daemon is started yet: %s", missing)
    try:
        supervisor.open()
    except DriverError as e:
        log.error("%s", e)
        return _FAILED
    log.info("the MPS supervisor serves requests root=%s incarnation=%s", root, supervisor.incarnation)
    while missing and not ended.wait(_PROGRAM_PERIOD_S):
        command, missing = _found(find)
        if not missing:
            supervisor.equip(command)
            log.info("the control program of MPS has come: %s", " ".join(command))
    ended.wait()
    if problem := threads.problem():
        log.error("%s", problem)  # the daemons run on, as after a crash, and the next supervisor adopts them
        return _FAILED
    log.info("the MPS supervisor ends all its daemons and then itself root=%s", root)
    supervisor.close()
    return 0


def _found(find: Callable[[], Sequence[str]]) -> tuple[Sequence[str], str]:
    """The command of the control program, or why there is none."""
    try:
        return find(), ""
    except (DeviceError, OSError) as e:
        return (), str(e)


def _listener(path: Path) -> socket.socket:
    """A socket that listens at `path`. It gets this name last, because a program may connect as soon as it sees the name."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    new = path.with_name(".supervisor")
    try:
        new.unlink(missing_ok=True)
        listener.bind(str(new))
        new.chmod(0o600)
        listener.listen(_BACKLOG)
        new.rename(path)
    except OSError:
        listener.close()
        raise
    return listener


def _at_once(calls: Iterable[Callable[[], None]]) -> None:
    """Run each call in a thread of its own, and wait for all of them. An exception is only logged."""

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            log.exception("a part of the start or the end of the MPS supervisor failed unexpectedly")

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
