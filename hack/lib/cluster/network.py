"""The interfaces of this machine that a cluster needs.

A machine without a default route gets one, because API server and kubelet take their address from it.

No packet leaves by this interface. The address is in TEST-NET-1 (RFC 5737), which no machine has.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from hack.lib.cluster import software
from hack.lib.cluster.cni import BRIDGE
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import GATEWAY, PODS

NAME = "gpuslice0"
_ADDRESS = "192.0.2.10/32"
_KINDS = ("dummy", "bridge")  # if the kernel has no dummy, a bridge without ports works too
_DEFAULT = "00000000"


def ensure(routes: Path = Path("/proc/net/route")) -> None:
    """Make the interface if this machine has no default route. PlaygroundError if that is not allowed."""
    if any(line.split()[1] == _DEFAULT for line in routes.read_text().splitlines()[1:]):
        return
    refusals = [_add(NAME, kind) for kind in _KINDS]
    if all(refusals):
        raise PlaygroundError(
            "this machine has no default route, but a kubelet needs one, and hack/cluster could not make an interface "
            "for it: "
            f"{'; '.join(refusals)}; add a default route to any interface"
        )
    _ip("addr", "add", _ADDRESS, "dev", NAME)
    _ip("link", "set", NAME, "up")
    _ip("route", "add", "default", "dev", NAME)


def ensure_bridge() -> None:
    """Make the bridge of the pods; one that a killed cluster has left is as good. PlaygroundError if that is not allowed,
    or if another network has its addresses."""
    if refusal := _add(BRIDGE, "bridge"):
        raise PlaygroundError(
            f"the pods of an installed driver need a bridge, but this machine allows none: {refusal}; run "
            "hack/cluster up without --install"
        )
    _ip("addr", "replace", f"{GATEWAY}/{PODS.partition('/')[2]}", "dev", BRIDGE)
    _ip("link", "set", BRIDGE, "up")


def remove(*, bridge: bool) -> None:
    """Remove the interfaces, the bridge only if this cluster has it. If there are none, do nothing."""
    for name in (NAME, *([BRIDGE] if bridge else [])):
        if Path("/sys/class/net", name).exists():
            _ip("link", "del", name)


def _ip(*arguments: str) -> None:
    software.call([str(software.busybox()), "ip", *arguments])


def _add(name: str, kind: str) -> str:
    """Add an interface of this kind. Returns "" if there is one of this name now, otherwise the reason."""
    if Path("/sys/class/net", name).exists():
        return ""
    command = [str(software.busybox()), "ip", "link", "add", name, "type", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{kind}: {' '.join(done.stderr.split()) or 'refused'}" if done.returncode else ""
