"""The cluster as a user has it: kubectl, and the files of deploy/examples."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.wanted import PLAYGROUND, ROOT

EXAMPLES = ROOT / "deploy" / "examples"
_WAIT = "--timeout=30s"


class Cluster:
    def __init__(self) -> None:
        self.facts: dict[str, Any] = json.loads(_call("status", "--json"))
        self.folder = Path(self.facts["folder"])
        self.spoiled = ""  # what could not be removed; no further test can tell anything then

    def kubectl(self, *arguments: str, given: str | None = None) -> str:
        return _call("kubectl", *arguments, given=given)

    def get(self, *what: str) -> list[dict[str, Any]]:
        found: dict[str, Any] = json.loads(self.kubectl("get", *what, "--output=json", "--show-managed-fields"))
        return list(found["items"])

    def process(self, part: str) -> int:
        return int(_call("status", "--pid", part))

    # ------------------------------------------------------------ pods

    def run_as_it_is(self, example: str) -> list[str]:
        """Apply an example, wait until its pods have done what they do, and delete it; what the pods wrote."""
        file = str(EXAMPLES / f"{example}.yaml")
        self.kubectl("apply", "-f", file)
        logs = []
        for document in _documents(example):
            kind, name = document["kind"], document["metadata"]["name"]
            place = f"--namespace={document['metadata'].get('namespace', 'default')}"
            if kind == "Deployment":
                self.kubectl("rollout", "status", f"deployment/{name}", place, _WAIT)
            elif kind == "Pod":
                self.kubectl("wait", "--for=jsonpath={.status.phase}=Succeeded", f"pod/{name}", place, _WAIT)
            if kind in ("Deployment", "Pod"):
                logs.append(self.kubectl("logs", f"{kind}/{name}", place, "--all-containers"))
        self.kubectl("delete", "-f", file, "--grace-period=1", _WAIT)
        return logs

    def apply(self, example: str, *, name: str = "") -> str:
        """Create what an example says, but with a container that stays; the name of its pod."""
        documents = list(_documents(example))
        for document in documents:
            if name:
                _rename(document, name)
            if document["kind"] == "Pod":
                _stay(document["spec"])
        self.kubectl("apply", "-f", "-", given=yaml.safe_dump_all(documents))
        return name or example

    def runs(self, pod: str) -> None:
        """Return when the pod is ready."""
        self.kubectl("wait", "--for=condition=Ready", f"pod/{pod}", _WAIT)

    def has_to_wait(self, pod: str) -> str:
        """Return when the scheduler has found no place for it; its sentence."""
        self.kubectl("wait", "--for=condition=PodScheduled=False", f"pod/{pod}", _WAIT)
        return self.kubectl(
            "get", f"pod/{pod}", "--output=jsonpath={.status.conditions[?(@.type=='PodScheduled')].message}"
        )

    def told(self, pod: str) -> dict[str, str]:
        """What the driver put into the environment of a running container."""
        return environment(self.kubectl("exec", pod, "--", "env"))

    def delete(self, *pods: str) -> None:
        """Return when the kubelet has given back what they held."""
        self.kubectl("delete", "pod", *pods, "--grace-period=1", _WAIT)

    def clear(self) -> None:
        kinds = "pods,resourceclaims,resourceclaimtemplates"
        try:
            self.kubectl("delete", kinds, "--all", "--grace-period=1", "--ignore-not-found", _WAIT)
        except AssertionError as e:
            self.spoiled = str(e)
            raise

    # ------------------------------------------------------------ the node

    def cdi_files(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "cdi").iterdir())

    def records(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "kubelet/plugins/gpuslice.dev/claims").rglob("*.json"))


def environment(text: str) -> dict[str, str]:
    pairs = (line.partition("=") for line in text.splitlines())
    return {name: value for name, _, value in pairs if name.startswith(("GPUSLICE_", "CUDA_"))}


def _documents(example: str) -> Iterator[dict[str, Any]]:
    yield from yaml.safe_load_all((EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8"))


def _rename(document: dict[str, Any], name: str) -> None:
    """Give an example's pod and claim template another name, so that there can be several of it."""
    document["metadata"]["name"] = name
    for claim in document["spec"].get("resourceClaims", ()):
        claim["resourceClaimTemplateName"] = name


def _stay(spec: dict[str, Any]) -> None:
    for container in spec["containers"]:
        container["command"] = ["sh", "-c", "trap exit TERM; sleep 2147483647 & wait"]  # ends at once when told to


def _call(*arguments: str, given: str | None = None) -> str:
    done = subprocess.run([*PLAYGROUND, *arguments], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr}"
    return done.stdout
