"""Give a daemon its own /dev/shm, then become the daemon: `launch.py SHM COMMAND…`. The process id stays.

MPS servers and clients communicate through /dev/shm, and a container must see the same /dev/shm as its daemon. So the
daemon gets the folder that containers mount, in a mount namespace of its own. This file imports very little, because it
runs at each start.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Containers write there, and the folder is visible on the node: a file of a container must not get root's rights there.
_MS_NOSUID, _MS_NODEV = 2, 4
_CLONE_NEWNS = 0x20000  # linux/sched.h
_MNT_DETACH, _UMOUNT_NOFOLLOW = 0x2, 0x8  # sys/mount.h
_MS_BIND, _MS_REC, _MS_SLAVE = 0x1000, 0x4000, 0x80000  # linux/mount.h
NO_SHM = "gpuslice: no /dev/shm of its own"


def isolate(shm: str) -> None:
    """Bind `shm` over /dev/shm for this process and its children only. OSError if that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS))
    # Slave, not private: if the node unmounts something, the daemon must not keep it mounted and busy.
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_SLAVE, None))
    _check(libc.mount(os.fsencode(shm), b"/dev/shm", None, _MS_BIND, None))


def give_tmpfs(folder: str) -> bool:
    """Mount a tmpfs (default size: half of the memory) on a folder without one. False if that would do harm.

    Files of programs must not fill the node's /run, because that would stop the container runtime. But the runtime must see
    the mount too, which needs mount propagation. Otherwise daemon and programs would have two different folders. OSError if
    the mount is not allowed.
    """
    if os.stat(folder).st_dev != os.stat(os.path.dirname(folder)).st_dev:  # noqa: PTH116, PTH120
        return True
    if not _propagates(folder):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.mount(b"gpuslice", os.fsencode(folder), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=1777"))
    return True


def take_tmpfs(folder: str) -> None:
    """Unmount the tmpfs: at once for new users, later for present users. Succeeds if nothing is mounted or there."""
    libc = ctypes.CDLL(None, use_errno=True)
    while not libc.umount2(os.fsencode(folder), _MNT_DETACH | _UMOUNT_NOFOLLOW):
        pass


def _propagates(folder: str) -> bool:
    """Whether other namespaces see a mount there (proc(5), mountinfo: `shared:` among the optional fields)."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
        mounts = [line.split() for line in file]
    real = f"{os.path.realpath(folder)}/"
    above = [fields for fields in mounts if real.startswith(f"{fields[4].rstrip('/')}/")]
    nearest = max(reversed(above), key=lambda fields: len(fields[4]))  # of several mounts on one place the last counts
    return any(field.startswith("shared:") for field in nearest[6 : nearest.index("-")])


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main(arguments: list[str]) -> None:
    shm, *command = arguments
    try:
        isolate(shm)
    except OSError as e:
        # Not fatal: a process without the rights is on a test machine, where the clients share its /dev/shm.
        print(f"{NO_SHM} ({e.strerror}); run as root with CAP_SYS_ADMIN", file=sys.stderr, flush=True)  # noqa: T201
    try:
        os.execvp(command[0], command)  # noqa: S606  the process must become the daemon
    except OSError as e:
        print(f"cannot run {command[0]}: {e.strerror}", file=sys.stderr, flush=True)  # noqa: T201
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
