"""The node around the GPUs: files that a container needs besides its card, device numbers, boot id, places in sysfs.

Every root is a parameter. `driver_root` is the path of the NVIDIA driver's files for *this* process (the node's "/", or the
root of a driver container). `host_root` is the path of the same place on the node, because runtimes use paths of the
node, not of our container. Inside the workload, a library keeps its path below that root.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from gpuslice.core.cdi import ContainerEdits, DeviceNode, Hook, Mount
from gpuslice.core.model import Gpu
from gpuslice.errors import DeviceError, StateError
from gpuslice.system import chroot, driver_files
from gpuslice.system.driver_files import DriverFiles

_GPU_MAJOR, _CONTROL_MINOR, _MODESET_MINOR = 195, 255, 254  # nv.h of the open kernel modules
_READ_ONLY = ("ro", "nosuid", "nodev", "rbind", "rprivate")
_SOCKET = ("nosuid", "nodev", "noexec", "rbind", "rprivate")

# Not /tmp/nvidia-mps: a workload that finds the node's own MPS daemon there runs outside its claim.
_SOCKETS = ("run/nvidia-persistenced/socket", "run/nvidia-fabricmanager/socket")
_HOOK_FOLDERS = ("usr/bin", "usr/local/bin", "usr/local/nvidia/toolkit", "opt/nvidia/toolkit")
_KERNEL_MODULE = re.compile(r"Kernel Module.*?\s(\d+\.\d+(?:\.\d+)?)\s")


class Host(Protocol):
    """The driver's interface to the node itself. Each call reads everything, because the NVIDIA driver may be reloaded."""

    def boot_id(self) -> str:
        """The identity of this boot. It changes with every boot of the node, and only then."""

    def locate(self, gpu: Gpu) -> Gpu:
        """The same card with its NUMA node and PCIe root; None if sysfs does not have them."""

    def common(self) -> ContainerEdits:
        """The edits that every container with a GPU needs. DeviceError without an NVIDIA driver or the named hook."""

    def nodes(self, minor: int, gi: int | None = None, ci: int | None = None) -> tuple[DeviceNode, ...]:
        """Device nodes of the card /dev/nvidia<minor>, or of one partition of it: the card's node and two capabilities.

        The card's node opens no partition by itself, so both ids of a partition are needed (capability design of MIG).
        """

    def advice(self) -> tuple[str, ...]:
        """One sentence for each thing that the node lacks and that would help. The driver logs them at its start."""


class RealHost:
    """A node with the NVIDIA driver. `cdi_hook` is a path on the node. Without it, the usual places are searched."""

    def __init__(
        self,
        driver_root: Path = Path("/"),
        *,
        host_root: Path | None = None,
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        cdi_hook: Path | None = None,
    ) -> None:
        self._root, self._host_root = driver_root, host_root or driver_root
        self._proc, self._sys, self._dev = proc, sys, dev
        self._given_hook = cdi_hook
        self._found: DriverFiles | None = None

    def boot_id(self) -> str:
        return _boot_id(self._proc / "sys/kernel/random/boot_id")

    def locate(self, gpu: Gpu) -> Gpu:
        device = self._sys / "bus/pci/devices" / gpu.bus_id
        return replace(gpu, numa_node=_numa_node(device), pcie_root=_pcie_root(device, self._sys))

    def nodes(self, minor: int, gi: int | None = None, ci: int | None = None) -> tuple[DeviceNode, ...]:
        card = DeviceNode(f"/dev/nvidia{minor}", _GPU_MAJOR, minor)
        if gi is None:
            return (card,)
        # The "gpu" number of this table is the device minor, not NVML's index (the two differ on many machines).
        names = (f"gpu{minor}/gi{gi}/access", f"gpu{minor}/gi{gi}/ci{ci}/access")
        return (card, *(self._capability(name) for name in names))

    def common(self) -> ContainerEdits:
        driver = self._driver()
        hook = self._hook()
        mounts = [self._mount(path, target) for path, target in driver.files]
        mounts += [self._mount(path, target, _SOCKET) for path, target in self._sockets()]
        if hook is not None:
            return ContainerEdits(nodes=self._control_nodes(), mounts=tuple(mounts), hooks=_hooks(hook, driver))
        # No program makes links or the loader's cache in the container. So each library appears under all its names, and
        # programs find the libraries by a variable. This is weaker, because an image may set the variable itself.
        mounts += [self._mount(library, link) for link, library in driver.links]
        env = {"LD_LIBRARY_PATH": ":".join(driver.folders)}
        return ContainerEdits(nodes=self._control_nodes(), mounts=tuple(mounts), env=env)

    def advice(self) -> tuple[str, ...]:
        found = []
        if self._given_hook is None and self._hook() is None:
            found.append(
                "nvidia-cdi-hook was not found, so containers find the NVIDIA libraries by LD_LIBRARY_PATH, which an image "
                "may override; install the NVIDIA container toolkit on the node or name the hook's path"
            )
        if missing := self._without_link():
            found.append(
                f"no link in /dev/char for {_some(missing)}: with runc 1.1.3 to 1.1.6, or systemd older than 240, running "
                "containers lose these devices at each `systemctl daemon-reload`; update runc, or run `nvidia-ctk system "
                "create-dev-char-symlinks --create-all` on the node after each boot"
            )
        return tuple(found)

    # ---------------------------------------------------------------- device numbers

    def _control_nodes(self) -> tuple[DeviceNode, ...]:
        uvm = self._major(
            "nvidia-uvm", "load the module (nvidia-modprobe -u -c 0), because CUDA does not start without it"
        )
        nodes = [
            DeviceNode("/dev/nvidiactl", _GPU_MAJOR, _CONTROL_MINOR),
            DeviceNode("/dev/nvidia-uvm", uvm, 0),
            DeviceNode("/dev/nvidia-uvm-tools", uvm, 1),
        ]
        if (self._dev / "nvidia-modeset").exists():
            nodes.append(DeviceNode("/dev/nvidia-modeset", _GPU_MAJOR, _MODESET_MINOR))
        return tuple(nodes)

    def _major(self, name: str, remedy: str) -> int:
        """Major of a character device that gets its number when its module loads. DeviceError with this remedy if it
        has none."""
        for line in _text(self._proc / "devices").partition("Block devices:")[0].splitlines():
            number, _, found = line.strip().partition(" ")
            if found == name:
                return int(number)
        path = self._dev / name
        if path.is_char_device():
            return os.major(path.stat().st_rdev)
        raise DeviceError(f"device {name} has no number in {self._proc / 'devices'}; {remedy}")

    def _capability(self, name: str) -> DeviceNode:
        table = self._proc / "driver/nvidia-caps/mig-minors"
        for line in _text(table).splitlines():
            found, _, number = line.partition(" ")
            if found == name:
                major = self._major(
                    "nvidia-caps", "load the nvidia module again, because partitions are opened through it"
                )
                return DeviceNode(f"/dev/nvidia-caps/nvidia-cap{int(number)}", major, int(number))
        raise DeviceError(f"capability {name} is not in {table}; check that the loaded NVIDIA driver supports MIG")

    def _without_link(self) -> list[str]:
        """Device nodes for containers without the link /dev/char/<major>:<minor>, by which runc names a device for systemd.
        udev makes these links, but it does not know NVIDIA's devices (opencontainers/runc issue 3671, NVIDIA/nvidia-docker
        issue 1730). The driver does not make them, because it leaves nothing on a node when it is removed."""
        links = self._dev / "char"
        return [node.path for node in self._present() if not (links / f"{node.major}:{node.minor}").exists()]

    def _present(self) -> Iterator[DeviceNode]:
        """The device nodes for containers that are on the node now, in the order of their numbers."""
        with contextlib.suppress(DeviceError):  # nvidia-uvm is not loaded; the first claim says so
            yield from (node for node in self._control_nodes() if (self._dev / node.path[5:]).exists())
        yield from (DeviceNode(f"/dev/nvidia{minor}", _GPU_MAJOR, minor) for minor in _minors(self._dev, "nvidia"))
        caps = self._dev / "nvidia-caps"
        if minors := _minors(caps, "nvidia-cap"):
            with contextlib.suppress(DeviceError):
                major = self._major("nvidia-caps", "")
                yield from (DeviceNode(f"/dev/nvidia-caps/nvidia-cap{minor}", major, minor) for minor in minors)

    # ---------------------------------------------------------------- files of the driver

    def _driver(self) -> DriverFiles:
        """The NVIDIA driver's files. A new search runs if their main library is gone or the module has another version."""
        loaded = _loaded_version(self._proc)
        found = self._found
        if found is None or loaded not in (None, found.version) or not (self._root / found.anchor[1:]).exists():
            self._found = found = driver_files.search(self._root, loaded)
        return found

    def _hook(self) -> str | None:
        if self._given_hook is not None:
            check_hook(self._given_hook, self._root, self._host_root)
            return str(self._given_hook)
        places = (f"{folder}/nvidia-cdi-hook" for folder in _HOOK_FOLDERS)
        there = (real for place in places if (real := chroot.regular_file(self._root, place)))
        return next((str(self._host_root / real.relative_to(self._root)) for real in there), None)

    def _sockets(self) -> Iterator[tuple[str, str]]:
        """Sockets of the node's daemons, each with its path in the container."""
        for path in _SOCKETS:
            with contextlib.suppress(DeviceError):  # a link that leads out of the driver root
                if (real := chroot.resolve(self._root, path)).is_socket():
                    yield f"/{real.relative_to(self._root)}", f"/{path}"

    def _mount(self, source: str, target: str, options: tuple[str, ...] = _READ_ONLY) -> Mount:
        return Mount(str(self._host_root / source[1:]), target, options)


def check_hook(hook: Path, driver_root: Path, host_root: Path) -> None:
    """Refuse a hook that does not exist, because every container would fail. Paths outside the driver root cannot be
    checked."""
    if hook.is_relative_to(host_root) and chroot.regular_file(driver_root, str(hook.relative_to(host_root))) is None:
        raise DeviceError(
            f"--nvidia-cdi-hook-path is {hook}, and there is no such program below the driver root {driver_root}; wait until "
            "it is installed, give its path on the node, or leave the flag out to have the usual places searched"
        )


def _hooks(program: str, driver: DriverFiles) -> tuple[Hook, ...]:
    """First the links, then the loader's cache, which needs the links. `nvidia-cdi-hook` is a program of NVIDIA's
    toolkit."""
    name = "nvidia-cdi-hook"
    links = [argument for link, library in driver.links for argument in ("--link", f"{Path(library).name}::{link}")]
    folders = [argument for folder in driver.folders for argument in ("--folder", folder)]
    return (
        Hook("createContainer", program, (name, "create-symlinks", *links)),
        Hook("createContainer", program, (name, "update-ldcache", *folders)),
    )


def _loaded_version(proc: Path) -> str | None:
    """Version of the loaded kernel module; None if procfs does not have it."""
    match = _KERNEL_MODULE.search(_text(proc / "driver/nvidia/version"))
    return match[1] if match else None


def _numa_node(device: Path) -> int | None:
    text = _text(device / "numa_node").strip()
    return int(text) if text.isdigit() else None  # sysfs says -1 for "none"


def _pcie_root(device: Path, sys: Path) -> str | None:
    """`pci<domain>:<bus>`: the first folder below /sys/devices on the path of the card; None if it is not a PCIe root."""
    try:
        parts = device.resolve(strict=True).relative_to((sys / "devices").resolve()).parts
    except (OSError, ValueError):
        return None
    return parts[0] if parts[0].startswith("pci") and parts[-1] == device.name else None


def _some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _minors(folder: Path, name: str) -> list[int]:
    """The numbers of the files `name`<number> in a folder."""
    return sorted(
        int(path.name[len(name) :]) for path in folder.glob(f"{name}[0-9]*") if path.name[len(name) :].isdigit()
    )


def _text(path: Path) -> str:
    """The text of a file of procfs or sysfs; empty if there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _boot_id(path: Path) -> str:
    text = _text(path).strip()
    if not text:
        raise StateError(
            f"no boot id in {path}; without it the driver cannot tell records of an earlier boot from new ones; mount /proc"
        )
    return text


class SimHost:
    """A simulated node. The null device has our names, so that a container shows which devices it got. No mounts."""

    _NULL = (1, 3)  # Linux' allocated numbers of /dev/null

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def boot_id(self) -> str:
        return _boot_id(self._folder / "boot_id")

    def locate(self, gpu: Gpu) -> Gpu:
        """Two sockets of four cards, and one PCIe root for each card, unless the node file says otherwise."""
        numa_node = gpu.index // 4 if gpu.numa_node is None else gpu.numa_node
        return replace(gpu, numa_node=numa_node, pcie_root=gpu.pcie_root or f"pci{gpu.bus_id[:7]}")

    def common(self) -> ContainerEdits:
        return ContainerEdits(env={"GPUSLICE_SIMULATED": "true"})

    def nodes(self, minor: int, gi: int | None = None, ci: int | None = None) -> tuple[DeviceNode, ...]:
        card = f"/dev/gpuslice-sim{minor}"
        names = (card,) if gi is None else (card, f"{card}-gi{gi}", f"{card}-gi{gi}-ci{ci}")
        return tuple(DeviceNode(name, *self._NULL) for name in names)

    def advice(self) -> tuple[str, ...]:
        return ()
