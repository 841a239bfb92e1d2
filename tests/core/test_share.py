"""What a share is worth, and when there is too much of it."""

from __future__ import annotations

import pytest
from gpuslice.core import share
from gpuslice.core.model import (
    MIB,
    Allocation,
    DeviceRef,
    Exclusive,
    GpuUuid,
    MigSlot,
    Mps,
    Placement,
    PoolName,
    Sharing,
    TimeSlicing,
)
from gpuslice.core.record import Grant
from gpuslice.core.share import Share

GPU = GpuUuid("GPU-12345678-0000-0000-0000-000000000000")
SLOT = MigSlot(GPU, 19, Placement(6, 1))
MPS = Mps(shares=4, memory_mib=8000, clients=60)
TURNS = TimeSlicing(shares=4, memory_mib=8000)


def a_grant(sharing: Sharing, slot: MigSlot | None = None, **consumed: int) -> Grant:
    allocation = Allocation(request="r", device=DeviceRef(PoolName("n/p"), "d"), share_id="s", consumed=consumed)
    return Grant(allocation=allocation, gpu=GPU, slot=slot, sharing=sharing)


def test_a_device_of_ones_own_is_no_share() -> None:
    assert share.of(a_grant(Exclusive())) is None


@pytest.mark.contract(35)
def test_a_share_is_what_the_scheduler_charged() -> None:
    charged = a_grant(MPS, memory=3 * 1024 * MIB, smPercent=25, clients=5)

    assert share.of(charged) == Share(memory_mib=3072, percent=25, clients=5)
    assert share.of(a_grant(TURNS, memory=1024 * MIB, shares=2)) == Share(memory_mib=1024, turns=2)


def test_a_share_of_a_part_of_a_mib_is_rounded_up_and_as_many_fit_as_the_scheduler_sells() -> None:
    """The scheduler charges the requested bytes. MPS takes whole MiB."""
    third = 8000 * MIB // 3
    shares = [a_grant(MPS, memory=third, smPercent=0, clients=1) for _ in range(3)]

    assert {share.of(one) for one in shares} == {Share(memory_mib=2667, clients=1)}
    assert share.excess(shares[0], shares[1:]) == ""
    assert share.excess(a_grant(MPS, memory=third + 3, smPercent=0, clients=1), shares[1:]) == (
        "8001 of 8000 MiB of memory"
    )


def test_a_fixed_part_is_one_nth_of_everything() -> None:
    part = a_grant(Mps(shares=4, memory_mib=8000, clients=60, part=2))
    assert share.of(part) == Share(memory_mib=2000, clients=15, percent=25)
    assert share.of(a_grant(TimeSlicing(shares=4, memory_mib=8000, part=2))) == Share(memory_mib=2000, turns=1)


@pytest.mark.contract(26)
@pytest.mark.parametrize(
    ("one", "two", "together"),
    [
        (a_grant(MPS), a_grant(MPS), True),
        (a_grant(TURNS), a_grant(TURNS), True),
        (a_grant(MPS), a_grant(TURNS), False),
        (a_grant(MPS), a_grant(Exclusive()), False),
        (a_grant(MPS, SLOT), a_grant(MPS, SLOT), True),
        (a_grant(MPS, SLOT), a_grant(MPS), False),
        (a_grant(Mps(4, 8000, 60, part=0)), a_grant(Mps(4, 8000, 60, part=1)), True),
        (a_grant(Mps(4, 8000, 60, part=0)), a_grant(Mps(4, 8000, 60, part=0)), False),
        (a_grant(Mps(4, 8000, 60, part=0)), a_grant(MPS), True),  # an upgraded cluster's share beside a fixed part
    ],
)
def test_only_shares_of_one_kind_on_one_slice_stand_beside_each_other(one: Grant, two: Grant, together: bool) -> None:
    assert share.coexists(one, two) is share.coexists(two, one) is together


@pytest.mark.parametrize(
    ("wanted", "others", "says"),
    [
        (a_grant(MPS, memory=2000 * MIB), [a_grant(MPS, memory=6000 * MIB)], ""),
        (a_grant(MPS, memory=2001 * MIB), [a_grant(MPS, memory=6000 * MIB)], "8001 of 8000 MiB of memory"),
        (
            a_grant(MPS, memory=MIB, smPercent=60),
            [a_grant(MPS, memory=MIB, smPercent=50)],
            "110 of 100 percent of the SMs",
        ),
        (a_grant(MPS, memory=MIB, clients=31), [a_grant(MPS, memory=MIB, clients=30)], "61 of 60 MPS clients"),
        (a_grant(TURNS, memory=MIB), [a_grant(TURNS, memory=MIB)] * 3, ""),
        (a_grant(TURNS, memory=MIB), [a_grant(TURNS, memory=MIB)] * 4, "5 of 4 shares"),
        (a_grant(Exclusive()), [], ""),
    ],
)
def test_too_much_is_named_with_its_limit(wanted: Grant, others: list[Grant], says: str) -> None:
    assert share.excess(wanted, others) == says


def test_ceilings_are_those_of_the_largest_share() -> None:
    small, large = a_grant(MPS, memory=100 * MIB, smPercent=10), a_grant(MPS, memory=300 * MIB, smPercent=40)

    assert share.ceilings([small, large]) == (300, 40)
    assert share.ceilings([small, a_grant(MPS, memory=200 * MIB)]) == (200, None)  # one has no ceiling on compute
    assert share.ceilings([]) == (None, None)


def test_daemons_of_a_card_and_of_its_partitions_have_names_of_their_own() -> None:
    assert share.daemon_key(GPU, None) == "12345678"
    assert share.daemon_key(GPU, SLOT) == "12345678-19-6"
