"""The `nvidia-cuda-mps-control` of a simulated node, for machines without a GPU (docs/mps.md).

With `-f` or `-d` it becomes the daemon (start.py, daemon.py). Otherwise it passes the commands on its standard
input to the daemon of CUDA_MPS_PIPE_DIRECTORY and prints the answers. It starts at every command, so this half imports
very little: `_socket`, because `socket` takes as long as everything else, and no pathlib.
"""

from __future__ import annotations

import _socket
import os
import sys

PIPE = "CUDA_MPS_PIPE_DIRECTORY"
_PIPE_DEFAULT = "/tmp/nvidia-mps"  # noqa: S108  NVIDIA's default
_FLAGS = {"-d", "-f", "-multiuser-server"}


def main(arguments: list[str]) -> int:
    if unknown := [flag for flag in arguments if flag not in _FLAGS]:
        return _fail(f"unknown option {unknown[0]}")
    pipe = os.environ.get(PIPE, _PIPE_DEFAULT)
    if not {"-d", "-f"} & set(arguments):
        return _command(f"{pipe}/control")
    sys.path[0] = __file__.rsplit("/", 4)[0]  # the folder of `gpuslice` instead of the folder of this file
    from gpuslice.mps.sim import start

    return start.run(pipe, background="-d" in arguments, multiuser="-multiuser-server" in arguments)


def _command(path: str) -> int:
    commands = b"".join(iter(lambda: os.read(0, 65536), b""))
    connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        connection.connect(path)
        connection.sendall(commands + b"\n")
        connection.shutdown(_socket.SHUT_WR)
        while answer := connection.recv(65536):
            os.write(1, answer)
    except OSError:
        return _fail("Cannot find MPS control daemon process")
    return 0


def _fail(text: str) -> int:
    os.write(2, f"{text}\n".encode())
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
