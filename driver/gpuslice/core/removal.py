"""Decisions of the removal of the driver: who holds devices, which nodes have done their part, what a person reads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpuslice.core.json import UncheckedBody

EVICT = "gpuslice.dev/uninstall"  # annotation of the driver's DaemonSet; the value `evict` lets pods be evicted
# The name of the removal's Job, and of the objects of the chart that own what the removal makes.
JOB = "gpuslice-uninstall"
_OF_HELM = "meta.helm.sh/release-name"  # annotation of each object of a release (helm.sh/helm, pkg/action/validate.go)
_OF_ARGO_CD = "argocd.argoproj.io/"
_SHOWN = 3  # names in a sentence


@dataclass(frozen=True, slots=True, order=True)
class PodRef:
    namespace: str
    name: str
    uid: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Holder:
    """A claim that has devices of this driver, and its pods. `node`: "" if the allocation names none."""

    claim: str
    pods: tuple[PodRef, ...]
    node: str

    def __str__(self) -> str:
        return ", ".join(f"pod {pod}" for pod in self.pods) or f"claim {self.claim}"


@dataclass(frozen=True, slots=True)
class Helm:
    """The release that Helm uninstalls. `release` "": the driver was installed without Helm."""

    release: str = ""
    revision: str = ""

    def again(self, namespace: str) -> str:
        """The command that installs what is missing and makes the release usable. Helm has marked it as uninstalling."""
        if self.release:
            return f"helm rollback {self.release} {self.revision} --namespace {namespace}"
        return "kubectl apply -f deploy/"


def unasked(annotations: object, namespace: str, helm: Helm) -> str:
    """Why this removal must not begin: nobody has uninstalled. "" if somebody has.

    The Job is a hook of Helm. `helm template` prints it among the objects, so `helm template | kubectl apply` starts the Job.
    Helm annotates each object of a release, and Argo CD each object that it manages; both run a hook only at its time.
    """
    known = annotations if isinstance(annotations, Mapping) else {}
    if not helm.release or known.get(_OF_HELM) == helm.release or any(key.startswith(_OF_ARGO_CD) for key in known):
        return ""
    return (
        f"Helm did not install the release {helm.release}, so this Job came with `helm template`, and nothing was removed; "
        f"add --no-hooks to helm template, and run: kubectl delete job {JOB} --namespace {namespace}; to remove the driver, "
        "see docs/uninstall.md, Without Helm"
    )


def holders(claims: Iterable[UncheckedBody], driver: str) -> list[Holder]:
    """The claims that are allocated by this driver, by name."""
    return sorted((found for body in claims if (found := _holder(body, driver))), key=lambda holder: holder.claim)


def _holder(body: UncheckedBody, driver: str) -> Holder | None:
    allocation = _at(body, "status", "allocation")
    if not any(result.get("driver") == driver for result in _all(_at(allocation, "devices", "results"))):
        return None
    metadata = _at(body, "metadata")
    namespace = str(_at(metadata, "namespace"))
    users = _all(_at(body, "status", "reservedFor"))
    pods = [PodRef(namespace, str(u.get("name")), str(u.get("uid"))) for u in users if u.get("resource") == "pods"]
    return Holder(f"{namespace}/{_at(metadata, 'name')}", tuple(sorted(pods)), _named(_at(allocation, "nodeSelector")))


def refusal(found: Sequence[Holder], namespace: str, helm: Helm) -> str:
    """Why nothing was removed, and what a person can do."""
    claims = "1 claim holds" if len(found) == 1 else f"{len(found)} claims hold"
    keep = f"; to keep the release instead, run: {helm.again(namespace)}" if helm.release else ""
    return (
        f"{claims} GPUs of this driver ({some([str(holder) for holder in found])}), so nothing was removed; delete these "
        f"pods, or have them evicted by: kubectl annotate daemonset/gpuslice --namespace {namespace} {EVICT}=evict "
        f"--overwrite; then uninstall again{keep}"
    )


def undrained(found: Sequence[Holder], blocked: Mapping[PodRef, str]) -> str:
    """Why the pods with claims have not ended in time."""
    waits = [f"{pod}: {blocked[pod]}" for holder in found for pod in holder.pods if pod in blocked]
    reasons = f" ({some(waits)})" if waits else ""
    return (
        f"{some([str(holder) for holder in found])} did not end in time{reasons}; the driver serves on, so end the pods and "
        "uninstall again"
    )


def late(found: Sequence[Holder], namespace: str, helm: Helm) -> str:
    """Why the removal stops after the end of the driver: claims that were allocated while it ended."""
    return (
        f"{some([str(holder) for holder in found])} got a GPU while the driver ended, and only the driver can end this; run: "
        f"{helm.again(namespace)}; then delete the pods and uninstall again"
    )


def stays(node: str) -> str:
    """What a person has to know about a node that cannot be cleaned."""
    return f"node {node} is not Ready, so the driver's files stay there; when the node is back, install and uninstall again"


def some(names: Sequence[str]) -> str:
    """The first of these names, and how many more there are."""
    unique = list(dict.fromkeys(names))
    more = f" and {len(unique) - _SHOWN} more" if len(unique) > _SHOWN else ""
    return ", ".join(unique[:_SHOWN]) + more


# ---------------------------------------------------------------- nodes


def ready(nodes: Iterable[UncheckedBody]) -> frozenset[str]:
    """Names of the nodes whose kubelet reports."""
    return frozenset(
        str(_at(node, "metadata", "name"))
        for node in nodes
        if any(c.get("type") == "Ready" and c.get("status") == "True" for c in _all(_at(node, "status", "conditions")))
    )


def node_of(pod: UncheckedBody) -> str:
    """The node of a DaemonSet's pod. Before it is scheduled, only its affinity names the node."""
    if name := _at(pod, "spec", "nodeName"):
        return str(name)
    affinity = _at(pod, "spec", "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    return _named(affinity)


def uid(body: UncheckedBody) -> str:
    return str(_at(body, "metadata", "uid") or "")


def is_ending(pod: UncheckedBody) -> bool:
    """Whether the pod is deleted and its containers still run."""
    return _at(pod, "metadata", "deletionTimestamp") is not None


def owned(pods: Iterable[UncheckedBody], uid: str) -> list[UncheckedBody]:
    """The pods of the DaemonSet with this UID."""
    return [pod for pod in pods if any(o.get("uid") == uid for o in _all(_at(pod, "metadata", "ownerReferences")))]


def desired(daemonset: UncheckedBody) -> int | None:
    """How many pods the DaemonSet will have; None if its controller has not counted yet."""
    number, seen = _at(daemonset, "status", "desiredNumberScheduled"), _at(daemonset, "status", "observedGeneration")
    generation = _at(daemonset, "metadata", "generation")
    return number if isinstance(number, int) and seen == generation else None


def done(pod: UncheckedBody) -> bool:
    """Whether its container has ended with success. The kubelet then starts the container again, which changes nothing."""
    return any(end.get("exitCode") == 0 for end in _ends(pod))


def failed(pod: UncheckedBody) -> str:
    """The last words of its container, if the container has failed; otherwise ""."""
    for end in _ends(pod):
        if code := end.get("exitCode"):
            words = str(end.get("message") or f"its clean-up ended with exit code {code}")
            return words.strip().rpartition("\n")[2].removeprefix("gpuslice: ")
    return ""


def waits(pod: UncheckedBody) -> str:
    """Why this pod has not done its part yet."""
    if words := failed(pod):
        return words
    states = [_at(status, "state", "waiting") for status in _all(_at(pod, "status", "containerStatuses"))]
    for of in (*states, *_all(_at(pod, "status", "conditions"))):
        if text := _at(of, "message"):
            return str(text)
    return "its pod has not ended"


def _ends(pod: UncheckedBody) -> list[UncheckedBody]:
    statuses = _all(_at(pod, "status", "containerStatuses"))
    ends = [_at(status, state, "terminated") for status in statuses for state in ("state", "lastState")]
    return [end for end in ends if isinstance(end, Mapping)]


def unfinished(step: str, reasons: Mapping[str, str]) -> str:
    """The sentence about nodes whose part is not done. `step` is a noun."""
    if not reasons:
        return f"{step} has not begun on all nodes"
    listed = some([f"{node}: {reason}" for node, reason in sorted(reasons.items())])
    nodes = "1 node" if len(reasons) == 1 else f"{len(reasons)} nodes"
    return f"{step} is not done on {nodes} ({listed})"


# ---------------------------------------------------------------- answers of the API server


def rule(name: str, driver: str, owner: Mapping[str, str]) -> dict[str, object]:
    """A DeviceTaintRule that keeps new claims away from all devices of the driver."""
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceTaintRule",
        "metadata": {"name": name, "ownerReferences": [owner]},
        "spec": {"deviceSelector": {"driver": driver}, "taint": {"key": EVICT, "effect": "NoSchedule"}},
    }


def _at(body: object, *keys: str) -> object:
    for key in keys:
        body = body.get(key) if isinstance(body, Mapping) else None
    return body


def _all(items: object) -> Collection[UncheckedBody]:
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else ()


def _named(selector: object) -> str:
    """The one node that this node selector names by its field; "" if it names none."""
    for term in _all(_at(selector, "nodeSelectorTerms")):
        for field in _all(term.get("matchFields")):
            values = field.get("values")
            if field.get("key") == "metadata.name" and isinstance(values, list) and len(values) == 1:
                return str(values[0])
    return ""
