"""What operators do with an installed driver, and whether its pods with GPUs notice it."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hack.lib.cluster.installed import CHART, NAMESPACE, RELEASE
from tests.kit.cluster.bodies import Body, exactly, profile
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.wanted import HACK_CLUSTER
from tests.kit.mps_node import StandInProgram

DRIVER = "app.kubernetes.io/name=gpuslice"
SUPERVISOR = "app.kubernetes.io/name=gpuslice-mps-supervisor"
KEPT = ("--reset-then-reuse-values",)  # what docs/upgrade.md says
_TIMEOUT = "--timeout=120s"
REQUESTS = {  # one of each mode
    "gpu": exactly("gpu"),
    "mig": exactly("mig", where=profile("1g.10gb")),
    "mps": exactly("mps", capacity={"memory": "9Gi"}),
    "timeslice": exactly("timeslice", capacity={"memory": "9Gi"}),
}


def helm(*arguments: str, namespace: str = NAMESPACE) -> str:
    done = run_helm(*arguments, namespace=namespace)
    assert done.returncode == 0, f"helm {' '.join(arguments)}: {done.stderr}"
    return done.stdout


def run_helm(*arguments: str, namespace: str = NAMESPACE) -> subprocess.CompletedProcess[str]:
    """Run Helm as the administrator. It may be refused."""
    command = [*HACK_CLUSTER, "helm", *arguments, "--namespace", namespace]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def typed(cluster: Cluster, command: str, names: Mapping[str, str]) -> str:
    """Run a command line of a page, of kubectl or Helm, with these names in place of its placeholders; what it prints."""
    for placeholder, name in names.items():
        command = re.sub(rf"\b{placeholder}\b", name, command)
    program, *words = shlex.split(command)
    if program == "kubectl":
        return cluster.kubectl(*words)
    done = subprocess.run([*HACK_CLUSTER, program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def upgrade(cluster: Cluster, *values: str) -> None:
    """`helm upgrade` to these values besides those of before. Return when all pods of the driver are new and ready."""
    helm("upgrade", RELEASE, str(CHART), *KEPT, *values, "--wait", _TIMEOUT)
    rolled_out(cluster)


def rollback(cluster: Cluster) -> None:
    """Go back to the release before."""
    helm("rollback", RELEASE, "--wait", _TIMEOUT)
    rolled_out(cluster)


def rolled_out(cluster: Cluster) -> None:
    """Return when the driver's pods are those of the DaemonSet, ready, and no old pod is left."""
    cluster.kubectl("rollout", "status", "daemonset/gpuslice", f"--namespace={NAMESPACE}", _TIMEOUT)
    ending = [
        body["metadata"]["name"] for body in own_pods(cluster, DRIVER) if body["metadata"].get("deletionTimestamp")
    ]
    if ending:
        gone = [f"pod/{name}" for name in ending]
        cluster.kubectl("wait", "--for=delete", *gone, f"--namespace={NAMESPACE}", _TIMEOUT)


def own_pods(cluster: Cluster, label: str) -> list[Body]:
    return cluster.get("pods", f"--namespace={NAMESPACE}", f"--selector={label}")


def own_uid(cluster: Cluster, label: str) -> str:
    """The UID of the one pod of driver or supervisor."""
    (body,) = own_pods(cluster, label)
    return str(body["metadata"]["uid"])


def delete_own(cluster: Cluster, *labels: str) -> None:
    """Delete the pods of driver or supervisor. Return when they are gone and their successors are ready."""
    old = [body["metadata"] for label in labels for body in own_pods(cluster, label)]
    gone = [f"pod/{one['name']}" for one in old]
    cluster.kubectl("delete", *gone, f"--namespace={NAMESPACE}", _TIMEOUT)
    for label in labels:
        _wait_ready(cluster, label, {one["uid"] for one in old})


def _wait_ready(cluster: Cluster, label: str, old: set[str]) -> None:
    def is_next(text: str) -> bool:
        uid, _, ready = text.partition(" ")
        return uid not in old and ready == "True"

    chosen = ("pods", f"--namespace={NAMESPACE}", f"--selector={label}")
    shows = "{.metadata.uid} {.status.conditions[?(@.type=='Ready')].status}"
    cluster.until(*chosen, shows=shows, wanted=is_next, within_s=120.0)


@dataclass(frozen=True, slots=True)
class Running:
    """Pods with GPUs that run, with what changes if anything disturbs one of them."""

    cluster: Cluster
    pods: Sequence[str]
    seen: dict[str, tuple[str, str, int]]
    failed: int

    @classmethod
    def of(cls, cluster: Cluster, pods: Sequence[str]) -> Running:
        cluster.runs(*pods)
        return cls(cluster, tuple(pods), _seen(cluster, pods), cluster.prepares()["true"])

    def undisturbed(self) -> bool:
        """Whether each pod is the same, with the same container, and the kubelet saw no prepare fail."""
        now = _seen(self.cluster, self.pods), self.cluster.prepares()["true"]
        assert now == (self.seen, self.failed)
        return True


def _seen(cluster: Cluster, pods: Sequence[str]) -> dict[str, tuple[str, str, int]]:
    """UID, container and restarts of each pod; a pod that is not there or not ready has none."""
    found = {}
    for body in cluster.get("pods", "--namespace=default"):
        if body["metadata"]["name"] in pods:
            (status,) = body["status"]["containerStatuses"]
            if status["ready"]:
                found[body["metadata"]["name"]] = (
                    body["metadata"]["uid"],
                    status["containerID"],
                    status["restartCount"],
                )
    return found


@contextlib.contextmanager
def mps_client(cluster: Cluster, pod: str) -> Iterator[StandInProgram]:
    """A stand-in CUDA program of a share of 9Gi, beside its container: it has the node's process ids, as MPS asks for.

    The image of the pods has no Python, so the program runs on the node, with the share's pipe directory.
    """
    said = cluster.kubectl("exec", pod, "--", "sh", "-c", "echo $CUDA_MPS_PIPE_DIRECTORY").strip()
    program = StandInProgram(Path(said), inside=["nsenter", "--target", str(cluster.outlives), "--mount", "--pid"])
    try:
        assert program.got()[0] == "9216"
        yield program
    finally:
        program.process.kill()
        program.process.communicate()
