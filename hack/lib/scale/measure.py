"""How fast the scheduler places pods of one kind.

The pods and their claims are made while the scheduler is paused (SIGSTOP). So the time of the API client, and of the
controller that makes the claims, does not count. The time runs from the end of the pause until a watch shows the last pod
bound. It includes the scheduler's own work, its writes (claim status, binding, events) and the API server's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from hack.lib.api import CLAIMS, PODS, TEMPLATES, ApiServer, Body
from hack.lib.scale.control import Scheduler
from hack.lib.scale.errors import ScaleError
from hack.lib.scale.fleet import REPOSITORY

_LONGEST_S = 600  # limit of a watch


@dataclass(frozen=True, slots=True)
class RequestKind:
    """A kind of request, taken from an example in deploy/examples."""

    key: str
    text: str
    example: str

    def template(self) -> Body:
        return self._document("ResourceClaimTemplate")

    def pod(self, name: str) -> Body:
        return {**self._document("Pod"), "metadata": {"name": name}}

    def _document(self, kind: str) -> dict[str, Any]:
        text = (REPOSITORY / "deploy" / "examples" / f"{self.example}.yaml").read_text()
        found: dict[str, Any] = next(body for body in yaml.safe_load_all(text) if body["kind"] == kind)
        return found


WHOLE = RequestKind("whole", "a whole GPU", "whole-gpu")
KINDS = (
    WHOLE,
    RequestKind("profile", "1g.10gb", "mig-profile"),
    RequestKind("memory", "9Gi of anything", "any-share-by-memory"),
)


@dataclass(frozen=True, slots=True)
class Figure:
    pods_per_s: float
    cpu_ms: float  # the scheduler's CPU time for each pod


def measure(
    api: ApiServer, scheduler: Scheduler, kind: RequestKind, count: int, meanwhile: Callable[[], None] | None = None
) -> Figure:
    """Place `count` pods of a kind and remove them again. `meanwhile` is called after the scheduler has begun.

    ScaleError if there is no room for the pods.
    """
    template, pod = kind.template(), kind.pod("")
    api.create(TEMPLATES, [template])
    bodies = [{**pod, "metadata": {"name": f"pod-{i:04}"}} for i in range(count)]
    try:
        with scheduler.held():
            api.create(PODS, bodies)
            _until(api, count, _has_claim)
            cpu, begun = scheduler.cpu_s(), time.monotonic()
        if meanwhile:
            meanwhile()
        _until(api, count, _is_bound)
        took, used = time.monotonic() - begun, scheduler.cpu_s() - cpu
    finally:
        api.clear(PODS)
        api.clear(TEMPLATES)
    api.wait_gone(CLAIMS, _LONGEST_S)
    return Figure(count / took, used / count * 1000)


def _until(api: ApiServer, count: int, is_so: Callable[[Body], bool]) -> None:
    """Return when `is_so` is true for this many pods. ScaleError if a pod finds no room, or after ten minutes."""
    done: set[str] = set()
    for pod in _pods(api):
        if refusal := _refusal(pod):
            raise ScaleError(
                f"the scheduler finds no room for a pod: {refusal} Use fewer --pods, or --only kinds that the policy offers."
            )
        if is_so(pod):
            done.add(pod["metadata"]["name"])
        if len(done) == count:
            return
    raise ScaleError(f"{count - len(done)} of {count} pods waited longer than {_LONGEST_S} s; see the scheduler's log")


def _pods(api: ApiServer) -> Iterator[Body]:
    """First the existing pods, then each pod that changes."""
    listed = api.ask("GET", PODS)
    yield from listed["items"]
    watch = api.watch(PODS, listed["metadata"]["resourceVersion"], _LONGEST_S)
    yield from (event["object"] for event in watch)


def _has_claim(pod: Body) -> bool:
    return bool(pod.get("status", {}).get("resourceClaimStatuses"))


def _refusal(pod: Body) -> str:
    """The scheduler's sentence if no node has room for the pod, otherwise "". It retries after any other refusal."""
    conditions = pod.get("status", {}).get("conditions", ())
    messages = (
        one.get("message", "") for one in conditions if one["type"] == "PodScheduled" and one["status"] == "False"
    )
    return next((message for message in messages if message.startswith("0/")), "")


def _is_bound(pod: Body) -> bool:
    return bool(pod["spec"].get("nodeName"))
