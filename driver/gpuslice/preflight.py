"""What can be known of a node before the driver starts there: the command `gpuslice preflight`, one sentence per problem.

The init container of the driver's pod runs it, so `kubectl describe pod` has the sentences. Problems are of two kinds:

* With the first kind the driver cannot run at all. Such a problem always fails the step.
* With the second kind the driver can still unprepare claims, and without that, pods hang in Terminating. Such a problem
  fails the step, unless this node has prepared claims that no other instance serves. In a rolling update the old instance
  serves on until the new pod is ready, so a failure there changes nothing for pods.

A missing NVIDIA driver or GPU is no problem here, because the driver waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpuslice import node
from gpuslice.config import Config, check_cdi_root
from gpuslice.core.inventory import Inventory
from gpuslice.errors import ApiError, ConfigError, DriverError, LastingApiError, StateError
from gpuslice.kube import RIGHTS, Kube, right
from gpuslice.plugin import sockets
from gpuslice.system import refusals
from gpuslice.web.endpoint import Endpoint

_ANYWAY = "the driver starts all the same, because claims are prepared here and no other instance could unprepare them"


@dataclass(frozen=True, slots=True)
class Findings:
    """`problems` fail the step. `notes` do not."""

    problems: tuple[DriverError, ...]
    notes: tuple[str, ...]


def check(config: Config) -> None:
    """ConfigError for wrong settings and for a second installation on this node, before anything is opened or made."""
    if not config.node_name:
        raise ConfigError(
            "the name of the node is missing; use --node-name or NODE_NAME (in a pod: fieldRef spec.nodeName)"
        )
    sockets.paths(
        driver=config.driver_name,
        registry=config.kubelet_registrar_directory_path,
        plugin_folder=config.plugin_folder,
        pod_uid=config.pod_uid,
        registration_socket=config.registration_socket,
    )
    sockets.refuse_second(config.plugin_folder, config.pod_uid, config.pod_namespace)


def look(config: Config) -> Findings:
    """Everything that is wrong with this node and these settings. It changes nothing."""
    needed = [
        *_refusals(partial(check, config)),
        *_refusals(partial(node.read_policy, config.policy)),
        *_refusals(partial(check_cdi_root, config.cdi_root)),
    ]
    for folder, flag in (
        (config.plugin_folder, "--kubelet-plugins-directory-path"),
        (config.kubelet_registrar_directory_path, "--kubelet-registrar-directory-path"),
        (config.cdi_root, "--cdi-root"),
    ):
        needed += _refusals(partial(_writable, folder, flag))
    needed += _refusals(partial(_http_port, config))
    wanted = [*_refusals(partial(_driver_root, config)), *_refusals(partial(_kubelet, config))]
    notes: list[str] = []
    try:
        wanted += _missing_rights(Kube(config.kubeconfig))
    except ConfigError as e:
        needed.append(e)
    except LastingApiError as e:
        wanted.append(e)
    except ApiError as e:  # the driver waits for the API server, and unprepares claims without it
        notes.append(f"the rights of the driver are unknown: {e}")
    if not needed:
        notes += _of_policy(config)
    if _must_unprepare(config):
        return Findings(tuple(needed), (*(f"{error}; {_ANYWAY}" for error in wanted), *notes))
    return Findings((*needed, *wanted), tuple(notes))


def _refusals(look: Callable[[], object]) -> Iterator[DriverError]:
    try:
        look()
    except DriverError as e:
        yield e


def _writable(folder: Path, flag: str) -> None:
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise StateError(
            f"folder {folder} is not writable for uid {os.getuid()}; mount it writable, or name another one with {flag}"
        )


def _http_port(config: Config) -> None:
    """ConfigError if the HTTP port is not free: with the network of the node, another program may have it."""
    if config.http_endpoint and not sockets.serving(
        config.plugin_folder
    ):  # the port of a living instance is no mistake
        Endpoint.parse(config.http_endpoint).listen().close()


def _driver_root(config: Config) -> None:
    """StateError if the folder cannot be read. An empty or missing folder is one without an NVIDIA driver."""
    root = config.driver_root_ctr_path
    try:
        if not config.simulate and root.exists():
            os.listdir(root)  # noqa: PTH208 - names, not paths
    except OSError as e:
        raise StateError(
            f"the root of the NVIDIA driver, {config.nvidia_driver_root} on the node, cannot be read at {root}: "
            f"{e.strerror}; look at its file system, or name another root with --nvidia-driver-root"
        ) from e


def _kubelet(config: Config) -> None:
    """StateError if no kubelet listens below the folder: each kubelet serves its pod-resources API in its own folder
    (k8s.io/kubernetes, pkg/kubelet: ListenAndServePodResources)."""
    root = config.kubelet_plugins_directory_path.parent
    path = root / "pod-resources/kubelet.sock"
    with refusals.translated("look for", path):
        alive = sockets.alive(path)
    if not alive:
        raise StateError(
            f"{root} is not the folder of a running kubelet, because nothing listens on {path}; set kubeletRootDir of the "
            "chart (--kubelet-plugins-directory-path, --kubelet-registrar-directory-path) to the kubelet's --root-dir"
        )


def _missing_rights(kube: Kube) -> Iterator[ApiError]:
    missing = [right(verb, resource) for verb, resource in RIGHTS if not kube.may(verb, resource)]
    if missing:
        rules = " and ".join(
            f'{{apiGroups: ["{call.group}"], resources: ["{call.resource}"], verbs: ["{call.verb}"]}}'
            for call in missing
        )
        calls = " and ".join(map(str, missing))
        yield ApiError(
            f"the driver has no right to {calls}; add {rules} to the ClusterRole of this service account", 403
        )


def _of_policy(config: Config) -> Iterator[str]:
    """What of the policy has no effect on the cards that the last driver saw here. Empty before the first start."""
    gpus = node.last_seen(config.plugin_folder)
    if gpus:
        policy = node.read_policy(config.policy)
        yield from policy.unused(gpus)
        yield from node.sentences(Inventory.of(gpus, policy, config.node_name).notes, config.policy)


def _must_unprepare(config: Config) -> bool:
    """Whether claims of this node wait for the driver that starts now."""
    try:
        return not sockets.serving(config.plugin_folder) and any(config.plugin_folder.glob("claims/*/*.json"))
    except (OSError, StateError):
        return False
