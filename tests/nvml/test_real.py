"""The ctypes side of the real interface, against a small libnvidia-ml.so.1 of our own (stub/nvml.c).

Each test runs in its own process, because a loaded library stays loaded, and pynvml keeps the first one that it found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UUID = "GPU-00000000-1111-2222-3333-444444444444"
NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND = 3, 4, 13

_START = """
import os
import sys
from pathlib import Path
from gpuslice.core.model import *
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import *
from gpuslice.nvml.real import RealNvml

def code(verb, *arguments):
    try:
        verb(*arguments)
    except DeviceError as e:
        return e.code
    return 0

node = RealNvml(Path(sys.argv[1]))
(gpu,) = node.gpus()
uuid = gpu.uuid
"""


def told(root: Path, text: str, stub: str = "") -> list[str]:
    """The lines that a process prints when it runs this over the stub. `stub`: the odd facts of its card and driver."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _START + text, str(root)],
        cwd=ROOT,
        env={**os.environ, "STUB_NVML": stub},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_card_is_read_with_all_its_profiles_and_places(driver_root: Path) -> None:
    text = """
print(gpu.product, gpu.bus_id, gpu.architecture, gpu.compute_capability, gpu.cuda_version, gpu.resetless, gpu.numa_node)
print(gpu.memory_bytes // MIB, gpu.reserved_bytes // MIB, node.minor(uuid))
for p in gpu.profiles:
    print(p.id, p.name, p.suffix or "-", p.compute_slices, p.multiprocessors, p.ofas, [place.start for place in p.placements])
"""
    assert told(driver_root, text) == [
        "NVIDIA H100 80GB HBM3 0000:fe:1f.0 Hopper 9.0 13.0 True None",
        "81559 407 3",
        "19 1g.10gb - 1 16 0 [0, 1, 2, 3, 4, 5, 6]",
        "9 3g.40gb - 3 60 0 [0, 4]",
        "0 7g.80gb - 7 132 1 [0]",
        "20 1g.10gb+me +me 1 16 1 [0, 1, 2, 3, 4, 5, 6]",
    ]


def test_a_card_off_the_bus_is_named_and_takes_no_other_with_it(driver_root: Path) -> None:
    (line,) = told(driver_root, "print(*node.lost())")
    assert line.startswith("GPU 1: cannot read it: GPU_IS_LOST; ")


def test_an_instance_count_beyond_the_places_is_noted_and_not_believed(driver_root: Path) -> None:
    counts, note = told(driver_root, "print(gpu.profile(20).max_instances)\nprint(*node.notes())")
    assert counts == "7" and "40 instances of 1g.10gb+me" in note


def test_a_partition_lives_from_creation_to_destruction(driver_root: Path) -> None:
    text = """
gi = node.create_gpu_instance(uuid, 9, Placement(4, 4))
assert node.look(uuid).partitions == (Partition(profile=9, placement=Placement(4, 4), gi=gi),)
ci, mig = node.create_compute_instance(uuid, gi)
assert mig.startswith("MIG-"), mig
assert node.look(uuid).partitions == (Partition(profile=9, placement=Placement(4, 4), gi=gi, ci=ci, uuid=mig),)
assert node.memory(mig).total_bytes == 40448 * MIB
node.destroy_compute_instance(uuid, gi, ci)
node.destroy_gpu_instance(uuid, gi)
assert node.look(uuid) == LiveGpu(mig=True, mig_pending=True)
assert code(node.memory, mig) == Code.NOT_FOUND
"""
    told(driver_root, text)


def test_the_compute_instance_is_as_wide_as_its_gpu_instance(driver_root: Path) -> None:
    # The stub numbers compute-instance profiles 100 + enum: 7 slices have enum 4, and REV1 (enum 7) is 1 slice, too.
    text = """
import pynvml
for profile, wanted in ((0, 104), (19, 100), (9, 102)):
    gi = node.create_gpu_instance(uuid, profile, gpu.profile(profile).placements[0])
    ci, _ = node.create_compute_instance(uuid, gi)
    instance = pynvml.nvmlDeviceGetGpuInstanceById(node._handles[uuid], gi)
    made = pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, ci)
    assert pynvml.nvmlComputeInstanceGetInfo_v2(made).profileId == wanted
    node.destroy_compute_instance(uuid, gi, ci)
    node.destroy_gpu_instance(uuid, gi)
"""
    told(driver_root, text)


def test_refusals_keep_their_code_and_name_the_gpu_and_the_remedy(driver_root: Path) -> None:
    text = """
gi = node.create_gpu_instance(uuid, 9, Placement(4, 4))
ci, mig = node.create_compute_instance(uuid, gi)
print(code(node.create_gpu_instance, uuid, 9, Placement(4, 4)), code(node.create_gpu_instance, uuid, 77, Placement(0, 1)))
print(code(node.destroy_gpu_instance, uuid, gi), code(node.destroy_compute_instance, uuid, gi, 3))
print(code(node.set_compute_mode, uuid, ComputeMode.EXCLUSIVE_PROCESS), code(node.look, "GPU-none"))
try:
    node.create_gpu_instance(uuid, 9, Placement(4, 4))
except DeviceError as e:
    print(e)
"""
    *codes, sentence = told(driver_root, text)
    assert codes == ["23 2", "19 6", "3 6"]
    assert sentence.startswith(
        "GPU 0 (0000:fe:1f.0): cannot create a GPU instance of profile 9 at 4:4: INSUFFICIENT_RESOURCES"
    )


def test_a_switch_of_mig_mode_that_only_the_status_refuses_is_an_error(driver_root: Path) -> None:
    text = """
gi = node.create_gpu_instance(uuid, 19, Placement(0, 1))
assert code(node.set_mig_mode, uuid, False) == Code.IN_USE
assert node.look(uuid).mig
node.destroy_gpu_instance(uuid, gi)
node.set_mig_mode(uuid, False)
node.set_mig_mode(uuid, False)
assert node.look(uuid) == LiveGpu(mig=False, mig_pending=False)
assert code(node.create_gpu_instance, uuid, 19, Placement(0, 1)) == Code.NOT_SUPPORTED
node.set_compute_mode(uuid, ComputeMode.EXCLUSIVE_PROCESS)
assert node.compute_mode(uuid) == ComputeMode.EXCLUSIVE_PROCESS
"""
    told(driver_root, text)


def test_a_process_that_two_lists_name_is_there_once(driver_root: Path) -> None:
    text = "print([(p.pid, p.gi, p.ci, p.used_bytes // MIB) for p in node.processes(uuid)])"
    assert told(driver_root, text) == ["[(4242, None, None, 5)]"]


def test_xids_name_the_gpu_or_the_instance_and_a_loss_ends_nothing(driver_root: Path) -> None:
    text = """
assert node.wait_event(0) == XidEvent(gpu=uuid, xid=48)
assert node.wait_event(0) == XidEvent(gpu=uuid, xid=94, gi=2, ci=0)
assert node.wait_event(0) is None  # an event of another kind
assert node.wait_event(0) == XidEvent(gpu=None, xid=79)
assert node.wait_event(0) is None
node.close()
node.close()
"""
    told(driver_root, text)


def test_a_driver_root_without_the_library_is_named(driver_root: Path) -> None:
    text = """
try:
    RealNvml(Path("/nowhere"))
except DeviceError as e:
    print(e.code, e)
"""
    (line,) = told(driver_root, text)
    assert line.startswith("12 driver root /nowhere: cannot find libnvidia-ml.so.1: LIBRARY_NOT_FOUND; install")


def test_the_devices_command_shows_the_cards_of_a_driver_root(driver_root: Path, tmp_path: Path) -> None:
    folders = ["--driver-root-ctr-path", str(driver_root), "--kubelet-plugins-directory-path", str(tmp_path)]

    shown = subprocess.run(
        [sys.executable, "-m", "gpuslice", "devices", *folders], capture_output=True, text=True, check=False
    )

    assert shown.returncode == 0, shown.stderr
    assert "NVIDIA H100 80GB HBM3" in shown.stdout and "0000:fe:1f.0" in shown.stdout


def test_a_library_that_does_not_fit_the_machine_is_named(tmp_path: Path, driver_root: Path) -> None:
    library = tmp_path / "usr/lib64/libnvidia-ml.so.1"
    library.parent.mkdir(parents=True)
    library.write_text("for another machine")
    text = f"""
try:
    RealNvml(Path({str(tmp_path)!r}))
except DeviceError as e:
    print(e.code, e)
"""

    (line,) = told(driver_root, text)

    assert line.startswith(f"12 driver root {tmp_path}: cannot load {library} (")
    assert line.endswith("; it must fit this machine and the image's C library")


# ---------------------------------------------------------------- other cards, older drivers


def test_a_card_without_mig_is_listed_without_profiles_and_without_a_note(driver_root: Path) -> None:
    text = "print(gpu.profiles, node.notes(), node.look(uuid) == LiveGpu(mig=False, mig_pending=False))"

    assert told(driver_root, text, f"nvmlDeviceGetMigMode={NOT_SUPPORTED}") == ["() () True"]


@pytest.mark.parametrize("code", [NO_PERMISSION, FUNCTION_NOT_FOUND])
def test_a_card_that_lists_no_profiles_yet_is_noted_and_its_partitions_are_seen_later(
    driver_root: Path, code: int
) -> None:
    text = """
print(*node.notes())
os.environ["STUB_NVML"] = ""
gi = node.create_gpu_instance(uuid, 9, Placement(4, 4))
ci, mig = node.create_compute_instance(uuid, gi)
print(node.look(uuid).partitions == (Partition(profile=9, placement=Placement(4, 4), gi=gi, ci=ci, uuid=mig),))
"""

    note, seen = told(driver_root, text, f"nvmlDeviceGetGpuInstanceProfileInfoV={code}")

    assert note == (
        "GPU 0 (0000:fe:1f.0) lists no MIG profiles with NVIDIA driver 580.65.06: "
        "update that driver, run as root, or switch MIG mode on"
    )
    assert seen == "True"


def test_a_profile_without_a_place_is_not_offered_and_the_others_are(driver_root: Path) -> None:
    text = "print([profile.name for profile in gpu.profiles])\nprint(*node.notes())"

    names, note = told(driver_root, text, "profile-without-a-place=20")

    assert names == "['1g.10gb', '3g.40gb', '7g.80gb']"
    assert "1g.10gb+me, which has 0 places" in note


def test_a_driver_without_the_newer_memory_query_is_asked_the_older_one(driver_root: Path) -> None:
    text = """
print(gpu.memory_bytes // MIB, gpu.reserved_bytes, node.notes()[1:])
print(node.memory(uuid) == Memory(total_bytes=81559 * MIB, used_bytes=2 * MIB))
"""

    stub = f"nvmlDeviceGetMemoryInfo_v2={FUNCTION_NOT_FOUND}"

    assert told(driver_root, text, stub) == ["81559 0 ()", "True"]


def test_a_card_without_memory_of_its_own_is_noted_and_listed(driver_root: Path) -> None:
    text = "print(gpu.memory_bytes, gpu.reserved_bytes, node.memory(uuid))\nprint(node.notes()[0])"
    stub = f"nvmlDeviceGetMemoryInfo_v2={NOT_SUPPORTED} nvmlDeviceGetMemoryInfo={NOT_SUPPORTED}"

    figures, note = told(driver_root, text, stub)

    assert figures == "0 0 Memory(total_bytes=0, used_bytes=0)"
    assert note == "GPU 0 (0000:fe:1f.0) does not report its memory, so it counts as 0"


@pytest.mark.parametrize(
    ("architecture", "said"), [(9, "Hopper True"), (7, "Ampere False"), (99, "architecture 99 True")]
)
def test_a_driver_that_does_not_say_whether_mig_needs_a_reset_is_asked_for_the_architecture(
    driver_root: Path, architecture: int, said: str
) -> None:
    stub = f"nvmlDeviceGetFieldValues={NOT_SUPPORTED} architecture={architecture}"

    assert told(driver_root, "print(gpu.architecture, gpu.resetless)", stub) == [said]


FAILS_AT_THE_COMPUTE_INSTANCE = """
gi = node.create_gpu_instance(uuid, 9, Placement(4, 4))
try:
    node.create_compute_instance(uuid, gi)
except DeviceError as e:
    print(e)
"""


def test_a_gpu_instance_without_a_compute_instance_of_its_width_says_so(driver_root: Path) -> None:
    (line,) = told(
        driver_root, FAILS_AT_THE_COMPUTE_INSTANCE, f"nvmlGpuInstanceGetComputeInstanceProfileInfoV={NOT_SUPPORTED}"
    )

    assert "cannot create a compute instance in GPU instance 0: NOT_SUPPORTED; this card, its present mode" in line


def test_a_partition_is_never_taken_under_the_uuid_of_its_card(driver_root: Path) -> None:
    """A container that got this UUID would have the whole card."""
    (line,) = told(driver_root, FAILS_AT_THE_COMPUTE_INSTANCE, "partitions-have-the-uuid-of-the-card=1")

    assert line.startswith("NVML gives compute instance 0 the UUID GPU-00000000-1111-2222-3333-444444444444, which no")


def test_a_wait_for_events_of_cards_that_report_none_ends_with_the_session(driver_root: Path) -> None:
    text = """
import threading
waiting = threading.Thread(target=node.wait_event, args=(60,))
waiting.start()
node.close()
waiting.join(10)
print(waiting.is_alive())
"""

    assert told(driver_root, text, f"nvmlDeviceGetSupportedEventTypes={NOT_SUPPORTED}") == ["False"]


def test_the_time_slice_of_a_card_is_set_by_the_nvidia_smi_of_its_driver_root(
    driver_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(driver_root, tmp_path, dirs_exist_ok=True)
    program = tmp_path / "usr/bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@" >> "$0.log"; echo Timeslice: Long\n')
    program.chmod(0o755)
    text = """
node.set_time_slice(uuid, 3)
print(node.time_slice(uuid), code(node.set_time_slice, uuid, 4) == Code.INVALID_ARGUMENT)
"""

    assert told(tmp_path, text) == ["3 True"]
    commands = (tmp_path / "usr/bin/nvidia-smi.log").read_text()
    assert f"compute-policy -i {UUID} --set-timeslice=3\n" in commands and "timeslice=4" not in commands
