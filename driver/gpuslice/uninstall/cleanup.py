"""The clean-up of a node after the end of the driver: all files, folders, mounts and processes that the driver left.

MIG mode of the cards stays as it is. Partitions and shares go with the claims that hold them.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpuslice import node
from gpuslice.checkpoint import Records
from gpuslice.config import Config
from gpuslice.core import cdi
from gpuslice.errors import StateError
from gpuslice.mps import daemon
from gpuslice.mps.launch import take_tmpfs
from gpuslice.mps.paths import Paths
from gpuslice.mps.process import kill_all
from gpuslice.plugin import sockets
from gpuslice.system import files, refusals
from gpuslice.system.folder_watch import FolderWatch

CHECK_S = 20.0  # how long `check` waits for the end of a claim
_PARENT = "gpuslice"  # name of the folder above the root of the MPS supervisor, if it is ours


def check(config: Config, limit_s: float = CHECK_S) -> None:
    """Return when no claim is prepared on this node. StateError names the claims after `limit_s`. Changes nothing."""
    folder = node.records_folder(config)
    if folder is None:
        return
    end = time.monotonic() + limit_s
    with contextlib.closing(FolderWatch(folder, arrivals=True)) as watch:
        while left := _prepared(folder):
            ready, _, _ = select.select([watch], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise StateError(f"{left}; delete its pods, while the driver runs")
            watch.read()


def clean(config: Config, say: Callable[[str], None], mps_root: Path | None = None) -> None:
    """Remove everything of the driver from this node. StateError if a claim is prepared: then everything stays.

    `mps_root`: where this process sees the folder that `config` names as the MPS daemons see it; None for the same path.
    Waits for the end of a driver or an MPS supervisor that is still there. A second time it finds nothing and succeeds.
    """
    root = mps_root or config.mps_root
    with contextlib.ExitStack() as locks:
        for path in (*sockets.locks(config.plugin_folder), root / "supervisor.lock"):
            if path.exists():
                locks.enter_context(_after(path, say))
        if sockets.serving(config.plugin_folder):  # it came while this process waited for the locks of the others
            raise StateError(
                f"another driver has started on this node meanwhile, in {config.plugin_folder}, so its files stay; remove "
                "that installation first"
            )
        folder = node.records_folder(config)
        if folder is not None and (left := _prepared(folder)):
            raise StateError(f"{left}, so the files of this node stay; install the driver again, then delete its pods")
        for path in (
            *sockets.registrations(config.kubelet_registrar_directory_path, config.driver_name),
            *_cdi_files(config),
        ):
            files.remove(path)
            say(f"removed {path}")
        _clear_mps(root, Paths(config.mps_root), say)
        _remove(config.plugin_folder, say)
    say(f"nothing of {config.driver_name} is left on this node")


def _prepared(folder: Path) -> str:
    """The beginning of a sentence about the prepared claims; "" if there is none. An unreadable record is one, too."""
    kept = Records(folder)
    found = [str(record.plan.ref) for record in kept.records().values()]
    names = ", ".join(sorted(found) + sorted(f"claim {uid}" for uid in kept.uids() - kept.records().keys()))
    return f"prepared on this node: {names}" if names else ""


@contextlib.contextmanager
def _after(lock: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a process that must have ended. Its end may take a while: the kubelet removes pods in no order."""
    descriptor = files.try_lock(lock)
    if descriptor is not None:
        with contextlib.closing(os.fdopen(descriptor)):
            yield
        return
    say(f"waiting for the end of the process that holds {lock}")
    with files.locked(lock):
        yield


def _cdi_files(config: Config) -> list[Path]:
    """The CDI files of the driver's claims. One that was being written has a dot before its name."""
    before, _ = cdi.file_name(cdi.kind_of(config.driver_name), "0").split("0.", 1)
    folder = config.cdi_root
    return sorted((*folder.glob(f"{before}*"), *folder.glob(f".{before}*"))) if folder.is_dir() else []


def _clear_mps(root: Path, theirs: Paths, say: Callable[[str], None]) -> None:
    """End the daemons that a crash has left, unmount what is mounted below the root, and remove it.

    `theirs`: the paths below the root as the daemons see them.
    """
    if root.is_dir() and not root.is_symlink():  # behind a link nothing is ours
        paths = Paths(root)
        for key in paths.known():
            kill_all(theirs.pipe(key), daemon.DRAIN_S)
            daemon.discard(paths, key)
        for place in _mounts_below(root):
            take_tmpfs(place)
            say(f"unmounted {place}")
    _remove(root, say)
    if root.parent.name == _PARENT:
        with contextlib.suppress(OSError):  # it is gone already, or something else is in it
            root.parent.rmdir()
            say(f"removed {root.parent}")


def _mounts_below(folder: Path) -> list[str]:
    """Mount points below a folder, the innermost first (proc(5), mountinfo)."""
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    places = {line.split()[4] for line in lines}
    return sorted(
        (place for place in places if place.startswith(f"{os.path.realpath(folder)}/")), key=len, reverse=True
    )


def _remove(folder: Path, say: Callable[[str], None]) -> None:
    with refusals.translated("remove", folder):
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
    say(f"removed {folder}")
