"""Records on disk are read by later versions: a golden file of each released format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gpuslice.core import codec
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
)

GOLDEN = Path(__file__).parent.parent / "golden"
REF = ClaimRef("default", "one", ClaimUid("uid-1"))
SLOT = MigSlot(GpuUuid("GPU-a"), 19, Placement(6, 1))


def a_grant(device: str, sharing: Sharing, *, slot: MigSlot | None = None) -> Grant:
    allocation = Allocation(
        request="gpu",
        device=DeviceRef(PoolName("n/p"), device),
        admin=isinstance(sharing, Monitor),
        share_id="s-1",
        consumed={"memory": 1024},
        settings=Settings("preferred", "long"),
    )
    return Grant(allocation=allocation, gpu=GpuUuid("GPU-a"), slot=slot, sharing=sharing)


def a_record() -> Record:
    grants = (
        a_grant("mig-1g-19-6", Exclusive(), slot=SLOT),
        a_grant("monitor", Monitor()),
        a_grant("mps", Mps(shares=4, memory_mib=8000, clients=60)),
        a_grant("timeslice-1", TimeSlicing(shares=4, memory_mib=8000, interval="short", part=1)),
    )
    gpu = GpuUuid("GPU-a")
    steps = (
        SetMigMode(gpu, True),
        CreateMig(SLOT),
        SetComputeMode(gpu),
        SetTimeSlice(gpu, "short"),
        StartMps(gpu, None),
        StartMps(gpu, SLOT),
    )
    made = MadeMig(slot=SLOT, gi=7, ci=0, uuid=MigUuid("MIG-b"))
    devices = (
        PreparedDevice(request="gpu", device=grants[0].allocation.device, uuid=MigUuid("MIG-b"), cdi_ids=("v/c=1",)),
        PreparedDevice(
            request="gpu", device=grants[1].allocation.device, share_id="s-1", uuid=GpuUuid("GPU-a"), cdi_ids=("v/c=2",)
        ),
    )
    return Record(Plan(REF, grants, steps), (MadeMig(slot=SLOT, gi=7), made), PreparedClaim(REF, devices))


def test_a_record_comes_back_as_it_was_written() -> None:
    record = a_record()

    assert codec.decode(json.loads(json.dumps(codec.encode(record)))) == record


def test_an_unfinished_record_comes_back_unfinished() -> None:
    record = Record(a_record().plan)

    assert codec.decode(json.loads(json.dumps(codec.encode(record)))) == record


def test_the_first_released_format_is_still_read() -> None:
    assert codec.decode(json.loads((GOLDEN / "record-1.json").read_text())) == a_record()


def test_a_writer_writes_the_released_format() -> None:
    assert json.loads((GOLDEN / "record-1.json").read_text()) == codec.encode(a_record())


def test_keys_of_a_later_version_are_ignored_and_missing_ones_defaulted() -> None:
    body = codec.encode(Record(a_record().plan))
    body["later"] = {"any": "thing"}
    del body["done"]
    del body["prepared"]

    assert codec.decode(body) == Record(a_record().plan)


def test_a_format_of_the_future_is_refused_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="format 2 is newer than 1"):
        codec.decode({**codec.encode(a_record()), "format": 2})


@pytest.mark.parametrize("step", [{"do": "levitate"}, {"do": "createMig"}])
def test_a_step_that_this_version_does_not_know_is_refused(step: dict[str, object]) -> None:
    with pytest.raises((ValueError, KeyError)):
        codec.decode({**codec.encode(a_record()), "steps": [step]})
