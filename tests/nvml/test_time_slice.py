"""Time slices: of simulated cards, and of real ones through a program that answers like nvidia-smi."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.core.model import GpuUuid
from gpuslice.errors import DeviceError
from gpuslice.nvml.api import MPS_SERVER, TIME_SLICES, Code, ComputeMode
from gpuslice.nvml.sim.nvml import SimNvml
from gpuslice.nvml.smi import Smi

GPU = GpuUuid("GPU-00000000-1111-2222-3333-444444444444")

# It keeps the level in a file beside it, and draws a table around it, as programs for people do.
_PROGRAM = """#!/bin/sh
[ "$1 $2 $3" = "compute-policy -i GPU-00000000-1111-2222-3333-444444444444" ] || { echo "No devices were found"; exit 6; }
here=$(dirname "$0")
case "$4" in
--set-timeslice=*) echo "${4#*=}" > "$here/level"; echo "$LD_PRELOAD" > "$here/preload";;
--list) echo "+-----------------+"; echo "| GPU  Policies   |"; echo "+-----------------+"
  set -- Default Short Medium Long; shift "$(cat "$here/level" 2>/dev/null || echo 0)"; echo "|   0  Timeslice: $1 |";;
*) exit 2;;
esac
"""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimNvml]:
    opened = SimNvml(tmp_path, "h100+a100-40g", latency="zero")
    yield opened
    opened.close()


def refused(code: Code, match: str | None = None) -> pytest.RaisesExc[DeviceError]:
    return pytest.RaisesExc(DeviceError, match=match, check=lambda error: error.code == code)


def a_root(folder: Path, program: str = _PROGRAM) -> Path:
    path = folder / "usr/bin/nvidia-smi"
    path.parent.mkdir(parents=True)
    path.write_text(program)
    path.chmod(0o755)
    return folder


# ---------------------------------------------------------------- simulated


def test_a_time_slice_stays_until_the_next_boot(tmp_path: Path, node: SimNvml) -> None:
    one, other = (gpu.uuid for gpu in node.gpus())
    assert node.time_slice(one) == 0

    for level in (*TIME_SLICES[1:], 2):
        node.set_time_slice(one, level)
        again = SimNvml(tmp_path, latency="zero")
        assert (again.time_slice(one), again.time_slice(other)) == (level, 0)
        again.close()

    node.reboot()
    assert node.time_slice(one) == 0


def test_a_card_in_mig_mode_has_no_time_slice_and_the_default_afterwards(node: SimNvml) -> None:
    gpu = node.gpus()[0].uuid
    node.set_time_slice(gpu, 3)
    node.set_mig_mode(gpu, True)

    with refused(Code.NOT_SUPPORTED, "MIG mode"):
        node.time_slice(gpu)
    with refused(Code.NOT_SUPPORTED, "MIG mode"):
        node.set_time_slice(gpu, 1)

    node.set_mig_mode(gpu, False)
    assert node.time_slice(gpu) == 0


def test_an_old_card_has_no_time_slice(tmp_path: Path) -> None:
    (tmp_path / "node.yaml").write_text(
        "gpus: [{product: old}]\nproducts: {old: {name: NVIDIA P4, architecture: Pascal, compute_capability: '6.1', "
        "memory_mib: 7680, reserved_mib: 100, pci_device_id: '0x1BB310DE', resetless: false, profiles: []}}\n"
    )
    node = SimNvml(tmp_path / "node", tmp_path / "node.yaml", latency="zero")

    for level in (0, 1):
        with refused(Code.NOT_SUPPORTED, "NVIDIA P4"):
            node.set_time_slice(node.gpus()[0].uuid, level)
    node.close()


def test_a_card_of_an_earlier_release_has_the_default(tmp_path: Path, node: SimNvml) -> None:
    file = tmp_path / "gpu0.json"
    file.write_text(file.read_text().replace(' "timeSlice": 0,\n', ""))

    assert node.time_slice(node.gpus()[0].uuid) == 0


def test_a_card_that_cannot_be_asked_says_so(node: SimNvml) -> None:
    gpu = node.gpus()[0].uuid
    node.cue("fail", "set_time_slice", gpu, code=Code.NOT_SUPPORTED)

    with refused(Code.NOT_SUPPORTED):
        node.set_time_slice(gpu, 1)
    node.set_time_slice(gpu, 1)


def test_in_exclusive_mode_clients_of_the_mps_server_are_let_in_and_others_are_not(node: SimNvml) -> None:
    gpu = node.gpus()[0].uuid
    node.set_compute_mode(gpu, ComputeMode.EXCLUSIVE_PROCESS)
    node.run_process(gpu, pid=1, name=MPS_SERVER)

    node.run_process(gpu, pid=2, mps=True)
    with refused(Code.IN_USE, "pid 1"):
        node.run_process(gpu, pid=3)

    node.end_process(1)
    with refused(Code.IN_USE, "pid 2"):
        node.run_process(gpu, pid=4, mps=True)


# ---------------------------------------------------------------- nvidia-smi


def test_a_level_is_set_and_read_back(tmp_path: Path) -> None:
    smi = Smi(a_root(tmp_path), None)

    for level in (2, 0, 3, 1):
        smi.set_time_slice(GPU, "GPU 0", level)
        assert smi.time_slice(GPU, "GPU 0") == level


def test_nvidia_smi_of_a_driver_root_gets_the_library_of_that_root(tmp_path: Path) -> None:
    library = tmp_path / "usr/lib64/libnvidia-ml.so.1"  # it is not there: the loader warns, and goes on

    Smi(a_root(tmp_path), library).set_time_slice(GPU, "GPU 0", 1)

    assert (tmp_path / "usr/bin/preload").read_text().strip() == str(library)


@pytest.mark.parametrize("status", [0, 3])
def test_a_card_without_time_slices_is_not_supported_whatever_the_exit_status(tmp_path: Path, status: int) -> None:
    program = f"#!/bin/sh\necho 'Failed to set timeslice for GPU 0: Not Supported'; exit {status}\n"

    with refused(Code.NOT_SUPPORTED, r"^GPU 0: cannot set time slice 1: NOT_SUPPORTED; nvidia-smi .*Failed to set"):
        Smi(a_root(tmp_path, program), None).set_time_slice(GPU, "GPU 0", 1)


def test_another_level_than_the_one_set_is_told(tmp_path: Path) -> None:
    with refused(Code.UNKNOWN, "accepted time slice long and then shows medium"):
        Smi(a_root(tmp_path, "#!/bin/sh\necho Timeslice = MEDIUM\n"), None).set_time_slice(GPU, "GPU 0", 3)


def test_a_list_that_cannot_be_read_fails_the_reading_and_not_the_setting(tmp_path: Path) -> None:
    smi = Smi(a_root(tmp_path, "#!/bin/sh\necho ---\necho It is 7 ms\n"), None)

    smi.set_time_slice(GPU, "GPU 0", 3)
    with refused(Code.UNKNOWN, "does not say which time slice is set: 'It is 7 ms'"):
        smi.time_slice(GPU, "GPU 0")


def test_a_missing_nvidia_smi_names_the_root_and_the_remedy(tmp_path: Path) -> None:
    with refused(Code.LIBRARY_NOT_FOUND, f"nvidia-smi is not in {tmp_path} .*install the NVIDIA driver"):
        Smi(tmp_path, None).time_slice(GPU, "GPU 0")


def test_an_unknown_card_is_not_found(tmp_path: Path) -> None:
    with refused(Code.NOT_FOUND):
        Smi(a_root(tmp_path), None).time_slice(GpuUuid("GPU-none"), "GPU-none")
