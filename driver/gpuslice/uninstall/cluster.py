"""What the removal asks of the API server. The ClusterRole and the Role of deploy/chart/templates/uninstall.yaml allow
exactly these calls."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

from gpuslice.answers import Call
from gpuslice.api import Api, IsItem
from gpuslice.core import json as bodies
from gpuslice.core import removal
from gpuslice.core.json import Body
from gpuslice.core.model import RESOURCE_API
from gpuslice.core.removal import PodRef
from gpuslice.errors import ApiError, ConflictError, ExpiredError, LastingApiError, NotFoundError

log = logging.getLogger(__name__)

NAME = removal.JOB
_GLANCE_S = 5.0  # between two looks at things without a watch
_OUTAGE_S = 30.0  # how long the API server may be away
_PAUSE_S = 1.0  # between two tries
_TRIES = 5
_FORBIDDEN = 403
_RESOURCES = f"/apis/{RESOURCE_API}"
_RBAC = "/apis/rbac.authorization.k8s.io/v1"

T = TypeVar("T")


class Cluster:
    """The API server, as the removal of the driver in one namespace uses it. Every verb raises ApiError.

    A verb tries again if the API server is away or too busy, for about `_OUTAGE_S`.
    """

    def __init__(self, api: Api, namespace: str, driver: str) -> None:
        self._api, self.namespace, self.driver = api, namespace, driver
        self._here = f"/namespaces/{quote(namespace)}"
        self._ready: frozenset[str] = frozenset()
        self._listed_at = -math.inf

    # ------------------------------------------------------------ claims and their pods

    def claims(self, until: float) -> Iterator[list[removal.Holder]]:
        """The claims that this driver has allocated, now and after each change, until this time.monotonic()."""
        for found in self._follow(f"{_RESOURCES}/resourceclaims", "ResourceClaimList", bodies.is_claim, until):
            yield removal.holders(found.values(), self.driver)

    def evict(self, pod: PodRef) -> None:
        """Evict the pod, if it still exists. A DisruptionError names the budget that does not allow it now. One try."""
        path = f"/api/v1/namespaces/{quote(pod.namespace)}/pods/{quote(pod.name)}/eviction"
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod.name, "namespace": pod.namespace},
            "deleteOptions": {"preconditions": {"uid": pod.uid}},  # another pod may have this name now
        }
        with contextlib.suppress(NotFoundError, ConflictError):
            self._api.ask(Call("create", "pods/eviction", path, pod.name), None, body)

    def ready_nodes(self) -> frozenset[str]:
        """Names of the nodes whose kubelet reports, as of `_GLANCE_S` ago at most."""
        if time.monotonic() - self._listed_at > _GLANCE_S:
            call = Call("list", "nodes", "/api/v1/nodes")
            self._ready = removal.ready(_persist(lambda: self._api.whole(call, "NodeList", bodies.is_object))[0])
            self._listed_at = time.monotonic()
        return self._ready

    # ------------------------------------------------------------ the taint

    def has_rules(self) -> bool:
        """Whether this API server has DeviceTaintRules, as those of 1.37 and later."""
        call = Call("list", "APIResourceList", _RESOURCES)  # discovery, which everybody may use
        listed = _persist(partial(self._api.ask, call)).get("resources")
        return isinstance(listed, list) and any(
            isinstance(one, dict) and one.get("name") == "devicetaintrules" for one in listed
        )

    def create_rule(self) -> None:
        """Taint all devices of the driver."""
        owner = self._owner("rbac.authorization.k8s.io/v1", "ClusterRole", f"{_RBAC}/clusterroles/{NAME}")
        self._create("devicetaintrules", f"{_RESOURCES}/devicetaintrules", removal.rule(NAME, self.driver, owner))

    def delete_rule(self) -> None:
        self._gone(Call("delete", "devicetaintrules", f"{_RESOURCES}/devicetaintrules/{NAME}", NAME))

    def delete_slices(self) -> None:
        """Delete all ResourceSlices of the driver, on nodes whose kubelet cannot do it too."""
        call = Call("deletecollection", "resourceslices", f"{_RESOURCES}/resourceslices")
        _persist(partial(self._api.ask, call, {"fieldSelector": f"spec.driver={self.driver}"}))

    # ------------------------------------------------------------ DaemonSets

    def daemonset(self, name: str) -> Body | None:
        call = Call("get", "daemonsets", self._daemonsets(name), name)
        try:
            found = _persist(partial(self._api.ask, call))
        except NotFoundError:
            return None
        if not bodies.is_object(found) or found["metadata"]["name"] != name:
            raise self._api.odd(f"something else than the DaemonSet {name}")
        return found

    def create_daemonset(self, body: Mapping[str, Any]) -> None:
        """Create a DaemonSet that goes with the ConfigMap of the removal."""
        owner = self._owner("v1", "ConfigMap", self._config_map())
        metadata = {**body["metadata"], "namespace": self.namespace, "ownerReferences": [owner]}
        self._create("daemonsets", self._daemonsets(), {**body, "metadata": metadata})

    def delete_daemonset(self, name: str) -> None:
        """Delete the DaemonSet, if it exists. Its pods end afterwards."""
        self._gone(Call("delete", "daemonsets", self._daemonsets(name), name), {"propagationPolicy": "Background"})

    def pods(self, name: str, until: float) -> Iterator[list[Body]]:
        """The pods of a DaemonSet of ours, now and after each change, until this time.monotonic()."""
        query = {"labelSelector": f"app.kubernetes.io/name={name}"}
        for found in self._follow(f"/api/v1{self._here}/pods", "PodList", bodies.is_object, until, query):
            yield list(found.values())

    def delete_pod(self, pod: Body) -> None:
        """Remove a pod from the API at once. Only for a node that does not report."""
        metadata = pod["metadata"]
        path = f"/api/v1{self._here}/pods/{quote(metadata['name'])}"
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": metadata["uid"]}}
        self._gone(Call("delete", "pods", path, metadata["name"]), options)

    def annotations(self) -> object:
        """The annotations of the ConfigMap of the removal."""
        return self._named("ConfigMap", self._config_map())["metadata"].get("annotations")

    def own_job(self) -> None:
        """Let the ConfigMap own the Job of the removal. Helm leaves a Job that failed, and now it goes with the release.

        OpenShift may refuse that (admission plugin OwnerReferencesPermissionEnforcement). Then the Job goes after a day.
        """
        path = f"/apis/batch/v1{self._here}/jobs/{NAME}"
        for _ in range(_TRIES):
            try:
                job = _persist(partial(self._api.ask, Call("get", "jobs", path, NAME)))
                owner = self._owner("v1", "ConfigMap", self._config_map())
                job["metadata"]["ownerReferences"] = [owner]
                _persist(partial(self._api.ask, Call("update", "jobs", path, NAME), None, job))
                return
            except NotFoundError:  # somebody runs the command by hand
                return
            except ConflictError:  # the controller of Jobs writes too
                continue
            except ApiError as e:
                if e.status != _FORBIDDEN:
                    raise
                log.info("the Job of the removal stays for a day after its end: %s", e)
                return

    # ------------------------------------------------------------ below the verbs

    def _daemonsets(self, name: str = "") -> str:
        return f"/apis/apps/v1{self._here}/daemonsets" + (f"/{quote(name)}" if name else "")

    def _owner(self, version: str, kind: str, path: str) -> Mapping[str, str]:
        """A reference to an object of the release. What it owns goes with it, even if this process is killed."""
        uid = self._named(kind, path)["metadata"]["uid"]
        return {"apiVersion": version, "kind": kind, "name": NAME, "uid": uid}

    def _config_map(self) -> str:
        return f"/api/v1{self._here}/configmaps/{NAME}"

    def _named(self, kind: str, path: str) -> Body:
        """The object of this kind that has the name of the removal."""
        found = _persist(partial(self._api.ask, Call("get", path.split("/")[-2], path, NAME)))
        if not bodies.is_object(found):
            raise self._api.odd(f"something else than the {kind} {NAME}")
        return found

    def _create(self, resource: str, path: str, body: Mapping[str, Any]) -> None:
        """Create an object. One of this name counts, because it is of an earlier try."""
        try:
            _persist(partial(self._api.ask, Call("create", resource, path), None, body))
        except ConflictError:
            log.info("%s %s exists already", resource, body["metadata"]["name"])

    def _gone(self, call: Call, body: Mapping[str, Any] | None = None) -> None:
        """Send a request that ends an object. An object that is gone, or another one with its name, is what it wants."""
        with contextlib.suppress(NotFoundError, ConflictError):
            _persist(partial(self._api.ask, call, None, body))

    def _follow(
        self, path: str, kind: str, is_item: IsItem, until: float, query: Mapping[str, str] | None = None
    ) -> Iterator[Mapping[str, Body]]:
        """All objects by UID: now, after each change, and every `_GLANCE_S`, because other things change too."""
        resource = path.rpartition("/")[2]
        lists, watches = Call("list", resource, path), Call("watch", resource, path)
        while True:
            items, version = _persist(lambda: self._api.whole(lists, kind, is_item, query))
            found = {item["metadata"]["uid"]: item for item in items}
            yield found
            try:
                while (left := until - time.monotonic()) > 0:
                    period = math.ceil(min(left, _GLANCE_S))
                    for event in self._api.watch(watches, is_item, version, period, query):
                        version = str(event["object"]["metadata"].get("resourceVersion", version))
                        if _applied(event, found):
                            yield found
                    yield found
                return
            except ExpiredError:
                pass
            except ApiError as e:
                if not passes(e):
                    raise


def _applied(event: Body, found: dict[str, Body]) -> bool:
    """Apply the event of a watch. False if it changes nothing."""
    item = event["object"]
    if event["type"] == "BOOKMARK":
        return False
    if event["type"] == "DELETED":
        found.pop(item["metadata"]["uid"], None)
    else:
        found[item["metadata"]["uid"]] = item
    return True


def _persist(ask: Callable[[], T]) -> T:
    """The answer, also if the API server is away for a while. Only for requests that may arrive twice."""
    end = time.monotonic() + _OUTAGE_S
    while True:
        try:
            return ask()
        except ApiError as e:
            if not passes(e) or time.monotonic() > end:
                raise
        time.sleep(_PAUSE_S)


def passes(error: ApiError) -> bool:
    """Whether a later try may have another answer."""
    if isinstance(error, LastingApiError):
        return False
    return error.status in (0, 429) or error.status >= 500
