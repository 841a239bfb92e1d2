"""The files of an installed NVIDIA driver that a container needs, in any layout of the driver root.

Roots differ: the "/" of a distribution, a driver container, a folder only for the driver such as /usr/local/nvidia.
Containers always have the same layout: libraries under the names that programs use, programs on the PATH, and data in
the folders that the loaders of Vulkan, EGL and OpenCL search.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpuslice.errors import DeviceError
from gpuslice.system import chroot, programs
from gpuslice.system.programs import LIBRARY_FOLDERS

_PROGRAMS = ("smi", "debugdump", "persistenced", "cuda-mps-control", "cuda-mps-server")  # each after "nvidia-"
# Libraries of the driver with their own version numbers, and data for graphics, OpenCL and ray tracing.
_MORE_LIBRARIES = ("libnvidia-nvvm70.so.*", "libnvidia-egl-*.so.*.*")
_SHARE = (
    "nvidia/nvoptix.bin",
    "glvnd/egl_vendor.d/10_nvidia.json",
    "egl/egl_external_platform.d/*_nvidia_*.json",
    "vulkan/icd.d/nvidia_icd*.json",
    "vulkan/implicit_layer.d/nvidia_layers*.json",
)
_ETC = ("vulkan/icd.d/nvidia_icd*.json", "vulkan/implicit_layer.d/nvidia_layers*.json", "OpenCL/vendors/nvidia.icd")
# Folders of the driver root, and the folders where a container looks for their content. A root for the driver only has
# neither "usr" nor "lib" above its data (seen: /usr/local/nvidia on a virtual machine with driver 580).
_DATA = (
    *(("usr/share", "/usr/share", pattern) for pattern in _SHARE),
    *(("share", "/usr/share", pattern) for pattern in _SHARE),
    *(("etc", "/etc", pattern) for pattern in _ETC),
)
_FIRMWARE = (
    ("lib/firmware", "/lib/firmware"),
    ("usr/lib/firmware", "/usr/lib/firmware"),
    ("firmware", "/lib/firmware"),
)
_VERSIONED = re.compile(r"lib(?:cuda|nvidia-ml)\.so\.(\d+(?:\.\d+)+)")
_NAMES = tuple(f"{folder}/{name}" for folder in LIBRARY_FOLDERS for name in ("libcuda.so*", "libnvidia-ml.so*"))


@dataclass(frozen=True, slots=True)
class DriverFiles:
    """One installed version of the user-space driver. Paths are below the driver root ("/usr/lib64/libcuda.so.…")."""

    version: str
    anchor: str  # the library whose name has the version
    files: tuple[tuple[str, str], ...]  # libraries, programs, firmware, data: each with its path in the container
    folders: tuple[str, ...]  # of libraries, for the loader
    links: tuple[tuple[str, str], ...]  # (path of the link, path of the library)


def search(root: Path, loaded: str | None) -> DriverFiles:
    """The files below this root. `loaded`: the version of the kernel module, None if it is unknown.

    DeviceError if there is no library, or no library with the module's version.
    """
    if not root.is_dir():
        raise DeviceError(f"driver root {root} does not exist; mount the NVIDIA driver's root or name another")
    anchor, version = _anchor(root, loaded)
    folder = _inside(root, anchor.parent)
    patterns = [f"{folder}/{name}" for name in (f"*.so.{version}", *_MORE_LIBRARIES, f"vdpau/*.so.{version}")]
    libraries = list(dict.fromkeys([anchor, *(path for pattern in patterns for path in _libraries(root, pattern))]))
    files = {_inside(root, path): path for path in libraries}  # by the path in the container; the first file counts
    for source, target in (*_programs(root), *_data(root, version)):
        files.setdefault(target, source)
    links = {_inside(root, link): _inside(root, library) for link, library in _links(root, libraries)}
    return DriverFiles(
        version=version,
        anchor=_inside(root, anchor),
        files=tuple((_inside(root, source), target) for target, source in files.items()),
        folders=tuple(dict.fromkeys(_inside(root, path.parent) for path in libraries)),
        links=tuple(sorted(links.items())),
    )


def _inside(root: Path, path: Path) -> str:
    """The path below the driver root: "/usr/lib64/libcuda.so.580.65.06"."""
    return f"/{path.relative_to(root)}"


def _libraries(root: Path, pattern: str) -> Iterator[Path]:
    """Libraries that are files. A link with a library's full name is one more name of the library, not another file."""
    return (real for place, real in chroot.glob(root, pattern) if not (root / place[1:]).is_symlink())


def _programs(root: Path) -> Iterator[tuple[Path, str]]:
    """NVIDIA's programs, each with the place where it was found. A link may lead from there to the file."""
    for name in _PROGRAMS:
        yield from ((real, place) for place, real in programs.candidates(root, f"nvidia-{name}")[:1])


def _data(root: Path, version: str) -> Iterator[tuple[Path, str]]:
    """Firmware, and data for graphics, OpenCL and ray tracing, each with its path in the container."""
    patterns = [*((*folders, f"nvidia/{version}/gsp*.bin") for folders in _FIRMWARE), *_DATA]
    for folder, there, pattern in patterns:
        for place, real in chroot.glob(root, f"{folder}/{pattern}"):
            yield real, f"{there}/{place.removeprefix(f'/{folder}/')}"


def _anchor(root: Path, loaded: str | None) -> tuple[Path, str]:
    """The library whose name has the version: the version of the loaded kernel module, otherwise the newest.

    DeviceError if there is no library, or if none fits the kernel module.
    """
    places = (item for pattern in _NAMES for item in chroot.glob(root, pattern))
    found = [(real, match[1]) for _, real in places if (match := _VERSIONED.fullmatch(real.name))]
    if not found:
        raise DeviceError(_no_library(root))
    fitting = [item for item in found if loaded in (None, item[1])]
    newest = max((item[1] for item in fitting or found), key=_numbers)
    if not fitting:
        raise DeviceError(
            f"the NVIDIA driver below {root} is version {newest}, but the loaded kernel module is version {loaded}, so CUDA "
            "does not start; reboot the node, or name the driver root that fits the module"
        )
    return next(item for item in fitting if item[1] == newest)


def _no_library(root: Path) -> str:
    text = f"no libcuda.so.<version> or libnvidia-ml.so.<version> below {root}"
    return (
        chroot.refusal(root, _NAMES) or f"{text}; install the NVIDIA driver there or name the driver root that has it"
    )


def _links(root: Path, libraries: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Other names of the libraries: the links beside them, and two names that every program needs, even without a link."""
    by_folder: dict[Path, dict[str, Path]] = {}
    for path in libraries:
        by_folder.setdefault(path.parent, {})[path.name] = path
    for folder, names in by_folder.items():
        for name, path in names.items():
            stem = name.partition(".so.")[0]
            if stem in ("libcuda", "libnvidia-ml"):
                yield folder / f"{stem}.so.1", path
            if stem == "libcuda":
                yield folder / "libcuda.so", path
        for link in sorted(folder.glob("lib*.so*")):
            real = chroot.regular_file(root, _inside(root, link))
            library = real if real in libraries else _named(link, names)
            if library is not None and link != library:
                yield link, library


def _named(link: Path, names: Mapping[str, Path]) -> Path | None:
    """The library that a chain of links names. Only the names count; the folders in the links do not matter."""
    for _ in range(4):
        if link.name in names or not link.is_symlink():
            break
        link = link.with_name(link.readlink().name)
    return names.get(link.name)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
