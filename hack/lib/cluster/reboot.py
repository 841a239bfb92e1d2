"""A reboot of the node, as far as a process can do it: everything in memory is lost, everything on disk stays.

Lost: every process of the node with its containers and mounts, /run, the folders that a node has below /run (CDI files,
MPS), the boot id, and the settings of cards that a reset clears. The control plane keeps running, as if it were elsewhere.
"""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

from hack.lib.cluster.layout import REAL, Facts, Place, empty


def forget(place: Place, facts: Facts) -> None:
    """Remove what a reboot of the node removes. No process of the node may run."""
    _unmount(place)
    for folder in (Path("/run"), place.cdi, place.mps, place.containerd / "state"):
        if folder.exists():
            empty(folder)
    place.socket.unlink(missing_ok=True)
    new_boot(place)
    if facts.gpus not in ("", REAL):
        from gpuslice.nvml.sim.node import SimNode

        SimNode(place.simulated).reboot()


def new_boot(place: Place) -> None:
    place.boot_id.write_text(f"{uuid.uuid4()}\n")


def _unmount(place: Place) -> None:
    """Unmount what the parts of the node mounted, the last mount first. The mount of the kubelet's own folder stays."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [Path(line.split()[1]) for line in lines]
    folders = {place.kubelet, place.containerd, place.mps, Path("/run")}
    below = [point for point in points if folders.intersection(point.parents)]
    for point in reversed(below):
        subprocess.run(["umount", "--lazy", str(point)], check=False, stderr=subprocess.DEVNULL)
