"""An interface with a default route, for machines without one, because API server and kubelet take their address from it.

No packet leaves by this interface. The address is in TEST-NET-1 (RFC 5737), which no machine has.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from hack.lib.cluster import software
from hack.lib.cluster.errors import PlaygroundError

NAME = "gpuslice0"
_ADDRESS = "192.0.2.10/32"
_KINDS = ("dummy", "bridge")  # if the kernel has no dummy, a bridge without ports works too
_DEFAULT = "00000000"


def ensure(routes: Path = Path("/proc/net/route")) -> None:
    """Make the interface if this machine has no default route. PlaygroundError if that is not allowed."""
    if any(line.split()[1] == _DEFAULT for line in routes.read_text().splitlines()[1:]):
        return
    refusals = [_add(kind) for kind in _KINDS]
    if all(refusals):
        raise PlaygroundError(
            "this machine has no default route, but a kubelet needs one, and hack/cluster could not make an interface "
            "for it: "
            f"{'; '.join(refusals)}; add a default route to any interface"
        )
    for arguments in (
        ("addr", "add", _ADDRESS, "dev", NAME),
        ("link", "set", NAME, "up"),
        ("route", "add", "default", "dev", NAME),
    ):
        software.call([str(software.busybox()), "ip", *arguments])


def remove() -> None:
    """Undo `ensure`. If there is nothing to undo, do nothing."""
    if Path("/sys/class/net", NAME).exists():
        software.call([str(software.busybox()), "ip", "link", "del", NAME])


def _add(kind: str) -> str:
    """Add an interface of this kind. Returns "" if there is one of this name now, otherwise the reason."""
    if Path("/sys/class/net", NAME).exists():
        return ""
    command = [str(software.busybox()), "ip", "link", "add", NAME, "type", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{kind}: {' '.join(done.stderr.split()) or 'refused'}" if done.returncode else ""
