"""`Config`: the settings of the operator, checked once. Only `app.py` and the commands read it; other modules get values.

Order: defaults → environment → flags. Every flag --some-name has the environment variable SOME_NAME, so that a
DaemonSet's downward API (NODE_NAME, POD_UID) fits without a script. Flags with the same meaning as in NVIDIA's driver have
its names.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from gpuslice.errors import ConfigError

DRIVER_NAME = "gpuslice.dev"
LATENCIES = ("realistic", "zero", "serial")
LEVELS = ("debug", "info", "warning", "error")
# plugins/<driver>/dra-<36 characters of a pod UID>.sock has to stay within the 107 bytes of a socket path.
_LONGEST_DRIVER_NAME = 36
_DNS = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    driver_name: str = DRIVER_NAME
    node_name: str = ""
    pod_uid: str = ""
    pod_namespace: str = ""
    kubeconfig: Path | None = None
    kubelet_registrar_directory_path: Path = Path("/var/lib/kubelet/plugins_registry")
    kubelet_plugins_directory_path: Path = Path("/var/lib/kubelet/plugins")
    registration_socket: str = ""
    cdi_root: Path = Path("/var/run/cdi")
    nvidia_driver_root: Path = Path("/")
    driver_root_ctr_path: Path = Path("/")
    nvidia_cdi_hook_path: Path | None = None
    policy: Path | None = None
    mps_root: Path = Path("/run/gpuslice/mps")
    http_endpoint: str = ""
    log_level: str = "info"
    simulate: str = ""
    simulate_folder: Path | None = None
    simulate_latency: str = "realistic"

    def __post_init__(self) -> None:
        _check_driver_name(self.driver_name)
        if "/" in self.registration_socket or self.registration_socket in (".", ".."):
            raise ConfigError(
                f"--registration-socket is {self.registration_socket!r} and must be the name of a file in the kubelet's "
                "registry folder; leave the folder out"
            )
        _one_of("log level", self.log_level, LEVELS)
        _one_of("simulated latency", self.simulate_latency, LATENCIES)
        if not self.simulate and self.simulate_folder is not None:
            raise ConfigError(
                "--simulate-folder has no effect without --simulate; add --simulate with the cards, or leave it out"
            )

    @property
    def plugin_folder(self) -> Path:
        """The kubelet's folder for this driver, with its sockets, locks and records."""
        return self.kubelet_plugins_directory_path / self.driver_name

    @property
    def simulated_node(self) -> Path:
        return self.simulate_folder or self.plugin_folder / "simulated"


# Other processes get these paths as they are typed, and their working folder is another one.
_READ_BY = {
    "kubelet_registrar_directory_path": "the kubelet",
    "kubelet_plugins_directory_path": "the kubelet",
    "cdi_root": "the container runtime",
    "nvidia_driver_root": "the container runtime",
    "driver_root_ctr_path": "a program from this folder",
    "nvidia_cdi_hook_path": "the container runtime",
    "mps_root": "each container",
}

_LEAST_DESCRIPTORS = 64  # a driver at rest has 23 open, and ten prepares at once take ten more (measured)

# The default folders of container runtimes for CDI files.
_USUAL_CDI_ROOTS = (Path("/var/run/cdi"), Path("/run/cdi"), Path("/etc/cdi"))


def check_paths(config: Config) -> Config:
    """The same config. ConfigError if a path would have another meaning, or none, for the process that gets it."""
    for name, reader in _READ_BY.items():
        path: Path | None = getattr(config, name)
        if path is not None and not path.is_absolute():
            raise ConfigError(
                f"{_flag(name)} is {str(path)!r}, a relative path, but {reader} has another working folder; name the whole "
                f"path, such as {str(Path.cwd() / path)!r}"
            )
    return config


def check_descriptors() -> None:
    """ConfigError if the limit of open files is so low that gRPC's C-core would abort this process without a message."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= limit < _LEAST_DESCRIPTORS:
        raise ConfigError(
            f"this process may have {limit} files open, and it needs {_LEAST_DESCRIPTORS}; raise the limit of open files of "
            "its container or unit"
        )


def check_cdi_root(folder: Path) -> None:
    """Refuse a folder that no runtime reads, because each container would fail without an error here."""
    if folder not in _USUAL_CDI_ROOTS and not folder.exists():
        usual = " and ".join(str(path) for path in _USUAL_CDI_ROOTS if path != Path("/run/cdi"))
        raise ConfigError(
            f"--cdi-root is {folder}, which does not exist; container runtimes read {usual}, so name one of them, or create "
            "the folder where the configuration of the runtime names it"
        )


# The settings that `mps-supervisor` needs.
SUPERVISOR_FLAGS = (
    "mps_root",
    "driver_root_ctr_path",
    "log_level",
    "driver_name",
    "kubelet_plugins_directory_path",
    "simulate",
    "simulate_folder",
)

# The settings that `devices` and `claims` need.
NODE_FLAGS = (
    "driver_name",
    "node_name",
    "kubelet_plugins_directory_path",
    "nvidia_driver_root",
    "driver_root_ctr_path",
    "policy",
    "simulate",
    "simulate_folder",
)

# The settings that `cleanup` needs.
CLEANUP_FLAGS = (
    "driver_name",
    "kubelet_registrar_directory_path",
    "kubelet_plugins_directory_path",
    "cdi_root",
    "mps_root",
    "simulate",
    "simulate_folder",
)

# The settings that `preflight` needs.
PREFLIGHT_FLAGS = (
    "driver_name",
    "node_name",
    "pod_uid",
    "pod_namespace",
    "kubeconfig",
    "kubelet_registrar_directory_path",
    "kubelet_plugins_directory_path",
    "registration_socket",
    "cdi_root",
    "nvidia_driver_root",
    "driver_root_ctr_path",
    "policy",
    "http_endpoint",
    "simulate",
)

# The settings that `policy check` needs.
POLICY_FLAGS = ("nvidia_driver_root", "driver_root_ctr_path", "simulate")

# The values of the flags with a fixed set of values.
CHOICES = {"log_level": LEVELS, "simulate_latency": LATENCIES}

_KINDS = {
    "driver_name": "NAME",
    "node_name": "NAME",
    "pod_uid": "UID",
    "pod_namespace": "NAME",
    "kubeconfig": "FILE",
    "kubelet_registrar_directory_path": "FOLDER",
    "kubelet_plugins_directory_path": "FOLDER",
    "registration_socket": "NAME",
    "cdi_root": "FOLDER",
    "nvidia_driver_root": "FOLDER",
    "driver_root_ctr_path": "FOLDER",
    "nvidia_cdi_hook_path": "FILE",
    "policy": "FILE",
    "mps_root": "FOLDER",
    "http_endpoint": "ENDPOINT",
    "log_level": "LEVEL",
    "simulate": "NODE",
    "simulate_folder": "FOLDER",
    "simulate_latency": "LATENCY",
}

_HELP = {
    "driver_name": "name of the DRA driver, and the domain of its attributes",
    "node_name": "name of the Node object of this node; a pod gets it by fieldRef spec.nodeName",
    "pod_uid": "UID of the driver's own pod; it makes socket names unique, so that rolling updates work",
    "pod_namespace": "namespace of the driver's own pod; instances of two namespaces are two installations",
    "kubeconfig": "kubeconfig file; without one, the service account of the pod",
    "kubelet_registrar_directory_path": "folder where the kubelet looks for registration sockets",
    "kubelet_plugins_directory_path": "folder of the kubelet's plugins; the driver uses <this folder>/<driver name>",
    "registration_socket": "fixed name of the registration socket; not together with --pod-uid",
    "cdi_root": "folder where the container runtime looks for CDI specs",
    "nvidia_driver_root": "root of the NVIDIA driver as the host sees it",
    "driver_root_ctr_path": "root of the NVIDIA driver as this process sees it",
    "nvidia_cdi_hook_path": "path of nvidia-cdi-hook on the host; without it, the driver searches the usual places",
    "policy": "policy file: what each GPU may offer (docs/policy.md)",
    "mps_root": "folder of the MPS supervisor and its daemons; the same path on the host and in every container",
    "http_endpoint": "port, host:port or [IPv6]:port for /metrics, /healthz, /readyz and a page at /; empty: no HTTP server",
    "log_level": f"least level of log lines: one of {', '.join(LEVELS)}",
    "simulate": "simulate these cards, e.g. h100x8 or a100-40gx2+l4, or those of a file (docs/simulator.md)",
    "simulate_folder": "folder of the simulated node, which keeps its state from one start to the next",
    "simulate_latency": f"how long simulated calls take: one of {', '.join(LATENCIES)}",
}


def add_flags(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add these settings as flags (all if none is named); each help text names the environment variable."""
    for field in fields(Config):
        if names and field.name not in names:
            continue
        default = field.default or ""
        shown = f"; default {default}" if default else ""
        parser.add_argument(
            _flag(field.name),
            metavar=_KINDS[field.name],
            help=f"{_HELP[field.name]} (env {field.name.upper()}{shown})",
        )


def read(arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Config:
    """Build the checked config from flags and environment. ConfigError names the flag."""
    values: dict[str, object] = {}
    for field in fields(Config):
        text = getattr(arguments, field.name, None)
        if text is None:
            text = environment.get(field.name.upper()) or None
        if text is not None:
            values[field.name] = Path(text) if "Path" in str(field.type) else text
    return Config(**values)  # type: ignore[arg-type]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_driver_name(name: str) -> None:
    if len(name) > _LONGEST_DRIVER_NAME:
        raise ConfigError(
            f"driver name {name!r} has {len(name)} characters and may have at most {_LONGEST_DRIVER_NAME} characters, "
            "because it is part of socket paths; choose another --driver-name"
        )
    if not _DNS.fullmatch(name):
        remedy = f"write {name.lower()}" if _DNS.fullmatch(name.lower()) else f"write one such as {DRIVER_NAME}"
        raise ConfigError(f"driver name {name!r} must be a DNS name of lower-case letters, digits, - and .; {remedy}")


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{what} {value!r} is not known; use one of: {', '.join(known)}")
