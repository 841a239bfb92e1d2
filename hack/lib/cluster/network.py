"""An interface with a default route, for machines that have none: API server and kubelet look for an address there.

Nothing leaves by it. The address is of TEST-NET-1 (RFC 5737), which nobody has.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from hack.lib.cluster import software
from hack.lib.cluster.errors import PlaygroundError

NAME = "gpuslice0"
_ADDRESS = "192.0.2.10/32"
_KINDS = ("dummy", "bridge")  # a bridge without ports does as well, where the kernel has no dummy
_DEFAULT = "00000000"


def ensure(routes: Path = Path("/proc/net/route")) -> None:
    """Make the interface where this machine has no default route. PlaygroundError where that is not allowed."""
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
    """Undo `ensure`; nothing to undo is fine."""
    if Path("/sys/class/net", NAME).exists():
        software.call([str(software.busybox()), "ip", "link", "del", NAME])


def _add(kind: str) -> str:
    """Why there is no interface of this kind now; "" if there is one of the name."""
    if Path("/sys/class/net", NAME).exists():
        return ""
    command = [str(software.busybox()), "ip", "link", "add", NAME, "type", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{kind}: {' '.join(done.stderr.split()) or 'refused'}" if done.returncode else ""
