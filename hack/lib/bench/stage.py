"""The claim templates and pods for the measures on a real Kubernetes.

The pods are those of deploy/examples. Their container stays until SIGTERM, and then ends at once.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import yaml

from hack.lib.api import CLAIMS, PODS, TEMPLATES
from hack.lib.bench.onkube import Body, MeasuredCluster
from hack.lib.bench.subject import ROOT

EXAMPLES = {"gpu": "whole-gpu", "mig": "mig-profile", "mps": "mps-share", "timeslice": "time-slice-share"}
WITHOUT = "none"  # a pod without a device: the time that any pod takes here
STAYS = ["sh", "-c", "trap exit TERM; sleep 2147483647 & wait"]
IGNORES = ["sleep", "2147483647"]  # process 1 has no handler for SIGTERM, so the signal has no effect
_TIMEOUT_S = 60.0
CARD_0 = "card-0"  # a template of claims for one device only


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """The size of a round. pods: one by one, of each mode. waves: of eight. successors: of each kind."""

    rounds: int
    pods: int
    waves: int
    successors: int
    churn: int  # pods
    rest_s: float


class ClusterStage:
    """The cluster with our templates."""

    def __init__(self, kube: MeasuredCluster) -> None:
        self.kube = kube
        types = kube.types()
        self.modes = [mode for mode in EXAMPLES if mode in types]
        self.notes: dict[str, str] = {}  # by subject
        self._numbers = itertools.count(1)
        self._pods: dict[str, Body] = {}
        for mode in self.modes:
            template, self._pods[mode] = yaml.safe_load_all(
                (ROOT / "deploy" / "examples" / f"{EXAMPLES[mode]}.yaml").read_text(encoding="utf-8")
            )
            kube.api.ask("POST", TEMPLATES, template)
            if mode == "gpu":
                kube.api.ask("POST", TEMPLATES, _of_one_card(template))
                self._pods[WITHOUT] = _without(self._pods[mode])
        if left_out := EXAMPLES.keys() - set(self.modes):
            self.notes["modes"] = f"not offered on this Kubernetes, so not measured: {', '.join(sorted(left_out))}"

    def pod(self, mode: str, template: str = "") -> Body:
        """A pod with a new name. `template`: a claim template that replaces the one of the example."""
        pod = copy.deepcopy(self._pods[mode])
        pod["metadata"]["name"] = f"{mode}-{next(self._numbers)}"
        pod["spec"]["containers"][0]["command"] = STAYS
        # The kubelet looks every 300 ms whether a pod's volumes are mounted: most of the measured time.
        pod["spec"]["automountServiceAccountToken"] = False
        pod["spec"]["terminationGracePeriodSeconds"] = 1  # for a container that gets SIGTERM before its trap is set
        for claim in pod["spec"].get("resourceClaims", ()) if template else ():
            claim["resourceClaimTemplateName"] = template
        return pod

    def run(self, pod: Body) -> float:
        """Create the pod. Returns the seconds from just before the request until the watch delivered Ready."""
        began = self.kube.create(pod)
        return self.kube.pods.ready(name_of(pod)) - began

    def end(self, pod: Body) -> float:
        """Delete the pod with its own grace. Returns the seconds until the watch delivered its end."""
        began = self.kube.delete(name_of(pod))
        return self.kube.pods.gone(name_of(pod)) - began

    def clear(self) -> None:
        """Return when no pod holds anything."""
        self.kube.api.wait_gone(PODS, _TIMEOUT_S)
        self.kube.api.wait_gone(CLAIMS, _TIMEOUT_S)


def name_of(pod: Body) -> str:
    return str(pod["metadata"]["name"])


def _of_one_card(template: Body) -> Body:
    template = copy.deepcopy(template)
    template["metadata"]["name"] = CARD_0
    selector = {"cel": {"expression": "device.attributes['gpuslice.dev'].index == 0"}}
    template["spec"]["spec"]["devices"]["requests"][0]["exactly"]["selectors"] = [selector]
    return template


def _without(pod: Body) -> Body:
    pod = copy.deepcopy(pod)
    del pod["spec"]["resourceClaims"], pod["spec"]["containers"][0]["resources"]
    return pod
