"""What the cluster has from the start: our manifests, and a pod whose token the driver uses."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import NODE, REPOSITORY
from hack.lib.cluster.parts import PAUSE

_NAMESPACE = "gpuslice-system"
_ACCOUNT = "gpuslice"
_POD = "gpuslice-on-node1"
_MANIFESTS = ("namespace", "rbac", "deviceclasses", "admission-policy")


class Kubectl:
    """`kubectl` for the administrator: call it with the arguments of kubectl. Returns the standard output."""

    def __init__(self, kube: Path, kubeconfig: Path) -> None:
        self._start = [str(kube), "kubectl", "--kubeconfig", str(kubeconfig)]

    def __call__(self, *arguments: str, given: str | None = None) -> str:
        return call([*self._start, *arguments], given)


def call(command: Sequence[str], given: str | None = None, environment: Mapping[str, str] | None = None) -> str:
    """Run a program to its end. Returns its standard output. PlaygroundError with the program's errors if it fails."""
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        reason = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise PlaygroundError(f"{Path(command[0]).name} {' '.join(command[1:4])} … failed: {reason}")
    return done.stdout


def busybox() -> Path:
    found = shutil.which("busybox")
    if found is None:
        raise PlaygroundError("there is no busybox on PATH, and the containers need it; apt-get install busybox-static")
    path = Path(found).resolve()
    if b"ld-linux" in path.read_bytes()[:4096]:
        raise PlaygroundError(
            f"{path} is not linked statically, so it cannot run in a container; apt-get install busybox-static"
        )
    return path


def install(kubectl: Kubectl) -> None:
    """Apply the manifests of deploy/ except the DaemonSets: here the driver runs as a process, so that it is easy to
    edit."""
    files = [argument for name in _MANIFESTS for argument in ("-f", str(REPOSITORY / "deploy" / f"{name}.yaml"))]
    kubectl("apply", *files)


def node_token(kubectl: Kubectl) -> str:
    """A token like the one that the kubelet mounts into a pod of the DaemonSet: for our account, bound to a pod on the node.

    The token tells the API server which node sends a request. The admission policy needs this.
    """
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": _POD, "namespace": _NAMESPACE, "labels": {"app.kubernetes.io/name": "gpuslice"}},
        "spec": {
            "serviceAccountName": _ACCOUNT,
            "nodeName": NODE,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "in-whose-name-the-driver-speaks", "image": PAUSE}],
        },
    }
    kubectl("apply", "-f", "-", given=json.dumps(pod))
    bound = ("--bound-object-kind=Pod", f"--bound-object-name={_POD}", "--duration=24h")
    return kubectl("create", "token", _ACCOUNT, f"--namespace={_NAMESPACE}", *bound).strip()
