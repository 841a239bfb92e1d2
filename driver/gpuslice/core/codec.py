"""Record ↔ JSON. The writer writes every key. The reader ignores unknown keys and uses defaults for missing keys.

tests/golden keeps a file of every released format, because the kubelet asks for claims that an older version prepared.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import assert_never

from gpuslice.core.json import ReadOnlyBody
from gpuslice.core.model import (
    Allocation,
    ClaimRef,
    ClaimUid,
    DeviceRef,
    Exclusive,
    GpuUuid,
    MigSlot,
    MigUuid,
    Monitor,
    Mps,
    Placement,
    PoolName,
    Settings,
    Sharing,
    TimeSlicing,
)
from gpuslice.core.record import (
    CreateMig,
    Done,
    Grant,
    MadeMig,
    Plan,
    PreparedClaim,
    PreparedDevice,
    Record,
    SetComputeMode,
    SetMigMode,
    SetTimeSlice,
    StartMps,
    Step,
)

FORMAT = 1


def encode(record: Record) -> dict[str, object]:
    return {
        "format": FORMAT,
        "claim": _ref(record.plan.ref),
        "grants": [_grant(grant) for grant in record.plan.grants],
        "steps": [_step(step) for step in record.plan.steps],
        "done": [_done(done) for done in record.done],
        "prepared": None if record.prepared is None else [_prepared(device) for device in record.prepared.devices],
    }


def decode(body: ReadOnlyBody) -> Record:
    """ValueError for the format of a newer release, KeyError or TypeError for text that is no record."""
    if body["format"] > FORMAT:
        raise ValueError(f"format {body['format']} is newer than {FORMAT}, the newest that this version reads")
    claim = body["claim"]
    ref = ClaimRef(claim["namespace"], claim["name"], ClaimUid(claim["uid"]))
    plan = Plan(ref, tuple(map(_to_grant, body["grants"])), tuple(map(_to_step, body["steps"])))
    prepared = body.get("prepared")
    return Record(
        plan,
        tuple(map(_to_done, body.get("done", ()))),
        None if prepared is None else PreparedClaim(ref, tuple(map(_to_prepared, prepared))),
    )


def _ref(ref: ClaimRef) -> dict[str, object]:
    return {"namespace": ref.namespace, "name": ref.name, "uid": ref.uid}


def _slot(slot: MigSlot) -> dict[str, object]:
    return {"gpu": slot.gpu, "profile": slot.profile, "start": slot.placement.start, "size": slot.placement.size}


def _to_slot(body: ReadOnlyBody) -> MigSlot:
    return MigSlot(GpuUuid(body["gpu"]), body["profile"], Placement(body["start"], body["size"]))


def _sharing(sharing: Sharing) -> dict[str, object]:
    match sharing:
        case Exclusive():
            return {"by": "exclusive"}
        case Monitor():
            return {"by": "monitor"}
        case TimeSlicing():
            return {"by": "timeSlicing", **asdict(sharing)}
        case Mps():
            body = {"by": "mps", **asdict(sharing)}
            if sharing.enforced:
                del body["enforced"]  # the format of 0.1.0; still used, except for cards that keep their compute mode
            return body
        case _:
            assert_never(sharing)


def _to_sharing(body: ReadOnlyBody) -> Sharing:
    match body["by"]:
        case "exclusive":
            return Exclusive()
        case "monitor":
            return Monitor()
        case "timeSlicing":
            return TimeSlicing(body["shares"], body["memory_mib"], body.get("interval", "default"), body.get("part"))
        case "mps":
            enforced = body.get("enforced", True)
            return Mps(body["shares"], body["memory_mib"], body["clients"], body.get("part"), enforced)
        case other:
            raise ValueError(f"sharing {other!r} is not known to this version")


def _grant(grant: Grant) -> dict[str, object]:
    allocation = grant.allocation
    return {
        "request": allocation.request,
        "pool": allocation.device.pool,
        "device": allocation.device.device,
        "admin": allocation.admin,
        "shareID": allocation.share_id,
        "consumed": dict(allocation.consumed),
        "enforcement": allocation.settings.enforcement,
        "interval": allocation.settings.interval,
        "gpu": grant.gpu,
        "slot": None if grant.slot is None else _slot(grant.slot),
        "sharing": _sharing(grant.sharing),
    }


def _to_grant(body: ReadOnlyBody) -> Grant:
    slot = body.get("slot")
    return Grant(
        allocation=Allocation(
            request=body["request"],
            device=DeviceRef(PoolName(body["pool"]), body["device"]),
            admin=body.get("admin", False),
            share_id=body.get("shareID"),
            consumed=body.get("consumed", {}),
            settings=Settings(body.get("enforcement"), body.get("interval")),
        ),
        gpu=GpuUuid(body["gpu"]),
        slot=None if slot is None else _to_slot(slot),
        sharing=_to_sharing(body["sharing"]),
    )


def _step(step: Step) -> dict[str, object]:
    match step:
        case SetMigMode(gpu, on):
            return {"do": "setMigMode", "gpu": gpu, "on": on}
        case CreateMig(slot):
            return {"do": "createMig", "slot": _slot(slot)}
        case SetComputeMode(gpu):
            return {"do": "setComputeMode", "gpu": gpu}
        case SetTimeSlice(gpu, interval):
            return {"do": "setTimeSlice", "gpu": gpu, "interval": interval}
        case StartMps(gpu, place):
            return {"do": "startMps", "gpu": gpu, "slot": None if place is None else _slot(place)}
        case _:
            assert_never(step)


def _to_step(body: ReadOnlyBody) -> Step:
    match body["do"]:
        case "setMigMode":
            return SetMigMode(GpuUuid(body["gpu"]), body["on"])
        case "createMig":
            return CreateMig(_to_slot(body["slot"]))
        case "setComputeMode":
            return SetComputeMode(GpuUuid(body["gpu"]))
        case "setTimeSlice":
            return SetTimeSlice(GpuUuid(body["gpu"]), body["interval"])
        case "startMps":
            slot = body.get("slot")
            return StartMps(GpuUuid(body["gpu"]), None if slot is None else _to_slot(slot))
        case other:
            raise ValueError(f"step {other!r} is not known to this version")


def _done(done: Done) -> dict[str, object]:
    return {"made": "mig", "slot": _slot(done.slot), "gi": done.gi, "ci": done.ci, "uuid": done.uuid}


def _to_done(body: ReadOnlyBody) -> Done:
    if body["made"] != "mig":
        raise ValueError(f"{body['made']!r} was made by a version that this one does not know")
    uuid = body.get("uuid")
    return MadeMig(
        slot=_to_slot(body["slot"]), gi=body["gi"], ci=body.get("ci"), uuid=None if uuid is None else MigUuid(uuid)
    )


def _prepared(device: PreparedDevice) -> dict[str, object]:
    return {
        "request": device.request,
        "pool": device.device.pool,
        "device": device.device.device,
        "shareID": device.share_id,
        "uuid": device.uuid,
        "cdi": list(device.cdi_ids),
    }


def _to_prepared(body: ReadOnlyBody) -> PreparedDevice:
    uuid = body["uuid"]
    return PreparedDevice(
        request=body["request"],
        device=DeviceRef(PoolName(body["pool"]), body["device"]),
        share_id=body.get("shareID"),
        uuid=MigUuid(uuid) if uuid.startswith("MIG-") else GpuUuid(uuid),
        cdi_ids=tuple(body["cdi"]),
    )
