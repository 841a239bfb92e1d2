"""What a user writes, as values: pods, claims and their templates, with what most tests want where they say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Body = dict[str, Any]

DRIVER = "gpuslice.dev"
STAY = ("sh", "-c", "trap exit TERM; sleep 2147483647 & wait")  # ends at once at SIGTERM
STUBBORN = ("sh", "-c", "trap '' TERM; while true; do sleep 2147483647; done")  # ends when it is killed


def attribute(name: str) -> str:
    """How CEL spells one of the driver's own attributes."""
    return f"device.attributes['{DRIVER}'].{name}"


def profile(name: str) -> str:
    return f"{attribute('profile')} == '{name}'"


# ---------------------------------------------------------------- requests


def exactly(class_: str, name: str = "gpu", *, where: str = "", capacity: Mapping[str, str] | None = None) -> Body:
    """A request for one device of a class of ours, "mig" for mig.gpuslice.dev; `where` is CEL."""
    return {"name": name, "exactly": wanted(class_, where=where, capacity=capacity)}


def first_of(*options: Body, name: str = "gpu") -> Body:
    """A prioritised list; each option has a name of its own beside what `wanted` says."""
    return {"name": name, "firstAvailable": list(options)}


def wanted(class_: str, *, where: str = "", capacity: Mapping[str, str] | None = None) -> Body:
    found: Body = {"deviceClassName": class_ if "." in class_ else f"{class_}.{DRIVER}"}
    if where:
        found["selectors"] = [{"cel": {"expression": where}}]
    if capacity:
        found["capacity"] = {"requests": dict(capacity)}
    return found


def config(*requests: str, **settings: Any) -> Body:
    """Opaque config of the driver, for these requests; for the whole claim where none is named."""
    parameters = {"apiVersion": f"{DRIVER}/v1alpha1", "kind": "SliceConfig", **settings}
    return {"requests": list(requests), "opaque": {"driver": DRIVER, "parameters": parameters}}


# ---------------------------------------------------------------- objects


def claim(name: str, *requests: Body, **devices: Any) -> Body:
    """`devices` are its other parts: `config`, `constraints`."""
    body = _named("ResourceClaim", name)
    return {**body, "spec": {"devices": {"requests": list(requests), **devices}}}


def template(name: str, *requests: Body, **devices: Any) -> Body:
    body = _named("ResourceClaimTemplate", name)
    return {**body, "spec": {"spec": {"devices": {"requests": list(requests), **devices}}}}


def made_from(template_: str, name: str = "gpu") -> Body:
    """An entry of a pod's resourceClaims: a claim of its own, made from a template."""
    return {"name": name, "resourceClaimTemplateName": template_}


def named(claim_: str, name: str = "gpu") -> Body:
    """An entry of a pod's resourceClaims: a claim that is there."""
    return {"name": name, "resourceClaimName": claim_}


def container(name: str, *claims: str, command: tuple[str, ...] = STAY) -> Body:
    found: Body = {"name": name, "image": "ubuntu:24.04", "command": list(command)}
    if claims:
        found["resources"] = {"claims": [{"name": used} for used in claims]}
    return found


def pod(name: str, *claims: Body, containers: tuple[Body, ...] = (), **more: Any) -> Body:
    """With one container that stays and uses all of its claims by default; `more` goes into its spec."""
    chosen = containers or (container("main", *(entry["name"] for entry in claims)),)
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": list(chosen), **more}
    return {**_named("Pod", name, "v1"), "spec": {**spec, "resourceClaims": list(claims)}}


def inside(namespace: str, *bodies: Body) -> tuple[Body, ...]:
    """The same in a namespace."""
    return tuple({**body, "metadata": {**body["metadata"], "namespace": namespace}} for body in bodies)


def _named(kind: str, name: str, version: str = "resource.k8s.io/v1") -> Body:
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name}}
