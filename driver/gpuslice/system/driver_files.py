"""The files of one installed NVIDIA driver that a container needs, wherever its root keeps them.

Roots differ: a distribution's "/", a driver container, a folder of the driver's own such as /usr/local/nvidia. What a
container finds does not: libraries under the names that programs ask for, programs on its PATH, data where the loaders of
Vulkan, EGL and OpenCL look.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gpuslice.errors import DeviceError
from gpuslice.system.programs import LIBRARY_FOLDERS, PROGRAM_FOLDERS

_PROGRAMS = ("smi", "debugdump", "persistenced", "cuda-mps-control", "cuda-mps-server")  # each after "nvidia-"
# Libraries of the driver that carry a version of their own, and data for graphics, OpenCL and ray tracing.
_MORE_LIBRARIES = ("libnvidia-nvvm70.so.*", "libnvidia-egl-*.so.*.*")
_SHARE = (
    "nvidia/nvoptix.bin",
    "glvnd/egl_vendor.d/10_nvidia.json",
    "egl/egl_external_platform.d/*_nvidia_*.json",
    "vulkan/icd.d/nvidia_icd*.json",
    "vulkan/implicit_layer.d/nvidia_layers*.json",
)
_ETC = ("vulkan/icd.d/nvidia_icd*.json", "vulkan/implicit_layer.d/nvidia_layers*.json", "OpenCL/vendors/nvidia.icd")
# Folders of the driver root, and where a container looks for what is in them. A root that is the driver's alone has
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
_NAMED = re.compile(r"lib(?:cuda|nvidia-ml)\.so(?:\.[\d.]+)?")
_LONGEST_CHAIN = 8  # links that lead to links


@dataclass(frozen=True, slots=True)
class DriverFiles:
    """One installed version of the user-space driver, by paths below the driver root ("/usr/lib64/libcuda.so.…")."""

    version: str
    anchor: str  # the library whose name told the version
    files: tuple[tuple[str, str], ...]  # libraries, programs, firmware, data: each with its path in the container
    folders: tuple[str, ...]  # of libraries, for the loader
    links: tuple[tuple[str, str], ...]  # (path of the link, path of the library)


def search(root: Path, loaded: str | None) -> DriverFiles:
    """The files below this root. `loaded`: the version of the kernel module, None where it is not known.

    DeviceError where there is no library, or none of the module's version.
    """
    if not root.is_dir():
        raise DeviceError(f"driver root {root} is not there; mount the NVIDIA driver's root or name another")
    anchor, version = _anchor(root, loaded)
    folder = anchor.parent
    libraries = [path for pattern in (f"*.so.{version}", *_MORE_LIBRARIES) for path in sorted(folder.glob(pattern))]
    libraries += sorted(folder.glob(f"vdpau/*.so.{version}"))
    libraries = [anchor, *(path for path in _files(libraries) if path != anchor)]
    found = {_inside(root, path): _inside(root, path) for path in libraries}
    found |= {_inside(root, source): _inside(root, target) for source, target in _programs(root)}
    found |= {_inside(root, source): target for source, target in _data(root, version)}
    links = {_inside(root, link): _inside(root, library) for link, library in _links(libraries)}
    return DriverFiles(
        version=version,
        anchor=_inside(root, anchor),
        files=tuple(found.items()),
        folders=tuple(dict.fromkeys(_inside(root, path.parent) for path in libraries)),
        links=tuple(sorted(links.items())),
    )


def _inside(root: Path, path: Path) -> str:
    """The path as it is below the driver root: "/usr/lib64/libcuda.so.580.65.06"."""
    return f"/{path.relative_to(root)}"


def _programs(root: Path) -> Iterator[tuple[Path, Path]]:
    """NVIDIA's programs, each with the place at which it is found; the file may lie elsewhere, behind a link."""
    for name in _PROGRAMS:
        places = (root / folder / f"nvidia-{name}" for folder in PROGRAM_FOLDERS)
        yield from [(real, place) for place in places if (real := _real(root, place))][:1]


def _data(root: Path, version: str) -> Iterator[tuple[Path, str]]:
    """Firmware, and data for graphics, OpenCL and ray tracing, each with its path in the container."""
    patterns = [*((*folders, f"nvidia/{version}/gsp*.bin") for folders in _FIRMWARE), *_DATA]
    for folder, there, pattern in patterns:
        for path in _files(sorted((root / folder).glob(pattern))):
            yield path, f"{there}/{path.relative_to(root / folder)}"


def _anchor(root: Path, loaded: str | None) -> tuple[Path, str]:
    """The library whose name tells the version: that of the loaded kernel module, else the newest.

    DeviceError where there is none, or none that fits the kernel module.
    """
    places = [path for folder in LIBRARY_FOLDERS for path in sorted((root / folder).glob("lib*.so.*"))]
    names = ((real, _VERSIONED.fullmatch(real.name)) for path in places if (real := _real(root, path)))
    found = [(path, match[1]) for path, match in names if match]
    if not found:
        raise DeviceError(_no_library(root, places))
    fitting = [item for item in found if loaded in (None, item[1])]
    newest = max((item[1] for item in fitting or found), key=_numbers)
    if not fitting:
        raise DeviceError(
            f"the NVIDIA driver below {root} is version {newest}, and the loaded kernel module is version {loaded}, so CUDA "
            "would refuse to start; reboot the node, or name the driver root that fits the module"
        )
    return next(item for item in fitting if item[1] == newest)


def _no_library(root: Path, places: Iterable[Path]) -> str:
    outside = [path for path in places if path.is_symlink() and _NAMED.fullmatch(path.name) and not _real(root, path)]
    if outside:
        return (
            f"{outside[0]} is a link to {outside[0].readlink()}, which is not below the driver root {root}; name the folder "
            "that holds the NVIDIA driver's own files as the driver root"
        )
    text = f"no libcuda.so.<version> or libnvidia-ml.so.<version> below {root}"
    return f"{text}; install the NVIDIA driver there or name the driver root that has it"


def _real(root: Path, path: Path) -> Path | None:
    """The regular file at the end of a chain of links that stays below the root; None where there is none.

    An absolute link of a driver container is meant below that container's root.
    """
    for _ in range(_LONGEST_CHAIN):
        if not path.is_symlink():
            return path if path.is_file() else None
        link = path.readlink()
        path = root / str(link).lstrip("/") if link.is_absolute() else Path(os.path.normpath(path.parent / link))
        if root != Path("/") and root not in path.parents:
            return None
    return None


def _links(libraries: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Other names of the libraries: the links beside them, and two that every program needs, there or not."""
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
            if (library := _behind(link, names)) and link != library:
                yield link, library


def _behind(link: Path, names: Mapping[str, Path]) -> Path | None:
    """The library at the end of a chain of links, by names: absolute links of a driver container lead us elsewhere."""
    for _ in range(4):
        if link.name in names or not link.is_symlink():
            break
        link = link.with_name(link.readlink().name)
    return names.get(link.name)


def _files(paths: Iterable[Path]) -> list[Path]:
    """Regular files only: a link may point out of the driver root, where the runtime would not find what we saw."""
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))
