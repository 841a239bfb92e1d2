"""Record ↔ JSON. The writer writes every key. The reader ignores unknown keys and uses defaults for missing keys.

A golden file of every released format stays in tests/golden: the kubelet asks for claims that an older version prepared.

A record is read completely or not at all: each value by its type, and the parts compared with each other. The content is
used in the work for *other* claims (the holder of a card, the steps to undo), and a wrong value would make that work fail.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import assert_never

from gpuslice.core import share
from gpuslice.core.model import (
    INTERVALS,
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
from gpuslice.core.typed import Fields

FORMAT = 1

_IDENTITY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # part of file names of records and locks
_UUID = re.compile(r"(GPU|MIG)-[A-Za-z0-9/-]{1,127}")  # before driver 470 the UUID of a partition had slashes
_MIB = 2**24  # 16 TiB
_COUNT = 2**16  # shares, MPS clients, ids of profiles and instances
_SLICES = 64  # memory slices of a card; the largest has 8
_CHARGED = 2**63 - 1  # int64 of the API


def encode(record: Record) -> dict[str, object]:
    return {
        "format": FORMAT,
        "claim": _ref(record.plan.ref),
        "grants": [_grant(grant) for grant in record.plan.grants],
        "steps": [_step(step) for step in record.plan.steps],
        "done": [_done(done) for done in record.done],
        "prepared": None if record.prepared is None else [_prepared(device) for device in record.prepared.devices],
    }


def decode(body: object) -> Record:
    """ValueError for a newer format, and for anything that is not a record. The sentence names the value."""
    fields = Fields(body, "")
    newest = fields.number("format")
    if newest > FORMAT:
        raise ValueError(f"format {newest} is newer than {FORMAT}, the newest that this version reads")
    claim = fields.part("claim")
    ref = ClaimRef(claim.text("namespace"), claim.text("name"), ClaimUid(_identity(claim, "uid")))
    plan = Plan(ref, tuple(map(_to_grant, fields.parts("grants"))), tuple(map(_to_step, fields.parts("steps"))))
    prepared = fields.optional_parts("prepared")
    record = Record(
        plan,
        tuple(map(_to_done, fields.optional_parts("done") or ())),
        None if prepared is None else PreparedClaim(ref, tuple(map(_to_prepared, prepared))),
    )
    _check(record)
    return record


def _check(record: Record) -> None:
    """Compare the parts with each other. So one wrong value cannot make a card busy, or remove a partition, that does not
    belong to the claim."""
    grants, steps = record.plan.grants, record.plan.steps
    places = {(grant.gpu, grant.slot) for grant in grants}
    gpus = record.plan.named
    for number, grant in enumerate(grants):
        if too_much := share.excess(grant, ()):
            raise ValueError(f"grants[{number}].consumed has {too_much}")
    for number, step in enumerate(steps):
        slot = step.slot if isinstance(step, CreateMig | StartMps) else None
        if step.gpu not in gpus or (isinstance(step, CreateMig | StartMps) and (step.gpu, slot) not in places):
            raise ValueError(f"steps[{number}] is for a place without a grant")
    made = {step.slot for step in steps if isinstance(step, CreateMig)}
    for number, done in enumerate(record.done):
        if done.slot not in made:
            raise ValueError(f"done[{number}] is in a slot without a step")
    if record.prepared is not None:
        _check_prepared(grants, record.prepared.devices)


def _check_prepared(grants: Sequence[Grant], devices: Sequence[PreparedDevice]) -> None:
    if len(devices) > len(grants):
        raise ValueError(f"prepared has {len(devices)} devices, but there are {len(grants)} grants")
    for number, (grant, device) in enumerate(zip(grants, devices, strict=False)):
        if (grant.allocation.request, grant.allocation.device) != (device.request, device.device):
            raise ValueError(f"prepared[{number}] is not the device of grants[{number}]")


def _identity(fields: Fields, key: str) -> str:
    value = fields.text(key)
    if not _IDENTITY.fullmatch(value):
        fields.fail(f"has a {key} that is not an identity of at most 128 letters, digits, '.', '_', '-'")
    return value


def _uuid(fields: Fields) -> GpuUuid | MigUuid:
    value = fields.text("uuid")
    if not _UUID.fullmatch(value):
        fields.fail("has a uuid that is not GPU-… or MIG-… of NVML")
    return MigUuid(value) if value.startswith("MIG-") else GpuUuid(value)


def _gpu(fields: Fields) -> GpuUuid:
    return GpuUuid(_identity(fields, "gpu"))


def _interval(fields: Fields) -> str:
    value = fields.text("interval")
    if value not in INTERVALS:
        fields.fail(f"has the interval {value!r}, which is none of {', '.join(INTERVALS)}")
    return value


def _ref(ref: ClaimRef) -> dict[str, object]:
    return {"namespace": ref.namespace, "name": ref.name, "uid": ref.uid}


def _slot(slot: MigSlot) -> dict[str, object]:
    return {"gpu": slot.gpu, "profile": slot.profile, "start": slot.placement.start, "size": slot.placement.size}


def _to_slot(fields: Fields) -> MigSlot:
    place = Placement(fields.number("start", 0, _SLICES), fields.number("size", 1, _SLICES))
    return MigSlot(_gpu(fields), fields.number("profile", 0, _COUNT), place)


def _to_optional_slot(fields: Fields) -> MigSlot | None:
    slot = fields.optional_part("slot")
    found = None if slot is None else _to_slot(slot)
    if found is not None and found.gpu != _gpu(fields):
        fields.fail("has a slot on another GPU")
    return found


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
                del body["enforced"]  # the format of 0.1.0, still used except for cards that keep their compute mode
            return body
        case _:
            assert_never(sharing)


def _to_sharing(fields: Fields) -> Sharing:
    match fields.text("by"):
        case "exclusive":
            return Exclusive()
        case "monitor":
            return Monitor()
        case "timeSlicing":
            interval = _interval(fields) if fields.optional_text("interval") else "default"
            return TimeSlicing(*_cut(fields), interval, fields.optional_number("part", 0, _COUNT))
        case "mps":
            clients, part = fields.number("clients", 1, _COUNT), fields.optional_number("part", 0, _COUNT)
            return Mps(*_cut(fields), clients, part, fields.flag("enforced", True))
        case other:
            raise ValueError(f"sharing {other!r} is not known to this version")


def _cut(fields: Fields) -> tuple[int, int]:
    return fields.number("shares", 1, _COUNT), fields.number("memory_mib", 0, _MIB)


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


def _to_grant(fields: Fields) -> Grant:
    grant = Grant(
        allocation=Allocation(
            request=fields.text("request"),
            device=_device(fields),
            admin=fields.flag("admin", False),
            share_id=fields.optional_text("shareID"),
            consumed=fields.numbers("consumed", _CHARGED),
            settings=Settings(
                fields.optional_text("enforcement"), _interval(fields) if fields.optional_text("interval") else None
            ),
        ),
        gpu=_gpu(fields),
        slot=_to_optional_slot(fields),
        sharing=_to_sharing(fields.part("sharing")),
    )
    if grant.allocation.admin and grant.sharing != Monitor():
        fields.fail("has admin access, which takes nothing, and a sharing that takes something")
    return grant


def _device(fields: Fields) -> DeviceRef:
    return DeviceRef(PoolName(fields.text("pool")), fields.text("device"))


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


def _to_step(fields: Fields) -> Step:
    match fields.text("do"):
        case "setMigMode":
            return SetMigMode(_gpu(fields), fields.flag("on"))
        case "createMig":
            return CreateMig(_to_slot(fields.part("slot")))
        case "setComputeMode":
            return SetComputeMode(_gpu(fields))
        case "setTimeSlice":
            return SetTimeSlice(_gpu(fields), _interval(fields))
        case "startMps":
            return StartMps(_gpu(fields), _to_optional_slot(fields))
        case other:
            raise ValueError(f"step {other!r} is not known to this version")


def _done(done: Done) -> dict[str, object]:
    return {"made": "mig", "slot": _slot(done.slot), "gi": done.gi, "ci": done.ci, "uuid": done.uuid}


def _to_done(fields: Fields) -> Done:
    made = fields.text("made")
    if made != "mig":
        raise ValueError(f"{made!r} was made by an unknown version")
    return MadeMig(
        slot=_to_slot(fields.part("slot")),
        gi=fields.number("gi", 0, _COUNT),
        ci=fields.optional_number("ci", 0, _COUNT),
        uuid=MigUuid(_uuid(fields)) if fields.optional_text("uuid") else None,
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


def _to_prepared(fields: Fields) -> PreparedDevice:
    return PreparedDevice(
        request=fields.text("request"),
        device=_device(fields),
        share_id=fields.optional_text("shareID"),
        uuid=_uuid(fields),
        cdi_ids=fields.texts("cdi"),
    )
