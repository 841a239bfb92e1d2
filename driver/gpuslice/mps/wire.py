"""The protocol of driver and supervisor: one JSON object per line over a unix socket, one request per connection.

    client  {"gpuslice-mps": [1]}                          versions it speaks, any order
    server  {"gpuslice-mps": [1], "version": 1, "incarnation": "…", "release": "0.1.0"}
    client  {"op": "ensure", "daemon": {…}} | {"op": "stop", "key": "…"} | {"op": "running"} | {"op": "hello"}
    server  {"running": [{…}]} | {"error": "one sentence"}

Both sides use the highest common version. Each side also understands the version before its newest one, because the
supervisor is updated rarely and later than the driver. Without a common version, the server answers with one sentence.
Unknown keys are ignored, so that a version may get new keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Protocol

from gpuslice.core.json import UncheckedBody
from gpuslice.core.model import GpuUuid, MigUuid
from gpuslice.errors import DeviceError
from gpuslice.mps.api import DaemonSpec, DaemonStatus

VERSIONS = (1,)
GREETING = "gpuslice-mps"
_LONGEST = 1 << 20  # bytes of a line; the statuses of 128 daemons with problems take 50 kB


class Stream(Protocol):
    """What `socket.makefile("rwb")` returns."""

    def readline(self, size: int, /) -> bytes: ...
    def write(self, data: bytes, /) -> int: ...
    def flush(self) -> None: ...


def write(stream: Stream, message: UncheckedBody) -> None:
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def read(stream: Stream) -> UncheckedBody | None:
    """The next message, or None at the end of the stream. ValueError if a line is not a message."""
    line = stream.readline(_LONGEST)
    if not line:
        return None
    try:
        message = json.loads(line)
    except RecursionError as e:
        raise ValueError("a message of too many levels") from e
    if not line.endswith(b"\n") or not isinstance(message, dict):
        raise ValueError(f"no message: {line[:40]!r}")
    return message


def common(theirs: object, ours: Iterable[int] = VERSIONS) -> int | None:
    """The highest version that both sides have."""
    versions = theirs if isinstance(theirs, list) else []
    return max((version for version in ours if version in versions), default=None)


def disagreement(theirs: object, release: str) -> str:
    """The error text for two sides without a common version. `release` is that of the other side."""
    return (
        f"gpuslice {release} speaks versions {theirs} of the MPS supervisor's protocol, and this side "
        f"{list(VERSIONS)}; update the older one of driver and supervisor"
    )


def daemon_body(daemon: DaemonSpec) -> UncheckedBody:
    return asdict(daemon)


def daemon_of(body: object) -> DaemonSpec:
    """A daemon from a message or from a file of this project. DeviceError if a field is missing or has a wrong value."""
    if not isinstance(body, dict):
        raise DeviceError(f"{body!r} describes no MPS daemon; update the older one of driver and supervisor")
    daemon = DaemonSpec(
        key=_text(body, "key"),
        device=_device(body),
        memory_mib=_number(body, "memory_mib"),
        threads_percent=_number(body, "threads_percent"),
    )
    if daemon.memory_mib is not None and daemon.memory_mib < 1:
        raise DeviceError(f"a memory ceiling of {daemon.memory_mib} MiB lets no client run; use at least 1, or none")
    if daemon.threads_percent is not None and not 1 <= daemon.threads_percent <= 100:
        raise DeviceError(
            f"{daemon.threads_percent} % of the multiprocessors is not a valid ceiling; use 1 to 100, or none"
        )
    return daemon


def running_body(running: DaemonStatus) -> UncheckedBody:
    return asdict(running)


def running_of(body: object) -> DaemonStatus:
    if not isinstance(body, dict):
        raise DeviceError(f"{body!r} describes no running MPS daemon; update the older one of driver and supervisor")
    return DaemonStatus(
        key=_text(body, "key"),
        device=_device(body),
        pid=_number(body, "pid") or 0,
        memory_mib=_number(body, "memory_mib"),
        threads_percent=_number(body, "threads_percent"),
        restarts=_number(body, "restarts") or 0,
        problem=_text(body, "problem"),
    )


def _device(body: UncheckedBody) -> GpuUuid | MigUuid:
    uuid = _text(body, "device")
    return MigUuid(uuid) if uuid.startswith("MIG-") else GpuUuid(uuid)


def _text(body: UncheckedBody, key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str):
        raise DeviceError(
            f"{key} of an MPS daemon is {value!r} and must be a text; update the older one of driver and supervisor"
        )
    return value


def _number(body: UncheckedBody, key: str) -> int | None:
    value = body.get(key)
    if value is not None and type(value) is not int:
        raise DeviceError(
            f"{key} of an MPS daemon is {value!r} and must be a whole number; update the older one of driver and supervisor"
        )
    return value
