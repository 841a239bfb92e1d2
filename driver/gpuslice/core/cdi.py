"""The CDI specification of a claim: everything that its containers get, as pure text, one file per claim.

Source of the format: the Container Device Interface specification, `SPEC.md`. Version 0.5.0 is the lowest that has
everything that we write (`hostPath` of a device node, device names that begin with a digit). A runtime with an older library
refuses any newer version number. Runtimes refuse 0.3.0 for a file that uses newer fields (measured: containerd 1.7, 2.1).

Every device of a file contains everything that all devices of a node share (driver libraries, control nodes). So one
device is enough, and no device depends on another file. The same device name in two files makes both files unusable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gpuslice.core.model import DeviceRef
from gpuslice.errors import ConfigError, StateError

VERSION = "0.5.0"

_Edit = TypeVar("_Edit")

# Without this value, the legacy NVIDIA hook injects GPUs a second time: all GPUs if the image asks for them.
_NO_LEGACY_HOOK = {"NVIDIA_VISIBLE_DEVICES": "void"}

# Two characters at least: a vendor or class of one letter makes containerd 1.7 and 2.1 panic in its directory watcher,
# and again at every start. A dot in the class would need CDI 0.6.0.
_VENDOR = re.compile(r"[A-Za-z][A-Za-z0-9_.-]*[A-Za-z0-9]")
_CLASS = re.compile(r"[A-Za-z][A-Za-z0-9_-]*[A-Za-z0-9]")
_DEVICE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?")
_UID = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
_ENV = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class DeviceNode:
    """A device node in the container. If type and major are given, the runtime makes the node itself.

    So the capability nodes of a partition work although the host does not have these nodes.
    """

    path: str
    major: int
    minor: int
    host_path: str | None = None
    permissions: str = "rw"  # of "rwm"; no "m": a container has no reason to make further nodes
    type: str = "c"


@dataclass(frozen=True, slots=True)
class Mount:
    """A bind mount. `host_path` is always a path of the host, also if the driver runs in a container."""

    host_path: str
    container_path: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hook:
    """An OCI hook: `name` is its moment ("createContainer"), `path` is of the host, `args[0]` the program's name."""

    name: str
    path: str
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerEdits:
    """Additions to a container. Hooks keep their order, because the links must exist before the loader's cache."""

    nodes: tuple[DeviceNode, ...] = ()
    mounts: tuple[Mount, ...] = ()
    hooks: tuple[Hook, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CdiDevice:
    """One device of a claim's file: its name (`device_name`) and its additions to the common edits."""

    name: str
    edits: ContainerEdits


# ---------------------------------------------------------------- names


def kind_of(driver_name: str) -> str:
    """CDI kind of this driver's claims, "<driver name>/claim". `ConfigError` if CDI forbids the name."""
    return _checked_kind(f"{driver_name}/claim")


def device_name(uid: str, index: int) -> str:
    """CDI name of a claim's `index`-th allocation. Runtimes keep specs in memory, so a name never serves two claims."""
    return f"{_checked_uid(uid)}-{index}"


def qualified(kind: str, name: str) -> str:
    """The full device name that the kubelet passes to the runtime: "<vendor>/<class>=<device>"."""
    return f"{_checked_kind(kind)}={_checked_device(name)}"


def file_name(kind: str, uid: str) -> str:
    """File name of a claim's spec, after CDI's convention for transient files."""
    vendor, _, class_ = _checked_kind(kind).partition("/")
    return f"{vendor}-{class_}_{_checked_uid(uid)}.json"


def _checked_kind(kind: str) -> str:
    vendor, _, class_ = kind.partition("/")
    if not _VENDOR.fullmatch(vendor) or not _CLASS.fullmatch(class_):
        raise ConfigError(
            f"CDI kind {kind!r} is not <vendor>/<class> with two or more characters each, a letter first, a letter or "
            "digit last and no dot in the class; choose another driver name"
        )
    return kind


def _checked_uid(uid: str) -> str:
    if not _UID.fullmatch(uid):
        raise StateError(
            f"claim UID {uid!r} cannot be part of a file or CDI name; a UID is letters, digits, '-', '_', '.'"
        )
    return uid


def _checked_device(name: str) -> str:
    if not _DEVICE.fullmatch(name):
        raise StateError(f"CDI device name {name!r} has characters that CDI forbids; use `device_name` to make it")
    return name


# ---------------------------------------------------------------- environment of a program


def labels(requests: Sequence[str]) -> tuple[str, ...]:
    """One label for each allocation of a claim, in order, unique in the claim: parts of environment variable names.

    Request "big-gpu" becomes BIG_GPU. If a request has several allocations, they are numbered from 0: BIG_GPU_0. If a
    numbered label equals the name of another request (requests "gpu" twice and "gpu-0"), the other request keeps the
    label and the numbering skips it.
    """
    plain = {_label(name) for name in requests}
    taken: set[str] = set()
    found = []
    for name in requests:
        label = _label(name)
        if requests.count(name) > 1 or label in taken:
            numbers = (f"{label}_{number}" for number in range(2 * len(requests) + 1))
            label = next(candidate for candidate in numbers if candidate not in plain | taken)
        taken.add(label)
        found.append(label)
    return tuple(found)


def _label(request: str) -> str:
    return re.sub(r"[^A-Z0-9]", "_", request.upper())


def limit_env(
    label: str,
    *,
    device: DeviceRef,
    uuid: str,
    enforcement: str,
    memory_mib: int | None = None,
    percent: int = 0,
    profile: str = "",
) -> dict[str, str]:
    """Environment variables that describe the device to a program. `label` from `labels`; `profile` is empty for a
    whole GPU.

    `enforcement` names the means that enforces the memory limit. `percent` is a ceiling on SMs (0: no ceiling). The runtime
    merges the environment of all devices of a container, so every name contains the label. Two claims that use the same
    request name in one container overwrite each other's figures. Claim names cannot prevent this, because templates
    give claims random names.
    """
    facts = {
        "DEVICE": str(device),
        "UUID": uuid,
        "MEMORY_MIB": None if memory_mib is None else str(memory_mib),
        "MEMORY_ENFORCEMENT": enforcement,
        "SM_PERCENT": str(percent) if percent else None,
        "PROFILE": profile or None,
    }
    return {f"GPUSLICE_{label}_{name}": value for name, value in facts.items() if value is not None}


def mps_client(pipe: str, shm: str, *, memory_mib: int, percent: int) -> ContainerEdits:
    """The edits that make a program in the container a client of an MPS daemon, with its own share of memory and SMs.

    The container must use the daemon's /dev/shm (NVIDIA's MPS documentation). It replaces a /dev/shm that the pod mounts.
    The variables can only lower the limits of the daemon (same documentation, v2 interface). The device is number 0 for
    the client, because its daemon serves only this device.
    """
    env = {"CUDA_MPS_PIPE_DIRECTORY": pipe, "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={memory_mib}M"}
    if percent:
        env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(percent)
    options = ("rw", "nosuid", "nodev", "bind", "rprivate")
    shared = Mount(shm, "/dev/shm", options)  # noqa: S108 - a path in the container
    return ContainerEdits(mounts=(Mount(pipe, pipe, options), shared), env=env)


# ---------------------------------------------------------------- the file


def spec(uid: str, kind: str, devices: Sequence[CdiDevice], common: ContainerEdits) -> dict[str, object]:
    """The claim's CDI file. Equal arguments give equal text. `StateError` for content that every runtime refuses."""
    names = [device.name for device in devices]
    if len(set(names)) != len(names) or not all(name.startswith(f"{_checked_uid(uid)}-") for name in names):
        raise StateError(
            f"CDI device names {names} of claim {uid} must differ and begin with its UID; use `device_name`"
        )
    if not devices:
        raise StateError(
            f"claim {uid} has no devices of this driver, so it needs no CDI file; CDI forbids an empty one"
        )
    return {
        "cdiVersion": VERSION,
        "kind": _checked_kind(kind),
        "devices": [
            {"name": _checked_device(device.name), "containerEdits": _edits(_merged(common, device.edits))}
            for device in devices
        ],
    }


def _merged(common: ContainerEdits, own: ContainerEdits) -> ContainerEdits:
    env = dict(_NO_LEGACY_HOOK)
    for name, value in (*common.env.items(), *own.env.items()):
        if env.setdefault(name, value) != value or not _ENV.fullmatch(name):
            raise StateError(f"environment variable {name!r} of a CDI device is misspelt or has two values; rename one")
    return ContainerEdits(
        nodes=_unique((*common.nodes, *own.nodes), lambda node: node.path),
        mounts=_unique((*common.mounts, *own.mounts), lambda mount: mount.container_path),
        hooks=tuple(dict.fromkeys((*common.hooks, *own.hooks))),
        env=env,
    )


def _unique(items: Iterable[_Edit], place: Callable[[_Edit], str]) -> tuple[_Edit, ...]:
    """Each path in the container once, sorted by path. Two different entries for one path are an error."""
    found: dict[str, _Edit] = {}
    for item in items:
        if found.setdefault(place(item), item) != item:
            raise StateError(f"two CDI edits want {place(item)} in the container: {found[place(item)]} and {item}")
    return tuple(found[name] for name in sorted(found))


def _edits(wanted: ContainerEdits) -> dict[str, object]:
    edits: dict[str, list[object]] = {
        "env": [f"{name}={wanted.env[name]}" for name in sorted(wanted.env)],
        "deviceNodes": [_node(node) for node in wanted.nodes],
        "mounts": [_mount(mount) for mount in wanted.mounts],
        "hooks": [{"hookName": hook.name, "path": hook.path, "args": list(hook.args)} for hook in wanted.hooks],
    }
    return {name: values for name, values in edits.items() if values}


def _node(node: DeviceNode) -> dict[str, object]:
    host = {} if node.host_path is None else {"hostPath": node.host_path}
    numbers = {"type": node.type, "major": node.major, "minor": node.minor}
    return {"path": node.path, **host, **numbers, "permissions": node.permissions}


def _mount(mount: Mount) -> dict[str, object]:
    return {"hostPath": mount.host_path, "containerPath": mount.container_path, "options": list(mount.options)}
