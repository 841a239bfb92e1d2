"""What the driver asks of the API server: a dozen blocking verbs that take and return dicts. Every failure is an `ApiError`.

Bodies stay dicts on purpose. A typed client drops fields that a newer API server added, so an object that it read must
never be written back. And `kubernetes`' model modules take 0.1 to 0.7 s at the start (measured). So nothing above
`ApiClient` is used: it has TLS, kubeconfig with all kinds of login, rotation of the service-account token and connection
pools. Requests go straight to its connection pool, because its own way takes as long as the request (0.2 ms, measured).

Only resource.k8s.io/v1, which Kubernetes has since 1.34 (the DRA contract, statement 66). Clusters with only v1beta1,
which nests devices differently, or v1beta2, which has the types of v1, cannot share a GPU safely. Their users get an error.

Calls block, and are safe in any number of threads. Claims have their own connections, so slices never delay a pod.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gpuslice.answers import Call
from gpuslice.api import Api, Watch
from gpuslice.core import json as bodies
from gpuslice.core.json import Body
from gpuslice.core.model import RESOURCE_API
from gpuslice.errors import NotFoundError

_GROUP = f"/apis/{RESOURCE_API}"
_REVIEWS = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"

# The rights that the verbs of this module need.
RIGHTS = (
    *((verb, "resourceslices") for verb in ("list", "watch", "create", "update", "delete")),
    *(("get", "resourceclaims"), ("list", "resourceclaims"), ("get", "nodes")),
)


def right(verb: str, resource: str) -> Call:
    """A right that a verb of this module needs, as a call with it."""
    return Call(verb, resource, f"/api/v1/{resource}" if resource == "nodes" else f"{_GROUP}/{resource}")


class Kube:
    """The API server of a kubeconfig; with None, the API server of the cluster that this pod runs in.

    The constructor reads the configuration, but does not connect yet (a few ms). ConfigError: the configuration is unusable.
    Every verb raises ApiError (NotFoundError, ConflictError, ExpiredError). None waits longer than about 20 s.
    """

    def __init__(self, kubeconfig: Path | None = None) -> None:
        self._api = Api(kubeconfig)
        self._claims = Api(kubeconfig)
        self.server = self._api.server

    def close(self) -> None:
        self._api.close()
        self._claims.close()

    def version(self) -> str:
        """The server's version: "v1.37.1"; "v1.37.1 as 1.35" for a server that emulates 1.35 (KEP-4330)."""
        return self._api.version()

    def node_uid(self, name: str) -> str:
        try:
            body = self._api.ask(Call("get", "nodes", f"/api/v1/nodes/{quote(name)}", name))
        except NotFoundError as e:
            said = (
                f"there is no Node {name!r} in the cluster of {self.server}; name a node that kubectl get nodes lists"
            )
            raise NotFoundError(f"{said}, with --node-name or NODE_NAME", e.status) from e
        metadata = body.get("metadata", {})
        if not bodies.is_object(body) or metadata["name"] != name:
            raise self._api.odd(f"something else than node {name} with its UID")
        return str(metadata["uid"])

    def may(self, verb: str, resource: str) -> bool:
        """Whether this login has the right, in every namespace. Every login may ask (ClusterRole system:basic-user)."""
        call = Call("create", "selfsubjectaccessreviews", _REVIEWS)
        asked = {"verb": verb, "resource": resource, "group": right(verb, resource).group}
        body = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1"}
        answer = self._api.ask(call, body={**body, "spec": {"resourceAttributes": asked}})
        status = answer.get("status")
        if not isinstance(status, dict) or not isinstance(status.get("allowed"), bool):
            raise self._api.odd(f"a review of the right to {verb} {resource} without a result")
        return bool(status["allowed"])

    # ------------------------------------------------------------ claims

    def claim(self, namespace: str, name: str) -> Body:
        """A ResourceClaim; about 1 ms on a kept-alive connection (measured against the stand-in, same machine)."""
        path = f"{_GROUP}/namespaces/{quote(namespace)}/resourceclaims/{quote(name)}"
        answer = self._claims.ask(Call("get", "resourceclaims", path, name))
        metadata = answer.get("metadata", {})
        if not bodies.is_claim(answer) or (metadata.get("namespace"), metadata["name"]) != (namespace, name):
            raise self._api.odd(f"something else than claim {namespace}/{name}")
        return answer

    def claims(self) -> Iterator[Body]:
        """All ResourceClaims of the cluster, one page in memory at a time: a large cluster has tens of megabytes of them.

        ApiError may come after the first claims. Then the claims are incomplete.
        """
        call = Call("list", "resourceclaims", f"{_GROUP}/resourceclaims")
        for items, _ in self._api.pages(call, "ResourceClaimList", bodies.is_claim):
            yield from items

    # ------------------------------------------------------------ resource slices

    def resource_slices(self, driver: str, node: str) -> tuple[list[Body], str]:
        """A driver's ResourceSlices on a node, and the resource version from which to watch them."""
        call, query = Call("list", "resourceslices", f"{_GROUP}/resourceslices"), _selector(driver, node)
        return self._api.whole(call, "ResourceSliceList", bodies.is_resource_slice, query)

    def watch_resource_slices(self, driver: str, node: str, resource_version: str, timeout_s: int) -> Watch:
        """Watch the ResourceSlices of a driver on a node after a resource version, for at most `timeout_s`."""
        call = Call("watch", "resourceslices", f"{_GROUP}/resourceslices")
        return self._api.watch(call, bodies.is_resource_slice, resource_version, timeout_s, _selector(driver, node))

    def create_resource_slice(self, body: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Create a ResourceSlice and return it as the server stored it. `dry_run`: the server only checks it."""
        call = Call("create", "resourceslices", f"{_GROUP}/resourceslices")
        return self._written(call, body, dry_run=dry_run)

    def update_resource_slice(self, body: Mapping[str, Any], *, dry_run: bool = False) -> Body:
        """Replace the slice of this name. ConflictError if its resourceVersion differs from the body's."""
        name = quote(body["metadata"]["name"])
        call = Call("update", "resourceslices", f"{_GROUP}/resourceslices/{name}", body["metadata"]["name"])
        return self._written(call, body, dry_run=dry_run)

    def _written(self, call: Call, body: Mapping[str, Any], *, dry_run: bool) -> Body:
        answer = self._api.ask(call, {"dryRun": "All"} if dry_run else {}, body)
        if not bodies.is_resource_slice(answer, stored=not dry_run) or not bodies.answers(body, answer):
            raise self._api.odd(f"something else than the slice to {call}")
        return answer

    def delete_resource_slice(self, name: str, *, uid: str, resource_version: str) -> None:
        """Delete this state of a ResourceSlice. NotFoundError if it does not exist, ConflictError if it has changed."""
        call = Call("delete", "resourceslices", f"{_GROUP}/resourceslices/{quote(name)}", name)
        answer = self._api.ask(call, body={"preconditions": {"uid": uid, "resourceVersion": resource_version}})
        if not bodies.is_deletion(answer, uid):
            raise self._api.odd(f"something else than the deletion to {call}")


def _selector(driver: str, node: str) -> dict[str, str]:
    return {"fieldSelector": f"spec.driver={driver},spec.nodeName={node}"}
