"""ResourceClaim (resource.k8s.io/v1, as JSON) → `Claim`: all decisions of the scheduler for this driver.

Facts: KEP-4381 (class configs come before claim configs; a config applies if it names no request, the request, or the
base name of the request),
KEP-4816 (results of a prioritised list are named `request/subrequest`), KEP-5075 (`shareID`, `consumedCapacity`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set

from gpuslice.core import params, quantity
from gpuslice.core.json import UncheckedBody
from gpuslice.core.model import Allocation, Claim, ClaimRef, ClaimUid, DeviceRef, PoolName, Settings
from gpuslice.errors import ClaimError

_TEXT = 512  # as in `typed`, because a longer text in a record could not be read again
_QUANTITY = 64  # characters; a quantity of the API has fewer


def parse(body: UncheckedBody, ref: ClaimRef, driver: str) -> Claim:
    """The claim that `ref` names. ClaimError if its UID differs, if it is not allocated, or if its config is wrong."""
    uid = _text(_object(body, "metadata", ref), "uid", ref)
    if uid != ref.uid:
        raise ClaimError(
            f"claim {ref.namespace}/{ref.name} has UID {uid}, but the pod asks for UID {ref.uid}, so another "
            "claim has replaced it; delete the pod"
        )
    allocation = _object(body, "status", ref).get("allocation")
    if not isinstance(allocation, Mapping):
        raise ClaimError(
            f"claim {ref} is not allocated, so no pod can use it; delete the pod to have it scheduled again"
        )
    devices = _object(allocation, "devices", ref)
    ours = [result for result in _objects(devices, "results", ref) if result.get("driver") == driver]
    layers = _layers(devices, ref, driver)
    names = {name for result in ours if isinstance(name := result.get("request"), str)}
    return Claim(ref, tuple(_allocation(result, layers, ref) for result in ours), tuple(_mistakes(body, ref, names)))


def _mistakes(body: UncheckedBody, ref: ClaimRef, names: Set[str]) -> Iterator[str]:
    """One sentence for each request with less memory than any program can use, because its author forgot the unit.

    `names`: the requests to check, as `request` or `request/subrequest`. The scheduler accepts such a request as written.
    """
    spec = body.get("spec")
    devices = spec.get("devices") if isinstance(spec, Mapping) else None
    for request in mappings(devices, "requests"):
        options = mappings(request, "firstAvailable")
        asked: list[tuple[list[object], object]] = [([request.get("name"), one.get("name")], one) for one in options]
        for path, part in asked or [([request.get("name")], request.get("exactly"))]:
            name = "/".join(text for text in path if isinstance(text, str))
            for text in _memory(part) if name in names else ():
                if meant := quantity.without_unit(text):
                    yield (
                        f"request {name} of claim {ref} asks for memory: {text}, which is less than 1 MiB; "
                        f"write {meant} if that is what you mean, make the claim again, and delete the pod"
                    )


def _memory(asked: object) -> Iterator[str]:
    """The amounts of memory that a request asks for. The name `memory` may have a domain."""
    capacity = asked.get("capacity") if isinstance(asked, Mapping) else None
    amounts = capacity.get("requests") if isinstance(capacity, Mapping) else None
    for key, text in amounts.items() if isinstance(amounts, Mapping) else ():
        if str(key).rpartition("/")[2] == "memory" and isinstance(text, str | int):
            yield str(text)[:_QUANTITY]


def mappings(body: object, key: str) -> list[UncheckedBody]:
    """The objects in a list of an unchecked body. Items that are no objects are left out."""
    items = body.get(key) if isinstance(body, Mapping) else None
    return [item for item in items if isinstance(item, Mapping)] if isinstance(items, list) else []


def is_held(body: UncheckedBody, uid: ClaimUid, devices: Sequence[DeviceRef], driver: str) -> bool:
    """Whether the API still gives any of these devices to the claim of this UID."""
    metadata = body.get("metadata")
    if not isinstance(metadata, Mapping) or metadata.get("uid") != uid:
        return False
    held = [(result.get("pool"), result.get("device")) for result in results(body, driver)]
    return any((device.pool, device.device) in held for device in devices)


def is_released(body: UncheckedBody, uid: ClaimUid) -> bool:
    """Whether the claim of this UID has no allocation, and no pod has reserved it."""
    metadata, status = body.get("metadata"), body.get("status") or {}
    if not isinstance(metadata, Mapping) or metadata.get("uid") != uid or not isinstance(status, Mapping):
        return False
    return not status.get("allocation") and not status.get("reservedFor")


def results(body: UncheckedBody, driver: str) -> Iterator[UncheckedBody]:
    """Our results in a ResourceClaim's allocation. Malformed parts are skipped, because the claim may belong to any
    driver."""
    found: object = body
    for key in ("status", "allocation", "devices", "results"):
        found = found.get(key) if isinstance(found, Mapping) else None
    for result in found if isinstance(found, list) else ():
        if isinstance(result, Mapping) and result.get("driver") == driver:
            yield result


def _allocation(result: UncheckedBody, layers: Sequence[tuple[Sequence[str], Settings]], ref: ClaimRef) -> Allocation:
    request = _text(result, "request", ref)
    base = request.split("/", 1)[0]
    consumed = result.get("consumedCapacity") or {}
    if not isinstance(consumed, Mapping):
        raise ClaimError(f"claim {ref} has a consumedCapacity that is not an object; deallocate it and try again")
    share_id = _text(result, "shareID", ref) if result.get("shareID") else None
    return Allocation(
        request=base,
        device=DeviceRef(PoolName(_text(result, "pool", ref)), _text(result, "device", ref)),
        admin=result.get("adminAccess") is True,
        share_id=share_id,
        # The scheduler copies the name from the ResourceSlice: without our domain, or with our domain.
        consumed={str(name).rpartition("/")[2]: _whole(value, ref) for name, value in consumed.items()},
        settings=params.merge(layer for names, layer in layers if not names or request in names or base in names),
    )


def _layers(devices: UncheckedBody, ref: ClaimRef, driver: str) -> list[tuple[Sequence[str], Settings]]:
    """Our opaque configs with the requests they name, class configs first."""
    layers: list[tuple[Sequence[str], Settings]] = []
    for source in ("FromClass", "FromClaim"):
        for number, config in enumerate(_objects(devices, "config", ref)):
            opaque = config.get("opaque")
            if config.get("source") != source or not isinstance(opaque, Mapping) or opaque.get("driver") != driver:
                continue
            where = f"claim {ref.namespace}/{ref.name}: devices.config[{number}].opaque.parameters"
            names = config.get("requests") or ()
            requests = [name for name in names if isinstance(name, str)] if isinstance(names, Sequence) else []
            layers.append((requests, params.parse(opaque.get("parameters"), where)))
    return layers


def _whole(value: object, ref: ClaimRef) -> int:
    text = str(value) if isinstance(value, str | int) else f"of type {type(value).__name__}"
    try:
        found = quantity.parse(text[:_QUANTITY])
    except ValueError as e:
        raise ClaimError(f"claim {ref} has a consumedCapacity that is not a quantity: {e}") from e
    if not 0 <= found < 2**63:
        raise ClaimError(
            f"claim {ref} has a consumedCapacity of {text[:_QUANTITY]}, which no device has; deallocate it and try again"
        )
    return found


def _object(body: UncheckedBody, key: str, ref: ClaimRef) -> UncheckedBody:
    value = body.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ClaimError(
            f"claim {ref} has a {key} that is not an object; the API server or a proxy before it is broken"
        )
    return value


def _objects(body: UncheckedBody, key: str, ref: ClaimRef) -> list[UncheckedBody]:
    value = body.get(key) or ()
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise ClaimError(
            f"claim {ref} has a {key} that is not a list of objects; the API server or a proxy before it is broken"
        )
    return list(value)


def _text(body: UncheckedBody, key: str, ref: ClaimRef) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= _TEXT or not value.isprintable():
        raise ClaimError(f"claim {ref} has no {key}; the API server or a proxy before it is broken")
    return value
