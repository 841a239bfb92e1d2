"""The state of the simulated daemon: ceilings, clients, and servers. Servers are processes, so that tests can kill them.

The daemon starts often, so its modules import little: no dataclasses, and `_socket` and `_json` instead of `socket` and
`json`, which import `re` and `enum`. With these, its start takes twice as long (measured).
"""

from __future__ import annotations

import os
import select

TYPE_CHECKING = False
if TYPE_CHECKING:
    import _socket

NAME = "nvidia-cuda-mps-server"
_BYTES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


class Ceilings:
    """`memory_mib`: by index among the visible devices."""

    def __init__(self, memory_mib: dict[int, int] | None = None, threads_percent: float = 100.0) -> None:
        self.memory_mib, self.threads_percent = memory_mib or {}, threads_percent

    def copy(self) -> Ceilings:
        return Ceilings(dict(self.memory_mib), self.threads_percent)


class Client:
    def __init__(self, connection: _socket.socket, pid: int, uid: int, ceilings: Ceilings) -> None:
        self.connection, self.pid, self.uid, self.ceilings = connection, pid, uid, ceilings
        self.received = b""


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
                select.poll().poll()
        self.descriptor = os.pidfd_open(self.pid)

    def end(self) -> None:
        os.kill(self.pid, 9)  # the right process, because nobody has waited for it yet
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
