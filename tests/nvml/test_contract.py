"""One contract for both implementations: every simulated product, and the real GPUs of this machine if it has any.

On real hardware the tests only read. Tests that change a card run on the simulated ones, below the shared part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from gpuslice.core.model import Gpu, GpuUuid, LiveGpu, MigProfile, MigSlot, MigUuid, Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import TIME_SLICES, Code, ComputeMode, Nvml
from gpuslice.nvml.real import RealNvml
from gpuslice.nvml.sim import geometry
from gpuslice.nvml.sim.models import known, product
from gpuslice.nvml.sim.nvml import SimNvml

MIG_PRODUCTS = tuple(key for key in known() if product(key).profiles)


@pytest.fixture(params=[*(f"sim:{key}x2" for key in known()), "real"])
def nvml(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Nvml]:
    which = str(request.param)
    opened: Nvml
    if which == "real":
        try:
            opened = RealNvml()
        except DeviceError as e:
            pytest.skip(f"no real GPU: {e}")
    else:
        opened = SimNvml(tmp_path, which.removeprefix("sim:"), latency="zero")
    if not opened.gpus():
        pytest.skip(f"no real GPU can be read: {'; '.join(opened.lost()) or 'NVML lists none'}")
    yield opened
    opened.close()


@pytest.fixture(params=MIG_PRODUCTS)
def sim(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SimNvml]:
    opened = SimNvml(tmp_path, f"{request.param}:mig", latency="zero")
    yield opened
    opened.close()


def code_of(error: pytest.ExceptionInfo[DeviceError]) -> int:
    return error.value.code


def every_place(gpu: Gpu) -> list[tuple[MigProfile, Placement]]:
    return [(profile, placement) for profile in gpu.profiles for placement in profile.placements]


def engines(gpu: Gpu) -> dict[str, int]:
    """The card's totals, as anyone can read them from NVML: those of its widest profile."""
    return max(gpu.profiles, key=lambda profile: profile.multiprocessors).engines()


# ---------------------------------------------------------------- both doors, reads only


def test_cards_are_listed_in_index_order_with_names_that_differ(nvml: Nvml) -> None:
    gpus = nvml.gpus()
    assert [gpu.index for gpu in gpus] == sorted({gpu.index for gpu in gpus})
    assert len({gpu.uuid for gpu in gpus}) == len({gpu.bus_id for gpu in gpus}) == len(gpus)
    assert all(gpu.uuid.startswith("GPU-") for gpu in gpus)
    assert all(re.fullmatch(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]", gpu.bus_id) for gpu in gpus)


def test_listing_again_finds_the_same_cards(nvml: Nvml) -> None:
    assert nvml.gpus() == nvml.gpus()
    assert nvml.lost() == nvml.lost()


def test_a_card_says_what_it_is(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        assert gpu.product and gpu.architecture and gpu.driver_version
        assert re.fullmatch(r"\d+\.\d+", gpu.compute_capability) and re.fullmatch(r"\d+\.\d+", gpu.cuda_version)
        assert 0 <= gpu.reserved_bytes < gpu.memory_bytes or gpu.memory_bytes == 0
        assert gpu.pcie_root is None or re.fullmatch(r"pci[0-9a-f]{4,}:[0-9a-f]{2}", gpu.pcie_root)


def test_a_profile_has_places_inside_the_card_and_an_instance_count_that_fits_them(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        assert len({profile.id for profile in gpu.profiles}) == len(gpu.profiles)
        end = max((place.start + place.size for _, place in every_place(gpu)), default=0)
        for profile in gpu.profiles:
            assert profile.placements and list(profile.placements) == sorted(profile.placements)
            assert 1 <= profile.max_instances <= len(profile.placements)
            assert all(place.start >= 0 and place.start + place.size <= end for place in profile.placements)
            assert profile.memory_mib * 1024 * 1024 <= gpu.memory_bytes
            assert re.fullmatch(r"\d+g\.\d+gb" + re.escape(profile.suffix), profile.name)


def test_any_single_partition_is_legal(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        assert all(geometry.legal(engines(gpu), [instance]) for instance in every_place(gpu))


def test_what_stands_is_legal_and_of_known_profiles(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        live = nvml.look(gpu.uuid)
        standing = [(gpu.profile(p.profile), p.placement) for p in live.partitions]
        assert all(profile and placement in profile.placements for profile, placement in standing)
        assert all(not a.placement.overlaps(b.placement) for a, b in pairwise(live.partitions))
        assert all(p.uuid is None or p.uuid.startswith("MIG-") for p in live.partitions)
        assert live.mig or not live.partitions


def test_a_card_without_profiles_shows_no_mig_or_a_note_says_why(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        if not gpu.profiles:
            listed = any(gpu.bus_id in note for note in nvml.notes())
            assert listed or nvml.look(gpu.uuid) == LiveGpu(mig=False, mig_pending=False)


def test_device_minors_differ(nvml: Nvml) -> None:
    minors = [nvml.minor(gpu.uuid) for gpu in nvml.gpus()]
    assert len(set(minors)) == len(minors) and min(minors) >= 0


def test_a_process_is_listed_once(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        processes = nvml.processes(gpu.uuid)
        assert len({(p.pid, p.gi, p.ci) for p in processes}) == len(processes)


def test_memory_in_use_is_less_than_all(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        memory = nvml.memory(gpu.uuid)
        assert memory.total_bytes == gpu.memory_bytes and 0 <= memory.used_bytes <= memory.total_bytes
        for partition in nvml.look(gpu.uuid).partitions:
            if partition.uuid:
                assert 0 < nvml.memory(partition.uuid).total_bytes <= gpu.memory_bytes


def test_a_card_has_a_compute_mode(nvml: Nvml) -> None:
    assert all(nvml.compute_mode(gpu.uuid) in ComputeMode for gpu in nvml.gpus())


def test_a_card_has_a_time_slice_or_says_that_it_is_not_supported(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        try:
            assert nvml.time_slice(gpu.uuid) in TIME_SLICES
        except DeviceError as e:
            assert e.code in (Code.NOT_SUPPORTED, Code.NO_PERMISSION, Code.LIBRARY_NOT_FOUND), e


def test_a_time_slice_that_does_not_exist_is_an_invalid_argument(nvml: Nvml) -> None:
    for gpu in nvml.gpus():
        for level in (-1, 4):
            with pytest.raises(DeviceError) as refused:
                nvml.set_time_slice(gpu.uuid, level)
            assert code_of(refused) == Code.INVALID_ARGUMENT


def test_an_unknown_card_is_refused_by_name(nvml: Nvml) -> None:
    unknown = GpuUuid("GPU-00000000-0000-0000-0000-000000000000")
    for verb in (nvml.look, nvml.minor, nvml.processes, nvml.memory, nvml.compute_mode, nvml.time_slice):
        with pytest.raises(DeviceError, match=unknown) as refused:
            verb(unknown)
        assert code_of(refused) in (Code.NOT_FOUND, Code.INVALID_ARGUMENT)


def test_an_unknown_partition_has_no_memory(nvml: Nvml) -> None:
    with pytest.raises(DeviceError) as refused:
        nvml.memory(MigUuid("MIG-00000000-0000-0000-0000-000000000000"))
    assert code_of(refused) in (Code.NOT_FOUND, Code.INVALID_ARGUMENT)


def test_a_quiet_node_has_no_event(nvml: Nvml) -> None:
    assert nvml.wait_event(0.0) is None


def test_closing_twice_does_no_harm(nvml: Nvml) -> None:
    nvml.close()
    nvml.close()


# ---------------------------------------------------------------- what changes a card: simulated products only


def test_a_partition_lives_from_creation_to_destruction(sim: SimNvml) -> None:
    (gpu,) = sim.gpus()
    for profile, placement in every_place(gpu):
        gi = sim.create_gpu_instance(gpu.uuid, profile.id, placement)
        ci, uuid = sim.create_compute_instance(gpu.uuid, gi)
        partition = sim.look(gpu.uuid).at(MigSlot(gpu.uuid, profile.id, placement))
        assert partition is not None and (partition.gi, partition.ci, partition.uuid) == (gi, ci, uuid)
        assert sim.memory(uuid).total_bytes == profile.memory_mib * 1024 * 1024
        sim.destroy_compute_instance(gpu.uuid, gi, ci)
        sim.destroy_gpu_instance(gpu.uuid, gi)
    assert sim.look(gpu.uuid).partitions == ()


def test_the_card_accepts_exactly_the_legal_boards(sim: SimNvml) -> None:
    (gpu,) = sim.gpus()
    for first in every_place(gpu):
        board: list[tuple[MigProfile, Placement]] = []
        for profile, placement in [first, *reversed(every_place(gpu))]:
            wanted = geometry.legal(engines(gpu), [*board, (profile, placement)])
            if wanted:
                sim.create_gpu_instance(gpu.uuid, profile.id, placement)
                board.append((profile, placement))
            else:
                with pytest.raises(DeviceError) as refused:
                    sim.create_gpu_instance(gpu.uuid, profile.id, placement)
                assert code_of(refused) == Code.INSUFFICIENT_RESOURCES
        sim.reset(gpu.uuid)


def test_a_place_that_is_none_of_the_profile_is_an_invalid_argument(sim: SimNvml) -> None:
    (gpu,) = sim.gpus()
    profile = gpu.profiles[0]
    for wrong in (Placement(0, profile.placements[0].size + 1), Placement(99, profile.placements[0].size)):
        with pytest.raises(DeviceError) as refused:
            sim.create_gpu_instance(gpu.uuid, profile.id, wrong)
        assert code_of(refused) == Code.INVALID_ARGUMENT
    with pytest.raises(DeviceError, match="no MIG profile 4711") as refused:
        sim.create_gpu_instance(gpu.uuid, 4711, profile.placements[0])
    assert code_of(refused) == Code.INVALID_ARGUMENT


def test_instances_that_stand_together_have_ids_of_their_own(sim: SimNvml) -> None:
    (gpu,) = sim.gpus()
    smallest = min(gpu.profiles, key=lambda profile: (profile.placements[0].size, -profile.max_instances))
    ids = [sim.create_gpu_instance(gpu.uuid, smallest.id, place) for place in smallest.placements]
    assert len(set(ids)) == len(ids)


def test_an_id_is_used_again_and_a_uuid_is_not(sim: SimNvml) -> None:
    (gpu,) = sim.gpus()
    profile = gpu.profiles[0]
    seen: set[tuple[int, int]] = set()
    uuids = set()
    for _ in range(3):
        gi = sim.create_gpu_instance(gpu.uuid, profile.id, profile.placements[0])
        ci, uuid = sim.create_compute_instance(gpu.uuid, gi)
        seen.add((gi, ci))
        uuids.add(uuid)
        sim.destroy_compute_instance(gpu.uuid, gi, ci)
        sim.destroy_gpu_instance(gpu.uuid, gi)
    assert len(seen) == 1 and len(uuids) == 3


def test_what_is_in_use_is_not_destroyed_and_what_is_gone_is_not_found(sim: SimNvml) -> None:
    (gpu,) = sim.gpus()
    profile = gpu.profiles[0]
    gi = sim.create_gpu_instance(gpu.uuid, profile.id, profile.placements[0])
    ci, uuid = sim.create_compute_instance(gpu.uuid, gi)
    pid = sim.run_process(uuid, used_bytes=1024)
    with pytest.raises(DeviceError, match=str(pid)) as refused:
        sim.destroy_compute_instance(gpu.uuid, gi, ci)
    assert code_of(refused) == Code.IN_USE
    with pytest.raises(DeviceError) as refused:
        sim.destroy_gpu_instance(gpu.uuid, gi)
    assert code_of(refused) == Code.IN_USE
    sim.end_process(pid)
    sim.destroy_compute_instance(gpu.uuid, gi, ci)
    with pytest.raises(DeviceError) as refused:
        sim.destroy_compute_instance(gpu.uuid, gi, ci)
    assert code_of(refused) == Code.NOT_FOUND
    sim.destroy_gpu_instance(gpu.uuid, gi)
    with pytest.raises(DeviceError) as refused:
        sim.destroy_gpu_instance(gpu.uuid, gi)
    assert code_of(refused) == Code.NOT_FOUND
    with pytest.raises(DeviceError) as refused:
        sim.memory(uuid)
    assert code_of(refused) == Code.NOT_FOUND
