"""MIG through NVML, below the verbs of real.py: profiles, instances, compute instances. Raises pynvml's errors unchanged.

Known traps: placements are passed by reference. Profile enums are not profile ids. Arrays need a generous size, because the
A30 misreports its instance count. The device handle in the info of a compute instance is the *MIG* device's handle (the
header calls it "parent device"), so no search over all MIG devices is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ctypes import byref, c_uint

import pynvml

from gpuslice.core.model import MigProfile, MigUuid, Partition, Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import Code, suffix

Handle = object  # an opaque pointer of NVML's

# More than the enums of this pynvml, because newer drivers add enums. NVML refuses an unknown enum, without harm.
_PROFILE_ENUMS = range(max(0x20, pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT))
_CI_ENUMS = [
    enum
    for enum in range(max(0x10, pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT))
    if enum != pynvml.NVML_COMPUTE_INSTANCE_PROFILE_1_SLICE_REV1
]
_MOST_PLACES = 64  # memory slices of a card; the widest has 12
_MOST_MIB = 1 << 30  # of a partition: a pebibyte
_ROOM = 32  # entries of every output array, instead of NVML's own count
_OF_ALL = (
    Code.UNINITIALIZED,
    Code.GPU_IS_LOST,
    Code.FUNCTION_NOT_FOUND,
    Code.NO_PERMISSION,
)  # as an answer for one profile, true for all
_ABSENT = (Code.NOT_SUPPORTED, Code.INVALID_ARGUMENT, Code.NOT_FOUND)


class tolerating:  # noqa: N801  reads as a statement: with tolerating(Code.NOT_FOUND)
    """End the block without error at these NVML errors. They mean "there is none"."""

    def __init__(self, *codes: int) -> None:
        self._codes = codes

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, pynvml.NVMLError) and error.value in self._codes


def mode(device: Handle) -> tuple[bool, bool] | None:
    """(current, pending) MIG mode. None if the card has no MIG."""
    with tolerating(Code.NOT_SUPPORTED):
        current, pending = pynvml.nvmlDeviceGetMigMode(device)
        return bool(current), bool(pending)
    return None


def profiles(device: Handle) -> tuple[tuple[MigProfile, ...], tuple[str, ...]]:
    """All GPU-instance profiles of the card, and a clause for each odd answer."""
    found: list[MigProfile] = []
    odd: list[str] = []
    for enum in _PROFILE_ENUMS:
        try:
            with tolerating(*_ABSENT):
                found += _profile_of(device, enum, odd)
        except pynvml.NVMLError as e:
            if e.value in _OF_ALL:
                raise
            odd.append(f"it does not describe MIG profile {enum} ({e}), which is left out")
        except (ValueError, MemoryError) as e:
            odd.append(f"its answer for MIG profile {enum} cannot be read ({e}), so the profile is left out")
    return tuple(found), tuple(odd)


def _profile_of(device: Handle, enum: int, odd: list[str]) -> Iterator[MigProfile]:
    info = pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, enum, version=2)
    places = _placements(device, info.id)
    name = str(info.name).removeprefix("MIG ")
    if info.memorySizeMB > _MOST_MIB:
        raise ValueError(f"{info.memorySizeMB} MiB of {name}")
    # The A30 misreports the count on some drivers. A profile has at least one instance, and at most one per place.
    count = min(max(1, info.instanceCount), len(places))
    if count != info.instanceCount:
        odd.append(
            f"it reports {info.instanceCount} instances of {name}, which has {len(places)} places; the places count"
        )
    if places:
        yield _profile(info, name, count, places)


def _placements(device: Handle, profile: int) -> tuple[Placement, ...]:
    count = c_uint(0)
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, None, byref(count))
    room = max(_ROOM, count.value)
    if room > _MOST_PLACES:
        raise ValueError(f"{count.value} places")
    array = (pynvml.c_nvmlGpuInstancePlacement_t * room)()
    count = c_uint(room)
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, array, byref(count))
    return tuple(sorted(_placement(array[at]) for at in range(min(room, count.value))))


def _placement(place: pynvml.c_nvmlGpuInstancePlacement_t) -> Placement:
    if not (place.size and place.start + place.size <= _MOST_PLACES):
        raise ValueError(f"the placement {place.start}:{place.size}")
    return Placement(place.start, place.size)


def _profile(
    info: pynvml.c_nvmlGpuInstanceProfileInfo_v2_t, name: str, count: int, places: tuple[Placement, ...]
) -> MigProfile:
    return MigProfile(
        id=info.id,
        name=name,
        suffix=suffix(name),
        memory_mib=info.memorySizeMB,
        compute_slices=info.sliceCount,
        multiprocessors=info.multiprocessorCount,
        copy_engines=info.copyEngineCount,
        decoders=info.decoderCount,
        encoders=info.encoderCount,
        jpegs=info.jpegCount,
        ofas=info.ofaCount,
        max_instances=count,
        placements=places,
    )


def partitions(device: Handle, slices: Mapping[int, int]) -> tuple[Partition, ...]:
    """All GPU instances of a card in MIG mode. `slices`: compute slices by profile id. Instances that vanish during the
    call are left out."""
    found = []
    for profile in slices:
        array = (pynvml.c_nvmlGpuInstance_t * _ROOM)()
        count = c_uint(_ROOM)
        with tolerating(*_ABSENT):
            pynvml.nvmlDeviceGetGpuInstances(device, profile, array, byref(count))
            for at in range(_believed(count)):
                with tolerating(Code.NOT_FOUND):
                    found.append(_partition(array[at]))
    return tuple(sorted(found, key=lambda p: p.gi))


def _believed(count: c_uint) -> int:
    """The number of entries of an array that NVML filled. Later entries are no handles, and the use of one ends the
    process."""
    if count.value > _ROOM:
        raise ValueError(f"{count.value} instances")
    return count.value


def _partition(instance: Handle) -> Partition:
    info = pynvml.nvmlGpuInstanceGetInfo(instance)
    placement = _placement(info.placement)
    ci, uuid = _first_ci(instance) or (None, None)
    return Partition(profile=info.profileId, placement=placement, gi=info.id, ci=ci, uuid=uuid)


def _first_ci(instance: Handle) -> tuple[int, MigUuid] | None:
    """The compute instance with the lowest id. It is the only one unless another program divided the GPU instance."""
    found = []
    for enum in range(_CI_ENUMS[-1] + 1):
        with tolerating(*_ABSENT):
            profile = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, enum, 0)
            array = (pynvml.c_nvmlComputeInstance_t * _ROOM)()
            count = c_uint(_ROOM)
            pynvml.nvmlGpuInstanceGetComputeInstances(instance, profile.id, array, byref(count))
            found += [_identity(array[at]) for at in range(_believed(count))]
    return min(found, default=None)


def _identity(compute_instance: Handle) -> tuple[int, MigUuid]:
    info = pynvml.nvmlComputeInstanceGetInfo_v2(compute_instance)
    uuid = str(pynvml.nvmlDeviceGetUUID(info.device))
    if not uuid.startswith("MIG-"):
        raise DeviceError(
            f"NVML gives compute instance {info.id} the UUID {uuid}, which no MIG device has; please report this"
        )
    return int(info.id), MigUuid(uuid)


def create_gi(device: Handle, profile: int, placement: Placement) -> int:
    place = pynvml.c_nvmlGpuInstancePlacement_t(placement.start, placement.size)
    instance = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(device, profile, byref(place))
    return int(pynvml.nvmlGpuInstanceGetInfo(instance).id)


def create_ci(device: Handle, gi: int, slices: Mapping[int, int]) -> tuple[int, MigUuid]:
    """Create a compute instance as wide as its GPU instance. The enums 0, 1, 2, 3, 4 have the widths 1, 2, 3, 4, 7."""
    instance = pynvml.nvmlDeviceGetGpuInstanceById(device, gi)
    width = slices.get(pynvml.nvmlGpuInstanceGetInfo(instance).profileId)
    for enum in _CI_ENUMS:
        with tolerating(Code.NOT_SUPPORTED, Code.INVALID_ARGUMENT):
            profile = pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, enum, 0)
            if profile.sliceCount == width:
                break
    else:
        raise pynvml.NVMLError(Code.NOT_SUPPORTED)
    return _identity(pynvml.nvmlGpuInstanceCreateComputeInstance(instance, profile.id))


def destroy_ci(device: Handle, gi: int, ci: int) -> None:
    instance = pynvml.nvmlDeviceGetGpuInstanceById(device, gi)
    pynvml.nvmlComputeInstanceDestroy(pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, ci))


def destroy_gi(device: Handle, gi: int) -> None:
    pynvml.nvmlGpuInstanceDestroy(pynvml.nvmlDeviceGetGpuInstanceById(device, gi))
