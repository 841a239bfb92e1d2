"""The state of the simulated daemon: ceilings, clients, and servers. Servers are processes, so that tests can kill them."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass, field

NAME = "nvidia-cuda-mps-server"
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(slots=True)
class Ceilings:
    memory_mib: dict[int, int] = field(default_factory=dict)  # by index among the visible devices
    threads_percent: float = 100.0

    def copy(self) -> Ceilings:
        return Ceilings(dict(self.memory_mib), self.threads_percent)


@dataclass(slots=True, eq=False)
class Client:
    connection: socket.socket
    pid: int
    uid: int
    ceilings: Ceilings
    received: bytes = b""


class Server:
    """A process for one server. `descriptor` becomes readable when the process ends."""

    def __init__(self, uid: int, ceilings: Ceilings) -> None:
        self.uid, self.ceilings = uid, ceilings
        self.clients: list[Client] = []
        self.pid = os.fork()
        if not self.pid:
            os.closerange(3, 1024)  # otherwise the daemon's sockets and lock survive the daemon
            name_myself(NAME)
            while True:
                signal.pause()
        self.descriptor = os.pidfd_open(self.pid)

    def end(self) -> None:
        signal.pidfd_send_signal(self.descriptor, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.descriptor)


def name_myself(name: str) -> None:
    """Set the name that the kernel shows for this process: at most 15 bytes (proc(5))."""
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write(name)


def mebibytes(value: str) -> int:
    """`4G`, `512M` or bytes, in whole MiB. ValueError for anything else."""
    number, unit = (value[:-1], _BYTES[value[-1]]) if value[-1:] in _BYTES else (value, 1)
    return int(number) * unit >> 20
