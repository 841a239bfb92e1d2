"""The removal of the driver from a cluster, in an order in which nobody waits for a driver that is gone.

Driver and MPS supervisor serve until no claim is prepared. Until then every failure leaves the cluster as it was.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpuslice.core import removal
from gpuslice.core.json import Body
from gpuslice.core.removal import Helm, Holder, PodRef
from gpuslice.errors import ApiError, RemovalError
from gpuslice.uninstall.cluster import NAME, Cluster, passes

DRIVER, SUPERVISOR, CLEANUP = "gpuslice", "gpuslice-mps-supervisor", "gpuslice-cleanup"
_AGAIN_S = 5.0  # between two evictions of one pod, as in `kubectl drain`

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Uninstall:
    """`cleanup`: the DaemonSet that runs `gpuslice cleanup` on each node. `until`: time.monotonic() of the end of all
    waits."""

    cluster: Cluster
    cleanup: Mapping[str, Any]
    until: float
    say: Say
    helm: Helm = field(default_factory=Helm)

    def run(self) -> None:
        """Remove everything but the objects of the release. RemovalError says what a person has to do, ApiError what the
        API server refuses."""
        if why := removal.unasked(self.cluster.annotations(), self.cluster.namespace, self.helm):
            raise RemovalError(why)
        self._await_earlier()
        self.cluster.own_job()
        found = self.cluster.daemonset(DRIVER)
        annotations = (found or {}).get("metadata", {}).get("annotations") or {}
        evict = annotations.get(removal.EVICT) == "evict"
        with self._tainted():
            self._end_claims(evict=evict)
            self._on_each_node("the look for prepared claims", "--check")
            self._end_claims(evict=evict)  # without taint rules, one may have come meanwhile
            self.say("no claim has a device, and no node has a prepared claim")
            for name in (DRIVER, SUPERVISOR):
                self._end_daemonset(name)
                self.say(f"daemonset/{name} is gone, with its pods")
            self._look_back()
            self._on_each_node("the removal of files")
            self.say("no file of the driver is left on the nodes that are Ready")

    def _await_earlier(self) -> None:
        """Wait for the end of a removal that was interrupted: Helm replaces a Job whose pod still takes its rule away."""
        for pods in self.cluster.pods(NAME, self.until):
            ending = {removal.node_of(pod) for pod in pods if removal.is_ending(pod)}
            if not ending or not ending & self.cluster.ready_nodes():
                return
        raise RemovalError("the pod of an earlier removal has not ended; look at it, and uninstall again")

    # ------------------------------------------------------------ claims

    @contextlib.contextmanager
    def _tainted(self) -> Iterator[None]:
        """Give no device to new claims, as long as this takes."""
        if not self.cluster.has_rules():
            self.say("this API server has no DeviceTaintRule, so new claims may get devices until the driver ends")
            yield
            return
        try:
            self.cluster.create_rule()
            self.say(f"devicetaintrule/{NAME} keeps new claims away from the devices")
            yield
        finally:
            try:
                self.cluster.delete_rule()
            except ApiError as e:
                self.say(f"devicetaintrule/{NAME} stays; run: kubectl delete devicetaintrule {NAME} ({e})")

    def _end_claims(self, *, evict: bool) -> None:
        """Return when no claim has a device. RemovalError if there is one and its pods must not be evicted."""
        blocked: dict[PodRef, str] = {}
        tries: dict[PodRef, float] = {}
        found: Sequence[Holder] = ()
        for found in self._holders(evict=evict):
            if not found:
                return
            if not evict:
                raise RemovalError(removal.refusal(found, self.cluster.namespace, self.helm))
            for pod in dict.fromkeys(pod for holder in found for pod in holder.pods):
                if pod not in tries or (pod in blocked and time.monotonic() >= tries[pod]):
                    tries[pod] = time.monotonic() + _AGAIN_S
                    self._evict(pod, blocked)
        raise RemovalError(removal.undrained(found, blocked))

    def _evict(self, pod: PodRef, blocked: dict[PodRef, str]) -> None:
        try:
            self.cluster.evict(pod)
        except ApiError as e:
            if not passes(e):
                raise
            if blocked.get(pod) != str(e):
                self.say(f"pod {pod} cannot be evicted yet: {e}")
            blocked[pod] = str(e)
            return
        blocked.pop(pod, None)
        self.say(f"evicted pod {pod}")

    def _holders(self, *, evict: bool) -> Iterator[list[Holder]]:
        """The claims with devices, now and after each change. By force, those of nodes that cannot end them do not count."""
        said: set[str] = set()
        for found in self.cluster.claims(self.until):
            if not evict:
                yield found
                continue
            ready = {"", *(self.cluster.ready_nodes() if found else ())}
            self._stays(sorted({holder.node for holder in found} - ready - said))
            said |= {holder.node for holder in found} - ready
            yield [holder for holder in found if holder.node in ready]

    def _look_back(self) -> None:
        """Without driver and slices, nobody can get a device any more. RemovalError if somebody got one meanwhile."""
        self.cluster.delete_slices()
        if found := next(self._holders(evict=True)):
            raise RemovalError(removal.late(found, self.cluster.namespace, self.helm))

    # ------------------------------------------------------------ nodes

    def _on_each_node(self, step: str, *arguments: str) -> None:
        """Run `gpuslice cleanup` with these arguments on each node. `step` names it in a sentence."""
        body = copy.deepcopy(dict(self.cleanup))
        body["spec"]["template"]["spec"]["containers"][0]["args"] = ["cleanup", *arguments]
        self._end_daemonset(CLEANUP)  # of an earlier try
        self.cluster.create_daemonset(body)
        try:
            self._await_nodes(step, patient=bool(arguments))
        except BaseException:
            with contextlib.suppress(ApiError):  # the ConfigMap of the release owns it
                self.cluster.delete_daemonset(CLEANUP)
            raise
        self._end_daemonset(CLEANUP)

    def _await_nodes(self, step: str, *, patient: bool) -> None:
        """Return when each Ready node is done. `patient`: a node that fails is tried again, as its kubelet does."""
        waits: dict[str, str] = {}
        for pods in self.cluster.pods(CLEANUP, self.until):
            body = self.cluster.daemonset(CLEANUP) or {}
            count, mine = removal.desired(body), removal.owned(pods, removal.uid(body))
            open_ = {removal.node_of(pod): pod for pod in mine if not removal.done(pod)}
            ready = self.cluster.ready_nodes() if open_ else frozenset()
            waits = {node: removal.waits(pod) for node, pod in open_.items() if node in ready}
            busy = waits if patient else {node for node in waits if not removal.failed(open_[node])}
            if count is None or len(mine) < count or busy:
                continue
            if waits:
                break
            self._stays(sorted(open_.keys() - ready))
            return
        remedy = "uninstall again" if waits else f"look at daemonset/{CLEANUP}, and uninstall again"
        raise RemovalError(f"{removal.unfinished(step, waits)}; {remedy}")

    def _end_daemonset(self, name: str) -> None:
        """Delete a DaemonSet, if it exists, and wait for the end of its pods on Ready nodes."""
        self.cluster.delete_daemonset(name)
        left: Sequence[str] = ()
        for pods in self.cluster.pods(name, self.until):
            ready = self.cluster.ready_nodes() if pods else frozenset()
            left = sorted({removal.node_of(pod) for pod in pods} & ready)
            if not left:
                self._forget(name, pods)
                return
        raise RemovalError(
            f"the pods of daemonset/{name} have not ended on {removal.some(left)}; look at them, and uninstall again"
        )

    def _forget(self, name: str, pods: Sequence[Body]) -> None:
        """What becomes of pods on nodes that are not Ready."""
        if name != CLEANUP:
            self._stays(sorted({removal.node_of(pod) for pod in pods}))
            return
        for pod in pods:
            self.cluster.delete_pod(pod)

    def _stays(self, nodes: Sequence[str]) -> None:
        for node in nodes:
            self.say(removal.stays(node))
