"""Whether this machine can run a cluster."""

from __future__ import annotations

import os
import shutil
import sys

from hack.lib.cluster import software
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import REAL, work_folder

_PROGRAMS = {
    "runc": "runs the containers; apt-get install runc (one with libseccomp)",
    "openssl": "makes the key of service-account tokens; apt-get install openssl",
    "unshare": "keeps the cluster apart from this machine; apt-get install util-linux",
    "mount": "keeps the cluster apart from this machine; apt-get install mount",
}
_ROOM_GIB = 1
_LONGEST = 40  # characters of the work folder's path; sockets below it have at most 107 bytes


def check() -> None:
    """PlaygroundError with the remedy if this machine cannot run a cluster."""
    if sys.platform != "linux":
        raise PlaygroundError("a cluster needs Linux; use a virtual machine, or hack/demo, which runs anywhere")
    if os.geteuid() != 0:
        raise PlaygroundError(
            "a kubelet needs root; use sudo, or try hack/demo, which needs neither root nor a cluster"
        )
    for program, why in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise PlaygroundError(f"there is no {program} on PATH, which {why}")
    software.busybox()
    root = work_folder()
    if len(str(root)) > _LONGEST:
        raise PlaygroundError(
            f"{root} is longer than {_LONGEST} characters, which is too long for the paths of sockets; set TMPDIR to a "
            "shorter path"
        )
    free = shutil.disk_usage(root.parent).free / (1 << 30)
    if free < _ROOM_GIB:
        raise PlaygroundError(
            f"a cluster needs {_ROOM_GIB} GiB of disk, but {root.parent} has only {free:.1f} GiB; free some space, or "
            "set TMPDIR"
        )


def check_gpus(gpus: str) -> None:
    """PlaygroundError if these cards cannot be simulated."""
    from gpuslice.errors import DriverError
    from gpuslice.nvml.sim import spec

    try:
        if gpus not in ("", REAL):
            spec.parse(gpus)
    except DriverError as e:
        raise PlaygroundError(str(e)) from e
