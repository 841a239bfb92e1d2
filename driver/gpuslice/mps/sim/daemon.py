"""The daemon of the simulated `nvidia-cuda-mps-control`: one thread, one loop, and a process for each server.

What the daemon refuses or accepts silently follows NVIDIA's documentation of MPS. The device of a limit is not
validated. Defaults apply to servers that start later, and the limits of a server to clients that connect later.
If NVIDIA documents no text of an answer, the text is ours.

A program that connects to `control` writes lines. The daemon answers commands when the writer has shut down its side. A
simulated client writes one line first, and is a client while it stays connected:

    client  client PID UID
    daemon  server PID memory MIB|none threads PERCENT     at once, or after the clients of another uid left
    daemon  refused: WHY                                   then the daemon hangs up
    client  allocate MIB                                   total, not in addition
    daemon  ok | out of memory
    daemon  terminated                                     by terminate_client, or with its server; then the daemon hangs up

Faults on cue: while the file `mps/CUE` or `mps/CUE.UUID` (of the device) is in the simulated node's folder,

    ignore-limits         the daemon ignores all limits
    ignore-uuid-limits    the daemon ignores limits by UUID, but not limits by index
    refuse-multiuser      -multiuser-server is an unknown option, as with an older driver
    refuse-start          the daemon ends at its start
    hang                  the daemon answers no command; clients continue
    fault                 servers report FAULT and refuse new clients
"""

from __future__ import annotations

import _socket
import os
import select
import time

from gpuslice.mps.sim.server import Ceilings, Client, Server, mebibytes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class RefusedError(Exception):
    """The daemon refuses a command. The text is what the daemon prints."""


class SimDaemon:
    def __init__(
        self, node: str, pipe: str, devices: tuple[str, ...], *, multiuser: bool, log: Callable[[str], None]
    ) -> None:
        self._node, self._devices, self._multiuser, self._log = node, devices, multiuser, log
        self._defaults = Ceilings()
        self._servers: dict[int, Server] = {}
        self._waiting: list[Client] = []
        self._requests: dict[int, tuple[_socket.socket, bytes]] = {}  # by descriptor: incomplete requests
        self._leave_at: float | None = None  # time.monotonic(); inf: after the last client left
        self._poll = select.poll()
        self._control = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        # Bound under another name first, because a program may connect to "control" as soon as it exists.
        self._control.bind(f"{pipe}/.control")
        os.chmod(f"{pipe}/.control", 0o777)  # noqa: PTH101, S103  clients have other uids
        self._control.listen(128)
        self._path = f"{pipe}/control"
        os.rename(f"{pipe}/.control", self._path)  # noqa: PTH104
        self._poll.register(self._control, select.POLLIN)

    def serve(self) -> None:
        """Until `quit`."""
        while not self._is_done():
            wait = None if self._leave_at in (None, float("inf")) else max(0.0, self._leave_at - time.monotonic()) * 1e3
            for descriptor, _ in self._poll.poll(wait):
                self._turn(descriptor)
        for server in list(self._servers.values()):
            self._end(server, "terminated")
        os.unlink(self._path)  # noqa: PTH108

    def _is_done(self) -> bool:
        if self._leave_at is None:
            return False
        return time.monotonic() >= self._leave_at or not any(s.clients for s in self._servers.values())

    def _turn(self, descriptor: int) -> None:
        if descriptor == self._control.fileno():
            connection = _socket.socket(fileno=self._control._accept()[0])  # type: ignore[attr-defined]  # accept(2)
            self._requests[connection.fileno()] = (connection, b"")
            self._poll.register(connection, select.POLLIN)
        elif descriptor in self._requests:
            self._serve_request(descriptor)
        elif server := next((s for s in self._servers.values() if s.descriptor == descriptor), None):
            self._end(server, "its server ended")
        elif client := next((c for c in self._clients() if c.connection.fileno() == descriptor), None):
            self._serve_client(client)

    def _clients(self) -> list[Client]:
        return [*(client for server in self._servers.values() for client in server.clients), *self._waiting]

    def _serve_request(self, descriptor: int) -> None:
        connection, before = self._requests[descriptor]
        more = _receive(connection)
        text = before + more
        if text.startswith(b"client ") and b"\n" in text:
            del self._requests[descriptor]
            self._admit(connection, text.split(b"\n")[0].decode().split())
        elif more:
            self._requests[descriptor] = (connection, text)
        elif self._cued("hang"):
            self._poll.unregister(connection)  # the connection stays open and gets no answer
        else:
            del self._requests[descriptor]
            answers = [self._answer(line.split()) for line in text.decode().splitlines() if line.strip()]
            _say(connection, "".join(f"{answer}\n" for answer in answers if answer))
            self._hang_up(connection)

    def _hang_up(self, connection: _socket.socket) -> None:
        self._poll.unregister(connection)
        connection.close()

    def _cued(self, cue: str) -> bool:
        return any(os.path.exists(f"{self._node}/mps/{name}") for name in (cue, f"{cue}.{self._devices[0]}"))  # noqa: PTH110

    # ------------------------------------------------------------ clients

    def _admit(self, connection: _socket.socket, words: list[str]) -> None:
        client = Client(connection, int(words[1]), int(words[2]), Ceilings())
        if self._leave_at is not None or self._cued("fault"):
            _say(connection, f"refused: {'the daemon is quitting' if self._leave_at else 'the server is in FAULT'}\n")
            self._hang_up(connection)
            return
        self._waiting.append(client)
        self._let_in()

    def _let_in(self) -> None:
        """Let waiting clients in: one uid at a time, or all uids with -multiuser-server."""
        for client in list(self._waiting):
            active = next((s for s in self._servers.values() if s.clients), None)
            if self._multiuser or active is None or active.uid == client.uid:
                self._waiting.remove(client)
                server = self._server(client.uid)
                client.ceilings = server.ceilings.copy()
                server.clients.append(client)
                memory = client.ceilings.memory_mib.get(0, "none")
                threads = f"{client.ceilings.threads_percent:g}"
                self._log(f"client pid={client.pid} uid={client.uid} server={server.pid}")
                _say(client.connection, f"server {server.pid} memory {memory} threads {threads}\n")

    def _serve_client(self, client: Client) -> None:
        more = _receive(client.connection)
        if not more:
            self._drop(client, "")
            return
        *lines, client.received = (client.received + more).split(b"\n")
        for line in lines:
            verb, _, figure = line.decode().partition(" ")
            most = client.ceilings.memory_mib.get(0)
            fits = verb == "allocate" and (most is None or int(figure) <= most)
            _say(client.connection, "ok\n" if fits else "out of memory\n")

    def _drop(self, client: Client, word: str) -> None:
        if word:
            _say(client.connection, f"{word}\n")
        self._hang_up(client.connection)
        for clients in (self._waiting, *(server.clients for server in self._servers.values())):
            if client in clients:
                clients.remove(client)
        self._let_in()

    # ------------------------------------------------------------ servers

    def _server(self, uid: int) -> Server:
        for server in self._servers.values():
            if self._multiuser or server.uid == uid:
                return server
        for idle in list(self._servers.values()):
            self._end(idle, "terminated")  # it is of another uid and has no client
        server = Server(uid, self._defaults.copy())
        self._servers[server.pid] = server
        self._poll.register(server.descriptor, select.POLLIN)
        self._log(f"server pid={server.pid} uid={uid} started")
        return server

    def _end(self, server: Server, word: str) -> None:
        del self._servers[server.pid]
        for client in list(server.clients):
            server.clients.remove(client)
            self._drop(client, word)
        self._poll.unregister(server.descriptor)
        server.end()
        self._log(f"server pid={server.pid} ended")

    # ------------------------------------------------------------ commands

    def _answer(self, words: list[str]) -> str:
        command, *arguments = words
        self._log(f"command {' '.join(words)}")
        obey = _COMMANDS.get(command)
        if obey is None:
            return f"Unknown command: {command}"
        try:
            return obey(self, arguments)
        except RefusedError as e:
            return str(e)
        except (ValueError, IndexError):
            return f"Invalid arguments: {' '.join(words)}"

    def _known(self, pid: str) -> Server:
        if int(pid) not in self._servers:
            raise RefusedError(f"Server {pid} does not exist")
        return self._servers[int(pid)]

    def _list_servers(self, _: list[str]) -> str:
        return "\n".join(str(pid) for pid in self._servers)

    def _status(self, arguments: list[str]) -> str:
        self._known(arguments[0])
        return "FAULT" if self._cued("fault") else "ACTIVE"

    def _list_clients(self, arguments: list[str]) -> str:
        return "\n".join(str(client.pid) for client in self._known(arguments[0]).clients)

    def _ps(self, _: list[str]) -> str:
        rows = [f"{c.pid}\t{s.pid}\t{self._devices[0]}" for s in self._servers.values() for c in s.clients]
        return "\n".join(("PID\tSERVER\tDEVICE", *rows))

    def _start_server(self, arguments: list[str]) -> str:
        if arguments[0] != "-uid":
            raise ValueError
        self._server(int(arguments[1]))
        return ""

    def _terminate(self, arguments: list[str]) -> str:
        found = [client for client in self._known(arguments[0]).clients if client.pid == int(arguments[1])]
        for client in found:
            self._drop(client, "terminated")
        return "" if found else f"Client {arguments[1]} does not exist"

    def _shutdown(self, arguments: list[str]) -> str:
        server = self._known(arguments[0])
        if server.clients and "-f" not in arguments:
            return f"Server {server.pid} has clients"
        self._end(server, "terminated")
        return ""

    def _quit(self, arguments: list[str]) -> str:
        forced = arguments[:1] == ["-t"]
        self._leave_at = time.monotonic() + float(arguments[1]) if forced else float("inf")
        return ""

    def _set_memory(self, arguments: list[str], ceilings: Ceilings) -> str:
        device, value = arguments
        mib, index = mebibytes(value), self._device(device)
        if index is not None:
            ceilings.memory_mib[index] = mib
        return ""

    def _device(self, name: str) -> int | None:
        """The index of a device. None for an unknown device, and for a limit that a cue ignores; both are silent."""
        if self._cued("ignore-limits") or (not name.isdigit() and self._cued("ignore-uuid-limits")):
            return None
        if name.isdigit():
            return int(name) if int(name) < len(self._devices) else None
        return self._devices.index(name) if name in self._devices else None

    def _get_memory(self, arguments: list[str], ceilings: Ceilings) -> str:
        index = self._device(arguments[0])
        mib = None if index is None else ceilings.memory_mib.get(index)
        return "No limit set" if mib is None else f"{mib}M"

    def _set_threads(self, arguments: list[str], ceilings: Ceilings) -> str:
        percent = float(arguments[0])
        if not 0 < percent <= 100:
            raise RefusedError(f"Invalid active thread percentage {arguments[0]}")
        if not self._cued("ignore-limits"):
            ceilings.threads_percent = percent
        return self._get_threads([], ceilings)

    def _get_threads(self, _: list[str], ceilings: Ceilings) -> str:
        return f"{ceilings.threads_percent:.1f}"

    def _default(self, obey: Callable[[SimDaemon, list[str], Ceilings], str], arguments: list[str]) -> str:
        return obey(self, arguments, self._defaults)

    def _of_server(self, obey: Callable[[SimDaemon, list[str], Ceilings], str], arguments: list[str]) -> str:
        return obey(self, arguments[1:], self._known(arguments[0]).ceilings)


_COMMANDS: Mapping[str, Callable[[SimDaemon, list[str]], str]] = {
    "get_server_list": SimDaemon._list_servers,
    "get_server_status": SimDaemon._status,
    "get_client_list": SimDaemon._list_clients,
    "ps": SimDaemon._ps,
    "start_server": SimDaemon._start_server,
    "terminate_client": SimDaemon._terminate,
    "shutdown_server": SimDaemon._shutdown,
    "quit": SimDaemon._quit,
    "set_default_device_pinned_mem_limit": lambda d, a: d._default(SimDaemon._set_memory, a),
    "get_default_device_pinned_mem_limit": lambda d, a: d._default(SimDaemon._get_memory, a),
    "set_device_pinned_mem_limit": lambda d, a: d._of_server(SimDaemon._set_memory, a),
    "get_device_pinned_mem_limit": lambda d, a: d._of_server(SimDaemon._get_memory, a),
    "set_default_active_thread_percentage": lambda d, a: d._default(SimDaemon._set_threads, a),
    "get_default_active_thread_percentage": lambda d, a: d._default(SimDaemon._get_threads, a),
    "set_active_thread_percentage": lambda d, a: d._of_server(SimDaemon._set_threads, a),
    "get_active_thread_percentage": lambda d, a: d._of_server(SimDaemon._get_threads, a),
}


def _receive(connection: _socket.socket) -> bytes:
    try:
        return connection.recv(65536)
    except OSError:
        return b""


def _say(connection: _socket.socket, text: str) -> None:
    try:
        connection.sendall(text.encode())
    except OSError:
        pass
