"""The DeviceClasses of deploy/, and the devices and requests that they select, for the stand-in scheduler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from gpuslice.core.inventory import Inventory
from gpuslice.core.pools import pool
from gpuslice.core.pools.pool import Features
from gpuslice.standin.scheduler import Request

from tests.kit.cel import selected
from tests.kit.manifests import DEPLOY, DRIVER, Body, documents
from tests.kit.rig import NODE


@functools.cache
def classes() -> dict[str, tuple[Callable[[Body], bool], ...]]:
    bodies = documents(DEPLOY / "deviceclasses.yaml")
    return {body["metadata"]["name"]: tuple(_selectors(body["spec"])) for body in bodies}


def is_in(class_: str, device: Body) -> bool:
    return all(check(device) for check in classes()[class_])


def _selectors(body: Body) -> Iterator[Callable[[Body], bool]]:
    for selector in body.get("selectors", ()):
        yield selected(selector["cel"]["expression"])


ALL = Features(partitionable=True, consumable=True, taints=True)  # Kubernetes 1.36 and later


def slices(inventory: Inventory, features: Features = ALL) -> list[dict[str, Any]]:
    return [
        {
            "metadata": {"name": f"{number}-{planned.name}"},
            "spec": {
                "driver": DRIVER,
                "nodeName": NODE,
                "pool": {"name": planned.name, "generation": 1, "resourceSliceCount": len(planned.specs)},
                **spec,
            },
        }
        for planned in pool.resource_slices(inventory, {}, driver=DRIVER, features=features)
        for number, spec in enumerate(planned.specs)
    ]


def devices(inventory: Inventory, features: Features = ALL) -> Iterator[dict[str, Any]]:
    for body in slices(inventory, features):
        yield from body["spec"].get("devices", ())


def request(body: Body) -> Request:
    """A request of a ResourceClaim, for the stand-in scheduler."""
    if "firstAvailable" in body:
        options = tuple(_request(option["name"], option) for option in body["firstAvailable"])
        return Request(name=body["name"], alternatives=options)
    return _request(body["name"], body["exactly"])


def _request(name: str, body: Body) -> Request:
    checks = (*classes()[body["deviceClassName"]], *_selectors(body))
    return Request(
        name=name,
        driver=DRIVER,
        where=lambda device: all(check(device) for check in checks),
        count=None if body.get("allocationMode") == "All" else body.get("count", 1),
        capacity=body.get("capacity", {}).get("requests", {}),
        admin=body.get("adminAccess", False),
    )
