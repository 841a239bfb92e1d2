"""A stand-in CUDA program as a process: `client.py PIPE [UID]`. It prints its limits, and ends when its input ends.

It prints `server PID memory MIB|none threads PERCENT`. Its environment can lower these figures, as in the client library of
MPS. Then it obeys lines on its standard input: `allocate MIB` prints the daemon's answer. It ends with 0 when its
input ends, and with 1 if the daemon refuses or terminates it, or if it loses its server.
"""

from __future__ import annotations

import os
import select
import socket
import sys


def main(pipe: str, uid: str) -> int:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(f"{pipe}/control")
    connection.sendall(f"client {os.getpid()} {uid}\n".encode())
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        for descriptor, _ in poll.poll():
            data = os.read(descriptor, 4096)
            if descriptor == 0 and not data:
                return 0
            if descriptor == 0:
                connection.sendall(data)
                continue
            print(_lowered(data.decode().strip()), flush=True)  # noqa: T201  it is a program
            if not data or data.startswith((b"terminated", b"refused", b"its server")):
                return 1


def _lowered(line: str) -> str:
    if not line.startswith("server "):
        return line or "lost"
    _, pid, _, memory, _, threads = line.split()
    own = os.environ.get("CUDA_MPS_PINNED_DEVICE_MEM_LIMIT", "").removeprefix("0=").removesuffix("M")
    if own:
        memory = own if memory == "none" else str(min(int(memory), int(own)))
    threads = f"{min(float(threads), float(os.environ.get('CUDA_MPS_ACTIVE_THREAD_PERCENTAGE', threads))):g}"
    return f"server {pid} memory {memory} threads {threads}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "0"))
