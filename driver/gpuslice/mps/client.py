"""The driver's side of the supervisor's socket: a connection for each call, so that nothing is lost when it restarts."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from gpuslice import __version__
from gpuslice.core.json import UncheckedBody
from gpuslice.errors import DeviceError
from gpuslice.mps import wire
from gpuslice.mps.api import DaemonSpec, DaemonStatus
from gpuslice.mps.paths import Paths

_CONNECT_S = 2.0
_ANSWER_S = 2.0  # for requests that start and stop nothing
_CHANGE_S = 25.0  # for all others: a daemon's start, or a drain that ends in a kill, with some reserve


class MpsClient:
    """`MpsDaemons` over `<root>/supervisor.sock`. It has no state; any number of threads may use it."""

    def __init__(self, root: Path) -> None:
        self._paths = Paths(root)

    def ensure(self, daemon: DaemonSpec) -> DaemonStatus:
        self._paths.check(daemon.key)
        message = {"op": "ensure", "daemon": wire.daemon_body(daemon)}
        what = f"ensure the MPS daemon of {daemon.device}"
        for running in self._list(what, message, _CHANGE_S):
            return running
        raise DeviceError(f"cannot {what}: the MPS supervisor answered without a daemon; see its log")

    def stop(self, key: str) -> None:
        """Stop a daemon. If no daemon can run, this succeeds without a supervisor, too: either the folder of the daemon does
        not exist, which is made before any daemon starts, or the folder says that the daemon has ended with its supervisor.

        The next supervisor starts the latter again, and MpsUpkeep stops it, because no claim has it any more.
        """
        try:
            self._list(f"stop MPS daemon {key}", {"op": "stop", "key": key}, _CHANGE_S)
        except DeviceError:
            if self._paths.folder(key).exists() and not self._paths.ended(key).exists():
                raise

    def statuses(self) -> tuple[DaemonStatus, ...]:
        return self._list("list the MPS daemons", {"op": "running"}, _ANSWER_S)

    def seen(self) -> tuple[str, tuple[DaemonStatus, ...]]:
        greeting, answer = self._ask("list the MPS daemons", {"op": "running"}, _ANSWER_S)
        return str(greeting.get("incarnation")), _statuses(answer)

    def incarnation(self) -> str:
        greeting, _ = self._ask("greet it", {"op": "hello"}, _ANSWER_S)
        return str(greeting.get("incarnation"))

    def pipe(self, key: str) -> Path:
        return self._paths.pipe(key)

    def shm(self, key: str) -> Path:
        return self._paths.shm(key)

    def log(self, key: str) -> Path:
        return self._paths.log(key)

    def _list(self, what: str, message: UncheckedBody, timeout_s: float) -> tuple[DaemonStatus, ...]:
        return _statuses(self._ask(what, message, timeout_s)[1])

    def _ask(self, what: str, message: UncheckedBody, timeout_s: float) -> tuple[UncheckedBody, UncheckedBody]:
        """Greeting and answer of the supervisor; `what` completes "cannot …"."""
        path = self._paths.socket
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_CONNECT_S)
                connection.connect(str(path))
                with connection.makefile("rwb") as stream:
                    greeting = _greet(stream)
                    connection.settimeout(timeout_s)
                    wire.write(stream, message)
                    answer = wire.read(stream)
        except TimeoutError as e:
            raise DeviceError(
                f"cannot {what}: the MPS supervisor at {path} did not answer within {timeout_s:g} s; see its log"
            ) from e
        except (OSError, ValueError) as e:
            raise DeviceError(
                f"cannot {what}: no MPS supervisor answers at {path} ({e}); start it: gpuslice mps-supervisor"
            ) from e
        if answer is None:
            raise DeviceError(
                f"cannot {what}: the MPS supervisor at {path} closed the connection without an answer; see its log"
            )
        if "error" in answer:
            raise DeviceError(str(answer["error"]))
        return greeting, answer


def _statuses(answer: UncheckedBody) -> tuple[DaemonStatus, ...]:
    body = answer.get("running")
    return tuple(wire.running_of(entry) for entry in body) if isinstance(body, list) else ()


def _greet(stream: wire.Stream) -> Mapping[str, object]:
    wire.write(stream, {wire.GREETING: list(wire.VERSIONS), "release": __version__})
    greeting = wire.read(stream) or {}
    if "error" in greeting:
        raise DeviceError(str(greeting["error"]))
    if greeting.get("version") not in wire.VERSIONS:
        raise DeviceError(
            wire.disagreement(greeting.get(wire.GREETING), str(greeting.get("release", "of unknown release")))
        )
    return greeting
