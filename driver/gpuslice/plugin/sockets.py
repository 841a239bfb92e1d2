"""The names of the kubelet's sockets, the lock of each name, and the removal of the sockets and locks of killed
instances."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from gpuslice.errors import ConfigError, DriverError
from gpuslice.system import files, refusals

log = logging.getLogger(__name__)

# The NUL is part of the 108 bytes of sun_path (unix(7)). Go and C-core refuse 108 bytes, too.
LONGEST_PATH = 107
_SUFFIX = ".lock"
_UID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_POD = f"{_UID}|[A-Za-z0-9_-]{{11}}"  # or its short form
_ENDPOINT = re.compile(rf"dra(?:-({_POD}))?\.sock")


def registration_name(folder: Path, driver: str, pod_uid: str = "") -> str:
    """Name of the registration socket: deterministic, different for each driver and pod, as long as the path allows.

    Without a pod UID it is fixed. With a pod UID, the full UID is preferred. The hashed forms are those of the Go helper of
    Kubernetes 1.37. ConfigError if no form fits into a socket path.
    """
    if not pod_uid:
        return fitting(folder, [f"{driver}-reg.sock"])
    short = _digest(pod_uid.encode(), 8)
    both = _digest(f"{driver}\0{pod_uid}".encode(), 16)
    return fitting(folder, [f"{driver}-{pod_uid}-reg.sock", f"{driver}-{short}-reg.sock", f"dra-{both}-reg.sock"])


def dra_name(folder: Path, pod_uid: str = "") -> str:
    """Name of the socket of the service. With a pod's UID there is a short form, because MicroK8s has a long folder path."""
    short = _digest(pod_uid.encode(), 8)
    return fitting(folder, [f"dra-{pod_uid}.sock", f"dra-{short}.sock"] if pod_uid else ["dra.sock"])


def paths(
    *, driver: str, registry: Path, plugin_folder: Path, pod_uid: str, registration_socket: str
) -> tuple[Path, Path]:
    """The DRA socket and the registration socket. ConfigError if their names contradict each other or are too long."""
    if pod_uid and registration_socket:
        raise ConfigError(
            "--registration-socket and --pod-uid exclude each other, because a rolling update needs one socket name for each "
            "pod; remove one of the two"
        )
    name = fitting(registry, [registration_socket]) if registration_socket else ""
    return plugin_folder / dra_name(plugin_folder, pod_uid), registry / (
        name or registration_name(registry, driver, pod_uid)
    )


def _digest(data: bytes, length: int) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()[:length]).decode().rstrip("=")


def fitting(folder: Path, names: Sequence[str]) -> str:
    """The first of these names that fits into a socket path. ConfigError if none fits."""
    for name in names:
        if len(os.fsencode(folder / name)) <= LONGEST_PATH:
            return name
    path = folder / names[-1]
    raise ConfigError(
        f"socket path {path} has {len(os.fsencode(path))} bytes and {LONGEST_PATH} is the limit of unix sockets; choose a "
        "shorter folder or driver name"
    )


def exclusive(endpoint: Path, namespace: str) -> int:
    """Take the lock of the instance that serves this socket, until the process ends. ConfigError if another one has it.

    The lock holds the namespace of the instance's pod, for `others`.
    """
    lock = files.try_lock(_lock(endpoint))
    if lock is None:
        raise ConfigError(
            f"another instance serves {endpoint} already; stop it, or give each instance its own --pod-uid for a rolling "
            "update"
        )
    with contextlib.suppress(OSError):  # on a full disk the driver still unprepares, and its namespace is unknown
        os.ftruncate(lock, 0)
        os.write(lock, namespace.encode())
    return lock


def locks(plugin_folder: Path) -> list[Path]:
    """The lock files of the instances in this folder. An instance holds its lock until its process ends."""
    return sorted(path for path in plugin_folder.glob(f"*{_SUFFIX}") if _ENDPOINT.fullmatch(path.name[: -len(_SUFFIX)]))


def registrations(registry: Path, driver: str) -> list[Path]:
    """The registration sockets of all instances of this driver. The form for long folders is a hash, and not among them."""
    pattern = _registration(registry, driver)
    return sorted(path for path in registry.iterdir() if pattern.fullmatch(path.name)) if registry.is_dir() else []


def serving(plugin_folder: Path) -> dict[str, str]:
    """The instances that listen in this folder now: the namespace of each by its pod.

    "" as a pod: a process outside a pod. "" as a namespace: unknown, because instances of 0.1.0 write none. StateError if the
    folder cannot be read.
    """
    if not plugin_folder.exists():
        return {}
    with refusals.translated("read", plugin_folder):
        matches = [(path, _ENDPOINT.fullmatch(path.name)) for path in plugin_folder.iterdir()]
        here = {match[1] or "": path for path, match in matches if match and alive(path)}
    return {pod: _namespace(path) for pod, path in here.items()}


def _namespace(endpoint: Path) -> str:
    with contextlib.suppress(OSError):
        return _lock(endpoint).read_text(encoding="utf-8", errors="replace")
    return ""


def refuse_second(plugin_folder: Path, pod_uid: str, namespace: str) -> None:
    """ConfigError if an instance of another installation serves this node: both would write the same ResourceSlices.

    Instances of one namespace are a rolling update.
    """
    mine = namespace or (None if pod_uid else "")
    for pod, other in serving(plugin_folder).items():
        theirs = other or (None if pod else "")
        if mine is not None and theirs is not None and mine != theirs:
            who = f"pod {pod} in namespace {theirs}" if pod else "a process outside a pod"
            raise ConfigError(
                f"another driver of the same name serves this node with the folder {plugin_folder}: {who}; a node can have "
                "one, so remove one of the two installations"
            )


def remove_dead(registry: Path, plugin_folder: Path, driver: str) -> None:
    """Remove the sockets of killed instances of this driver, because the kubelet keeps each socket of its registry for ever.

    Only if no process listens, and no process holds the lock of the instance, because the instance may be starting. The
    form for long folders is a hash of driver and pod. Its owner is unknown, so such a socket stays.
    """
    try:
        _remove_dead(registry, plugin_folder, driver)
    except OSError as e:  # a socket that stays does no harm to this instance
        log.warning("cannot look for sockets of killed instances: %s", refusals.untranslated(e))


def _remove_dead(registry: Path, plugin_folder: Path, driver: str) -> None:
    locks = [path for path in plugin_folder.iterdir() if path.name.endswith(_SUFFIX)]
    matches = [(lock, _ENDPOINT.fullmatch(lock.name.removesuffix(_SUFFIX))) for lock in locks]
    alive = {match[1] or "" for lock, match in matches if match is not None and not _removed(lock)}
    alive |= {_digest(pod.encode(), 8) for pod in alive}
    for folder, name in ((plugin_folder, _ENDPOINT), (registry, _registration(registry, driver))):
        for path in folder.iterdir():
            match = name.fullmatch(path.name)
            if match is not None and (match[1] or "") not in alive and _is_dead(path):
                log.info("removing the socket of an instance that was killed: %s", path)
                with contextlib.suppress(DriverError):
                    files.remove(path)


def _registration(registry: Path, driver: str) -> re.Pattern[str]:
    """Names of this driver's registration sockets. The short form counts only if the driver uses it, because the name of
    another driver may look like it."""
    full = len(os.fsencode(registry / f"{driver}-{'0' * 36}-reg.sock")) <= LONGEST_PATH
    return re.compile(rf"{re.escape(driver)}(?:-({_UID if full else _POD}))?-reg\.sock")


def _lock(endpoint: Path) -> Path:
    return endpoint.with_name(f"{endpoint.name}{_SUFFIX}")


def _removed(lock: Path) -> bool:
    """Remove a lock that no process holds. Returns whether it was removed."""
    try:
        descriptor = files.try_lock(lock)
        if descriptor is None:
            return False
        try:
            files.remove(lock)  # while this process holds it: a waiting process then makes a new one
        finally:
            os.close(descriptor)
    except DriverError:
        return False
    return True


def alive(path: Path) -> bool:
    """Whether a process listens on this socket. False if there is no such socket. OSError if the folder cannot be read."""
    return path.is_socket() and not _is_dead(path)


def _is_dead(path: Path) -> bool:
    """Whether this is a socket on which no process listens."""
    if not path.is_socket():
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.setblocking(False)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:  # a full backlog or missing rights: a process may listen
            return False
    return False
