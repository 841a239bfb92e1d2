"""A certificate for 127.0.0.1 and localhost, made once per process with the `openssl` command."""

from __future__ import annotations

import ssl
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gpuslice.errors import ConfigError
from gpuslice.system import files


@dataclass(frozen=True, slots=True)
class Certificate:
    """Paths of two PEM files. The certificate is self-signed."""

    certificate: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        return context


def certificate(folder: Path) -> Certificate:
    """The folder's certificate. If the folder has none, it gets the one of this process.

    It has an EC key, because the server's part of a handshake then takes less than a millisecond. ConfigError without
    openssl, StateError if the files cannot be written.
    """
    there = Certificate(folder / "tls.crt", folder / "tls.key")
    if not (there.certificate.exists() and there.key.exists()):
        certificate, key = _made()
        files.write_atomic(there.key, key, mode=0o600)
        files.write_atomic(there.certificate, certificate, mode=0o644)
    return there


@cache
def _made() -> tuple[str, str]:
    """A certificate and its key, as PEM."""
    with tempfile.TemporaryDirectory() as folder:
        made = make(Path(folder))
        return made.certificate.read_text(encoding="ascii"), made.key.read_text(encoding="ascii")


def make(folder: Path) -> Certificate:
    """A new certificate, which no other server of this process has."""
    made = Certificate(folder / "tls.crt", folder / "tls.key")
    command = [
        *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
        *("-days", "3650", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        *("-keyout", str(made.key), "-out", str(made.certificate)),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError as e:
        raise ConfigError("the stand-in API server needs the openssl command for its certificate; install it") from e
    except subprocess.CalledProcessError as e:
        raise ConfigError(f"openssl could not make a certificate in {folder}: {e.stderr.strip()[-200:]}") from e
    return made
