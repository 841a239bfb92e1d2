"""The commands that remove the driver: `uninstall` on the cluster, `cleanup` on a node."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from gpuslice import config
from gpuslice.commands import texts
from gpuslice.commands.parser import add
from gpuslice.errors import ConfigError

_TIMEOUT_S = 270  # Helm itself waits for 300 s, and its own timeout would name no reason
_FLAGS = {
    "namespace": ("NAME", "namespace of the driver; a pod gets it by fieldRef metadata.namespace"),
    "manifest": ("FILE", "the DaemonSet that runs gpuslice cleanup on each node"),
    "timeout": ("SECONDS", f"end of all waits; default {_TIMEOUT_S}"),
    "helm_release": ("NAME", "the release of Helm that is uninstalled, for the sentence about a refusal"),
    "helm_revision": ("NUMBER", "its revision"),
}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    uninstall = add(commands, "uninstall", "remove the driver from the nodes of a cluster", _uninstall,
                    about=texts.UNINSTALL, examples=texts.UNINSTALL_EXAMPLES)  # fmt: skip
    config.add_flags(uninstall, "kubeconfig")
    for name, (kind, text) in _FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        uninstall.add_argument(flag, metavar=kind, help=f"{text} (env {name.upper()})")
    cleanup = add(commands, "cleanup", "remove what the driver left on this node", _cleanup,
                  about=texts.CLEANUP, examples=texts.CLEANUP_EXAMPLES)  # fmt: skip
    cleanup.add_argument("--check", action="store_true", help="only wait until no claim is prepared, for 20 s at most")
    cleanup.add_argument(
        "--mps-root-ctr-path",
        metavar="FOLDER",
        help="the folder of --mps-root as this process sees it (env MPS_ROOT_CTR_PATH; default the same path)",
    )
    config.add_flags(cleanup, *config.CLEANUP_FLAGS)


def _uninstall(parsed: argparse.Namespace) -> int:
    asked = {name: getattr(parsed, name) or os.environ.get(name.upper(), "") for name in _FLAGS}
    if not asked["namespace"]:
        raise ConfigError("the namespace of the driver is missing; use --namespace or NAMESPACE")
    if not asked["manifest"]:
        raise ConfigError("the DaemonSet of the clean-up is missing; use --manifest or MANIFEST")
    timeout_s = asked["timeout"] or str(_TIMEOUT_S)
    if not timeout_s.isascii() or not timeout_s.isdecimal():
        raise ConfigError(f"--timeout is {timeout_s!r} and must be a whole number of seconds, such as {_TIMEOUT_S}")
    from gpuslice.api import Api
    from gpuslice.core.removal import Helm
    from gpuslice.uninstall import manifest
    from gpuslice.uninstall.cluster import Cluster
    from gpuslice.uninstall.steps import Uninstall

    cleanup = manifest.read(Path(asked["manifest"]))
    api = Api(config.read(parsed).kubeconfig)
    Uninstall(
        cluster=Cluster(api, asked["namespace"], config.DRIVER_NAME),
        cleanup=cleanup,
        until=time.monotonic() + int(timeout_s),
        say=_say,
        helm=Helm(asked["helm_release"], asked["helm_revision"]),
    ).run()
    return 0


def _cleanup(parsed: argparse.Namespace) -> int:
    from gpuslice.uninstall import cleanup

    settings = config.check_paths(config.read(parsed))
    if parsed.check:
        cleanup.check(settings)
        _say("no claim is prepared on this node")
    else:
        here = parsed.mps_root_ctr_path or os.environ.get("MPS_ROOT_CTR_PATH", "")
        cleanup.clean(settings, _say, Path(here) if here else None)
    return 0


def _say(sentence: str) -> None:
    print(sentence, flush=True)
