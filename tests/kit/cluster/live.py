"""The cluster as a user has it: kubectl, and the files of deploy/examples."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from gpuslice.core.model import Partition
from gpuslice.mps.paths import Paths
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.system.folder_watch import FolderWatch

from hack.lib.api import fetch
from tests.kit.cluster.bodies import DRIVER, STAY, Body
from tests.kit.cluster.wanted import HACK_CLUSTER, ROOT

EXAMPLES = ROOT / "deploy" / "examples"
_WAIT = "--timeout=60s"  # wiped slices are back within half a minute
_TIMEOUT_S = 30.0
_ALLOCATIONS = "{range .items[*]}{.metadata.name} {.status.allocation.devices.results}{'\\n'}{end}"
_KINDS = "pods,resourceclaims,resourceclaimtemplates"


class Cluster:
    def __init__(self) -> None:
        self.facts: dict[str, Any] = json.loads(_call([*HACK_CLUSTER, "status", "--json"]))
        self.folder = Path(self.facts["folder"])
        self.spoiled = ""  # what could not be removed; no further test can tell anything then
        self.namespaces: list[str] = []
        # The program that is the API server is kubectl as well: no detour by hack/cluster, which costs as much again.
        program = str(Path(f"/proc/{self.facts['processes']['kube-apiserver']}/exe").readlink())
        self._kubectl = [program, "kubectl", f"--kubeconfig={self.folder / 'admin.conf'}"]

    @property
    def version(self) -> tuple[int, int]:
        """Of Kubernetes: (1, 37)."""
        major, minor, _ = self.facts["version"].split(".")
        return int(major), int(minor)

    def command(self, *arguments: str) -> list[str]:
        """The command line of kubectl, for what goes on beside a test."""
        return [*self._kubectl, *arguments]

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        return _call(self.command(*arguments), given)

    def get(self, *what: str) -> list[Body]:
        found: Body = json.loads(self.kubectl("get", *what, "--output=json", "--show-managed-fields"))
        return list(found["items"])

    def process(self, part: str) -> int:
        return int(_call([*HACK_CLUSTER, "status", "--pid", part]))

    @property
    def outlives(self) -> int:
        """The process id of a part that also outlives a reboot of the node. It has the node's namespaces."""
        return int(self.facts["processes"]["etcd"])

    # ------------------------------------------------------------ examples

    def run_as_it_is(self, example: str) -> list[str]:
        """Apply an example, wait until its pods have done what they do, and delete it; what the pods wrote."""
        file = str(EXAMPLES / f"{example}.yaml")
        self.kubectl("apply", "-f", file)
        try:
            return [log for document in _documents(example) for log in self._ended(document)]
        finally:
            self.kubectl("delete", "-f", file, "--grace-period=1", _WAIT)

    def _ended(self, document: Body) -> Iterator[str]:
        kind, name = document["kind"], document["metadata"]["name"]
        place = f"--namespace={document['metadata'].get('namespace', 'default')}"
        if kind in ("Deployment", "DaemonSet"):
            self.kubectl("rollout", "status", f"{kind}/{name}", place, _WAIT)
        elif kind == "Pod":
            self.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{name}", place, _WAIT)
        else:
            return
        yield self.kubectl("logs", f"{kind}/{name}", place, "--all-containers")

    def apply(self, example: str, *, name: str = "", command: tuple[str, ...] = STAY, restart: str = "Never") -> str:
        """Create what an example says, but with a container that stays, or runs `command`; the name of its pod."""
        documents = list(_documents(example))
        for document in documents:
            if name:
                _rename(document, name)
            if document["kind"] == "Pod":
                document["spec"]["restartPolicy"] = restart
                for container in document["spec"]["containers"]:
                    container["command"] = list(command)
        self.kubectl("apply", "-f", "-", given=yaml.safe_dump_all(documents))
        return name or example

    # ------------------------------------------------------------ objects

    def create(self, *bodies: Body) -> None:
        self.kubectl("create", "-f", "-", given=yaml.safe_dump_all(bodies))

    def namespace(self, **labels: str) -> str:
        """A new one, which goes after the test."""
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"generateName": "test-", "labels": labels}}
        self.namespaces.append(self.kubectl("create", "-f", "-", "--output=name", given=json.dumps(body)).strip()[10:])
        self.kubectl("wait", "--for=create", "serviceaccount/default", f"--namespace={self.namespaces[-1]}", _WAIT)
        return self.namespaces[-1]

    def until(self, *what: str, shows: str, wanted: Callable[[str], bool], within_s: float = _TIMEOUT_S) -> str:
        """Watch objects until one `shows` (a jsonpath) what is wanted; that text. What is there already counts too."""
        command = ["get", *what, "--watch", f"--output=jsonpath={shows}{{'\\n'}}", f"--request-timeout={within_s:.0f}s"]
        seen = []
        with subprocess.Popen(
            [*self._kubectl, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as watch:
            assert watch.stdout is not None
            try:
                for line in watch.stdout:
                    seen.append(line.rstrip("\n"))
                    if wanted(seen[-1]):
                        return seen[-1]
            finally:
                watch.kill()
        raise AssertionError(f"{' '.join(what)} never showed what was waited for, but: {seen}")

    def event(self, pod: str, reason: str, contains: str = "") -> str:
        """Wait until the pod has an event of this reason with these words; its sentence."""
        fields = f"--field-selector=involvedObject.name={pod},reason={reason}"
        return self.until("events", fields, shows="{.message}", wanted=lambda text: contains in text)

    # ------------------------------------------------------------ pods

    def runs(self, *pods: str, namespace: str = "default") -> None:
        """Return when the pods are ready."""
        names = [f"pod/{pod}" for pod in pods]
        self.kubectl("wait", "--for=condition=Ready", *names, f"--namespace={namespace}", _WAIT)

    def has_to_wait(self, pod: str) -> str:
        """Return when the scheduler has found no place for it; its sentence."""
        self.kubectl("wait", "--for=condition=PodScheduled=False", f"pod/{pod}", _WAIT)
        return self.kubectl(
            "get", f"pod/{pod}", "--output=jsonpath={.status.conditions[?(@.type=='PodScheduled')].message}"
        )

    def environment(self, pod: str, container: str = "", namespace: str = "default") -> dict[str, str]:
        """What the driver put into the environment of a running container."""
        chosen = [f"--container={container}"] if container else []
        return environment(self.kubectl("exec", pod, f"--namespace={namespace}", *chosen, "--", "env"))

    def allocated(self, namespace: str = "default") -> dict[str, list[str]]:
        """Devices by the pods that hold them: pool and name."""
        found: dict[str, list[str]] = {}
        for body in self.get("resourceclaims", f"--namespace={namespace}"):
            results = body.get("status", {}).get("allocation", {}).get("devices", {}).get("results", ())
            for user in body.get("status", {}).get("reservedFor", ()):
                found.setdefault(user["name"], []).extend(f"{one['pool']}/{one['device']}" for one in results)
        return found

    def delete(self, *pods: str, namespace: str = "default") -> None:
        """Return when the kubelet has unprepared their claims."""
        self.kubectl("delete", "pod", *pods, "--grace-period=1", f"--namespace={namespace}", _WAIT)

    def clear(self) -> None:
        """Remove the pods and claims of a test; `spoiled` where something of them stays."""
        try:
            for namespace in ("default", *self.namespaces):
                place = f"--namespace={namespace}"
                self.kubectl("delete", _KINDS, "--all", "--grace-period=1", "--ignore-not-found", place, _WAIT)
            if self.namespaces:
                self.kubectl("delete", "namespace", "--wait=false", *self.namespaces)
            self.namespaces.clear()
            self.nothing_stays()
        except AssertionError as e:
            self.spoiled = str(e)
            raise

    # ------------------------------------------------------------ the node

    @cached_property
    def node(self) -> SimNvml:
        """The simulated cards, from outside of the driver."""
        return SimNvml(self._plugin / "simulated", latency="zero")

    @property
    def _plugin(self) -> Path:
        return self.folder / "kubelet" / "plugins" / DRIVER

    @property
    def _mps(self) -> Path:
        """Where the supervisor is: of an installed one, its folder below the node's /run, which only the node sees."""
        if self.facts["installed"]:
            return Path(f"/proc/{self.outlives}/root/run/gpuslice/mps")
        return self.folder / "mps"

    def cdi_files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "cdi").iterdir())

    def records(self) -> list[str]:
        return sorted(path.name for path in (self._plugin / "claims").rglob("*.json"))

    def partitions(self) -> list[Partition]:
        return [partition for card in self.node.cards for partition in self.node.look(card.uuid).partitions]

    def daemons(self) -> tuple[str, ...]:
        """Keys of the MPS daemons."""
        return Paths(self._mps).known()

    def nothing_stays(self) -> None:
        """Return when the last record is gone. AssertionError where it stays, or something that no record knows of."""
        (folder,) = (self._plugin / "claims").iterdir()
        end = time.monotonic() + _TIMEOUT_S
        with contextlib.closing(FolderWatch(folder)) as watch:
            while self.records():
                ready, _, _ = select.select([watch], [], [], max(0.0, end - time.monotonic()))
                assert ready, f"claims are never unprepared: {self.records()}"
                watch.read()
        assert (self.cdi_files(), self.partitions(), self.daemons()) == ([], [], ())

    def prepares(self) -> dict[str, int]:
        """How often the kubelet had resources prepared, by "true" for those that failed and "false"."""
        name = r'dra_operations_duration_seconds_count{is_error="(\w+)",operation_name="PrepareResources"} (\d+)'
        port = json.loads((self.folder / "cluster.json").read_text())["ports"]["kubelet"]
        # The API server's way to it is barred: it forwards to no loopback address.
        found = re.findall(name, fetch(f"https://127.0.0.1:{port}/metrics").decode())
        return {"true": 0, **{failed: int(times) for failed, times in found}}

    def diagnosis(self) -> list[tuple[str, str]]:
        """What somebody wants to see where a test failed, each with its title."""
        looks = {
            "pods and claims": ("get", "pods,resourceclaims", "--all-namespaces", "--output=wide"),
            "allocations": ("get", "resourceclaims", "--all-namespaces", f"--output=jsonpath={_ALLOCATIONS}"),
            "slices": ("get", "resourceslices", "--output=wide"),
            "events": ("get", "events", "--all-namespaces", "--sort-by=.metadata.creationTimestamp"),
        }
        found = []
        for title, command in looks.items():
            with contextlib.suppress(AssertionError):
                found.append((title, self.kubectl(*command, "--request-timeout=5s")))
        for pods in ("gpuslice", "gpuslice-mps-supervisor") if self.facts["installed"] else ():
            with contextlib.suppress(AssertionError):
                chosen = ("--namespace=gpuslice-system", f"--selector=app.kubernetes.io/name={pods}")
                found.append((pods, self.kubectl("logs", *chosen, "--all-containers", "--tail=40")))
        with contextlib.suppress(OSError):
            for log in ("kube-scheduler.log",) if self.facts["installed"] else ("driver.log", "kube-scheduler.log"):
                lines = (self.folder / "log" / log).read_text(errors="replace").splitlines()
                found.append((log, "\n".join(lines[-40:])))
        return found


def environment(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: value for name, _, value in pairs if name.startswith(("GPUSLICE_", "CUDA_"))}


def _documents(example: str) -> Iterator[Body]:
    yield from yaml.safe_load_all((EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8"))


def _rename(document: Body, name: str) -> None:
    """Give an example's pod and claim template another name, so that there can be several of it."""
    document["metadata"]["name"] = name
    for claim in document["spec"].get("resourceClaims", ()):
        claim["resourceClaimTemplateName"] = name


def _call(command: list[str], given: str | None = None) -> str:
    environment_ = {**os.environ, "KUBECONFIG": ""}
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=environment_)
    assert done.returncode == 0, f"{' '.join(command[1:])}: {done.stderr}"
    return done.stdout
