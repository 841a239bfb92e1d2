"""The address of `--http-endpoint`."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass

from gpuslice.errors import ConfigError

_FORM = re.compile(
    r"(?:(?:\[(?P<six>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\s:\[\]]*)):)?(?P<port>[0-9]{1,5})", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`host` "" means every address of both families. Port 0 means any free port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """ "9510", ":9510", "host:9510", "127.0.0.1:9510", "[::1]:9510". ConfigError for anything else."""
        match = _FORM.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            raise ConfigError(
                f"HTTP endpoint {text!r} is not an address; name a port up to 65535, host:port or [IPv6 address]:port: "
                "9510, 127.0.0.1:9510 or [::1]:9510"
            )
        return cls(match["six"] or match["host"] or "", int(match["port"]))

    def listen(self) -> socket.socket:
        """A socket that listens there. ConfigError if that is impossible."""
        try:
            return self._listen_anywhere() if not self.host else self._listen_at_host()
        except OSError as e:
            reason = str(e).partition(" (while attempting")[0]  # Python repeats the address
            raise ConfigError(
                f"cannot listen on {self} for metrics and probes ({reason}); name a free host:port"
            ) from e

    def _listen_anywhere(self) -> socket.socket:
        if socket.has_dualstack_ipv6():  # asks the kernel; false, too, if IPv6 is disabled
            return socket.create_server(("", self.port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", self.port))

    def _listen_at_host(self) -> socket.socket:
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)  # a name: IPv4 if it has one
        return socket.create_server(address, family=family)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
