"""The simulated node over time: MIG mode, restarts, reboots, processes, two processes at once, events."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from gpuslice.core.model import GpuUuid, LiveGpu, Placement
from gpuslice.errors import ConfigError, DeviceError, StateError
from gpuslice.nvml.api import Code, ComputeMode, XidEvent
from gpuslice.nvml.sim.nvml import SimNvml

ROOT = Path(__file__).parents[3]
ONE_G, AT_0 = 19, Placement(0, 1)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimNvml]:
    opened = SimNvml(tmp_path, "h100x2+a100-40g+l4", latency="zero")
    yield opened
    opened.close()


def uuids(node: SimNvml) -> list[GpuUuid]:
    return [gpu.uuid for gpu in node.gpus()]


def refused(code: Code, match: str | None = None) -> pytest.RaisesExc[DeviceError]:
    return pytest.RaisesExc(DeviceError, match=match, check=lambda error: error.code == code)


# ---------------------------------------------------------------- MIG mode


def test_a_hopper_switches_at_once_and_its_minor_moves(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    before = node.minor(gpu)
    node.set_mig_mode(gpu, True)
    assert node.look(gpu) == LiveGpu(mig=True, mig_pending=True)
    assert node.minor(gpu) != before
    node.set_mig_mode(gpu, False)
    assert node.minor(gpu) == before


def test_an_ampere_waits_for_a_reset_and_keeps_its_mode_until_then(node: SimNvml) -> None:
    gpu = uuids(node)[2]
    with refused(Code.RESET_REQUIRED):
        node.set_mig_mode(gpu, True)
    assert node.look(gpu) == LiveGpu(mig=False, mig_pending=True)
    node.reset(gpu)
    assert node.look(gpu) == LiveGpu(mig=True, mig_pending=True)


def test_a_card_without_mig_refuses_it(node: SimNvml) -> None:
    with refused(Code.NOT_SUPPORTED):
        node.set_mig_mode(uuids(node)[3], True)


def test_a_card_in_use_is_not_switched_and_its_holder_is_named(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.run_process(gpu, pid=4242, name="dcgm")
    with refused(Code.IN_USE, match=r"4242 \(dcgm\)"):
        node.set_mig_mode(gpu, True)
    node.end_process(4242)
    node.set_mig_mode(gpu, True)
    node.create_gpu_instance(gpu, ONE_G, AT_0)
    with refused(Code.IN_USE):
        node.set_mig_mode(gpu, False)


def test_without_mig_mode_there_are_no_instances(node: SimNvml) -> None:
    with refused(Code.NOT_SUPPORTED):
        node.create_gpu_instance(uuids(node)[0], ONE_G, AT_0)


def test_an_occupied_place_is_an_insufficient_resource_not_an_existing_thing(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_mig_mode(gpu, True)
    gi = node.create_gpu_instance(gpu, ONE_G, AT_0)
    with refused(Code.INSUFFICIENT_RESOURCES, match=r"1g\.10gb at memory slice 0"):
        node.create_gpu_instance(gpu, ONE_G, AT_0)
    node.create_compute_instance(gpu, gi)
    with refused(Code.INSUFFICIENT_RESOURCES):
        node.create_compute_instance(gpu, gi)


def test_the_compute_mode_of_a_card_in_mig_mode_is_default_and_stays(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_compute_mode(gpu, ComputeMode.EXCLUSIVE_PROCESS)
    node.set_mig_mode(gpu, True)
    assert node.compute_mode(gpu) == ComputeMode.DEFAULT
    with refused(Code.NOT_SUPPORTED):
        node.set_compute_mode(gpu, ComputeMode.EXCLUSIVE_PROCESS)


# ---------------------------------------------------------------- processes and memory


def test_processes_use_memory_and_do_not_get_more_than_there_is(node: SimNvml) -> None:
    gpu = node.gpus()[0]
    room = gpu.memory_bytes - gpu.reserved_bytes
    pid = node.run_process(gpu.uuid, name="train", used_bytes=room)
    assert node.memory(gpu.uuid).used_bytes == room
    assert [(p.pid, p.name, p.gi) for p in node.processes(gpu.uuid)] == [(pid, "train", None)]
    with refused(Code.INSUFFICIENT_RESOURCES):
        node.run_process(gpu.uuid, used_bytes=1)
    node.end_process(pid)
    assert node.memory(gpu.uuid).used_bytes == 0


def test_exclusive_mode_admits_one_process_and_prohibited_mode_none(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_compute_mode(gpu, ComputeMode.EXCLUSIVE_PROCESS)
    node.run_process(gpu, pid=7)
    with refused(Code.IN_USE):
        node.run_process(gpu)
    node.end_process(7)
    node.set_compute_mode(gpu, ComputeMode.PROHIBITED)
    with refused(Code.NOT_SUPPORTED):
        node.run_process(gpu)


def test_a_process_on_a_partition_is_seen_with_its_instances(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_mig_mode(gpu, True)
    gi = node.create_gpu_instance(gpu, ONE_G, AT_0)
    ci, uuid = node.create_compute_instance(gpu, gi)
    node.run_process(uuid, used_bytes=10)
    (process,) = node.processes(gpu)
    assert (process.gi, process.ci) == (gi, ci)
    assert node.memory(uuid).used_bytes == node.memory(gpu).used_bytes == 10
    with refused(Code.NOT_SUPPORTED):
        node.run_process(gpu)


# ---------------------------------------------------------------- the folder


def test_a_restarted_driver_finds_the_node_as_it_left_it(tmp_path: Path, node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_mig_mode(gpu, True)
    gi = node.create_gpu_instance(gpu, ONE_G, AT_0)
    node.create_compute_instance(gpu, gi)
    for spec in (None, "h100x2+a100-40g+l4"):
        again = SimNvml(tmp_path, spec, latency="zero")
        assert again.gpus() == node.gpus() and again.look(gpu) == node.look(gpu) and again.boot_id() == node.boot_id()
        again.close()


def test_another_node_in_the_same_folder_is_refused(tmp_path: Path, node: SimNvml) -> None:
    with pytest.raises(ConfigError, match="holds another simulated node"):
        SimNvml(tmp_path, "h100")
    with pytest.raises(ConfigError, match="holds no simulated node"):
        SimNvml(tmp_path / "elsewhere")


def test_two_nodes_of_one_kind_have_cards_of_their_own(tmp_path: Path) -> None:
    one, other = (SimNvml(tmp_path / name, "h100", latency="zero") for name in ("one", "other"))
    assert one.gpus()[0].uuid != other.gpus()[0].uuid
    assert one.boot_id() != other.boot_id()


def test_a_damaged_folder_is_told_and_not_guessed_at(tmp_path: Path, node: SimNvml) -> None:
    (tmp_path / "gpu0.json").write_text("{}")
    with pytest.raises(StateError, match=r"gpu0\.json"):
        node.look(node.cards[0].uuid)


def test_a_line_that_a_killed_process_left_torn_was_never_written(tmp_path: Path, node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_mig_mode(gpu, True)
    with (tmp_path / "gpu0.json").open("ab") as file:
        file.write(b'\n{"mig": fal')

    assert node.look(gpu).mig
    node.create_gpu_instance(gpu, ONE_G, AT_0)
    node.close()
    with closing(SimNvml(tmp_path, None, latency="zero")) as again:
        assert [p.placement for p in again.look(gpu).partitions] == [AT_0]


def test_the_file_of_a_card_stays_short_and_each_change_is_seen(tmp_path: Path, node: SimNvml) -> None:
    gpu, sizes = uuids(node)[0], set[int]()
    with closing(SimNvml(tmp_path, None, latency="zero")) as other:
        for number in range(1000):
            node.set_compute_mode(gpu, ComputeMode.EXCLUSIVE_PROCESS if number % 2 else ComputeMode.DEFAULT)
            assert other.compute_mode(gpu) == node.compute_mode(gpu) == (3 if number % 2 else 0)
            sizes.add((tmp_path / "gpu0.json").stat().st_size)
    assert len(sizes) > 100
    assert max(sizes) < 65 * 1024


def test_a_reboot_loses_what_a_reboot_loses(node: SimNvml) -> None:
    hopper, _, ampere, _ = uuids(node)
    node.set_mig_mode(hopper, True)
    node.create_gpu_instance(hopper, ONE_G, AT_0)
    node.set_mig_pending(ampere, True)
    node.set_compute_mode(ampere, ComputeMode.EXCLUSIVE_PROCESS)
    node.run_process(ampere)
    node.lose(uuids(node)[1])
    boot = node.boot_id()
    node.reboot()
    assert node.boot_id() != boot
    assert node.look(hopper) == LiveGpu(mig=False, mig_pending=False)
    assert node.look(ampere) == LiveGpu(mig=True, mig_pending=True)
    assert node.compute_mode(ampere) == ComputeMode.DEFAULT and node.processes(ampere) == ()
    assert len(node.gpus()) == 4


def test_a_lost_card_is_left_out_and_named_and_takes_no_other_with_it(node: SimNvml) -> None:
    lost, well = uuids(node)[:2]
    node.lose(lost)
    assert lost not in uuids(node) and well in uuids(node)
    assert len(node.lost()) == 1 and node.lost()[0].startswith("GPU 0 (")
    with refused(Code.GPU_IS_LOST):
        node.look(lost)
    with refused(Code.GPU_IS_LOST):
        node.set_mig_mode(lost, True)
    node.set_mig_mode(well, True)
    node.reset(lost)
    assert lost in uuids(node) and node.lost() == ()


_TAKE_ALL = """
import sys
from pathlib import Path
from gpuslice.core.model import Placement
from gpuslice.errors import DeviceError
from gpuslice.nvml.sim.nvml import SimNvml

node = SimNvml(Path(sys.argv[1]), latency="zero")
gpu = node.gpus()[0].uuid
sys.stdin.readline()
for _ in range(20):
    for start in range(7):
        try:
            gi = node.create_gpu_instance(gpu, 19, Placement(start, 1))
        except DeviceError as e:
            assert e.code == 23, e
            continue
        assert any(p.gi == gi and p.placement.start == start for p in node.look(gpu).partitions)
        node.destroy_gpu_instance(gpu, gi)
"""


def test_two_processes_share_a_node_and_no_change_is_lost(tmp_path: Path, node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_mig_mode(gpu, True)
    kept = node.create_gpu_instance(gpu, ONE_G, Placement(6, 1))
    workers = [
        subprocess.Popen([sys.executable, "-c", _TAKE_ALL, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for worker in workers:
        worker.communicate("go\n")
    assert [worker.returncode for worker in workers] == [0, 0]
    assert [p.gi for p in node.look(gpu).partitions] == [kept]


def test_a_change_by_another_session_is_seen_at_once(tmp_path: Path, node: SimNvml) -> None:
    gpu = uuids(node)[0]
    other = SimNvml(tmp_path, latency="zero")
    node.set_mig_mode(gpu, True)
    for _ in range(200):  # faster than the clock of the file system ticks
        gi = other.create_gpu_instance(gpu, ONE_G, AT_0)
        assert [p.gi for p in node.look(gpu).partitions] == [gi]
        node.destroy_gpu_instance(gpu, gi)
        assert other.look(gpu).partitions == ()
    other.close()


# ---------------------------------------------------------------- events


def test_xids_arrive_in_order_and_only_from_the_first_call_on(node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.raise_xid(gpu, 31)
    assert node.wait_event(0) is None
    node.raise_xid(gpu, 48)
    node.raise_xid(gpu, 63)
    assert [node.wait_event(0), node.wait_event(0)] == [XidEvent(gpu=gpu, xid=48), XidEvent(gpu=gpu, xid=63)]
    assert node.wait_event(0) is None


def test_an_xid_of_another_session_ends_the_wait(tmp_path: Path, node: SimNvml) -> None:
    gpu = uuids(node)[0]
    node.set_mig_mode(gpu, True)
    gi = node.create_gpu_instance(gpu, ONE_G, AT_0)
    ci, uuid = node.create_compute_instance(gpu, gi)
    assert node.wait_event(0) is None
    outside = SimNvml(tmp_path)
    outside.raise_xid(uuid, 94)
    outside.lose(gpu)
    assert node.wait_event(30) == XidEvent(gpu=gpu, xid=94, gi=gi, ci=ci)
    assert node.wait_event(30) == XidEvent(gpu=None, xid=79)
    outside.close()
