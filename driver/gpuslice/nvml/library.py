"""NVIDIA's library: find it, load it, translate its errors. Only this file, mig.py and real.py use pynvml.

pynvml declares no argument types. If a struct is passed by value instead of by pointer, the process ends without any
message. So every struct is passed by reference, and these three files return only our own types.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pynvml

from gpuslice.errors import DeviceError
from gpuslice.nvml.api import Code
from gpuslice.nvml.pulse import during
from gpuslice.system import chroot
from gpuslice.system.programs import LIBRARY_FOLDERS

SONAME = "libnvidia-ml.so.1"
_PLACES = tuple(f"/{folder}/{SONAME}" for folder in (*LIBRARY_FOLDERS, ""))

_REMEDIES = {
    Code.UNINITIALIZED: "NVML was closed during this call; the driver starts it again when no card can be read",
    Code.INVALID_ARGUMENT: "the card has no such profile, place or mode; use one that it lists",
    Code.NOT_SUPPORTED: "this card, its present mode or its NVIDIA driver does not offer it",
    Code.NO_PERMISSION: "run the driver as root with CAP_SYS_ADMIN",
    Code.NOT_FOUND: "it is gone",
    Code.DRIVER_NOT_LOADED: "load the NVIDIA kernel driver; nvidia-smi must work on the host",
    Code.LIBRARY_NOT_FOUND: "install the NVIDIA driver, or name the folder that it is mounted in as the driver root",
    Code.FUNCTION_NOT_FOUND: "the NVIDIA driver is too old for this call; update it",
    Code.GPU_IS_LOST: "it fell off the bus; reset it or reboot the node",
    Code.RESET_REQUIRED: "reset the GPU, or reboot the node if the GPU cannot be reset (pass-through)",
    Code.LIB_RM_VERSION_MISMATCH: "the NVIDIA driver was upgraded beside its loaded kernel module; reboot the node",
    Code.IN_USE: "something holds it: end its processes, and any other program with an NVML session (DCGM, nvidia-smi)",
    Code.INSUFFICIENT_RESOURCES: "there is no room for it; destroy what blocks it",
}


# The errors of Python for a text in another encoding, an absurd number, or a value that no enumeration has.
_UNREADABLE = (ValueError, OverflowError, LookupError, MemoryError, ctypes.ArgumentError)


@contextmanager
def asking(where: str, what: str) -> Iterator[None]:
    """Translate NVML's errors in the block. `where` names the GPU, `what` completes "cannot …" and "the call to …"."""
    try:
        with during(f"{where}: the call to {what}"):
            yield
    except pynvml.NVMLError as e:
        raise refusal(where, what, e.value) from e
    except _UNREADABLE as e:
        text = f"{where}: cannot {what}: the answer of NVML cannot be read ({e!r}); update the NVIDIA driver"
        raise DeviceError(text, Code.UNKNOWN) from e


def refusal(where: str, what: str, code: int) -> DeviceError:
    """The error for this `nvmlReturn_t`, also if NVML returns it as a status of a successful call."""
    name = Code(code).name if code in set(Code) else f"error {code}"
    remedy = _REMEDIES.get(Code(code)) if code in set(Code) else None
    return DeviceError(f"{where}: cannot {what}: {name}; {remedy or 'see the NVRM lines of the kernel log'}", code)


def find(driver_root: Path) -> Path | None:
    """The library below a driver root (a folder with the layout of the host's /), or directly in it."""
    return next((real for place in _PLACES if (real := chroot.regular_file(driver_root, place))), None)


def start(driver_root: Path | None) -> None:
    """Load the library and open the only session of this process. DeviceError if this fails.

    pynvml opens the library only by soname, and the loader returns an already loaded library of this soname. So the driver
    loads the library of the driver root first. Without a driver root, the loader searches.
    """
    where = "this node" if driver_root is None else f"driver root {driver_root}"
    if driver_root is not None:
        path = find(driver_root)
        if path is None and (outside := chroot.refusal(driver_root, _PLACES)):
            raise DeviceError(f"{where}: cannot find {SONAME}: {outside}", Code.LIBRARY_NOT_FOUND)
        if path is None:
            raise refusal(where, f"find {SONAME}", Code.LIBRARY_NOT_FOUND)
        try:
            with during(f"{where}: the call to load {path}"):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except OSError as e:
            text = f"{where}: cannot load {path} ({e}); it must fit this machine and the image's C library"
            raise DeviceError(text, Code.LIBRARY_NOT_FOUND) from e
    with asking(where, "start NVML"):
        pynvml.nvmlInit()
