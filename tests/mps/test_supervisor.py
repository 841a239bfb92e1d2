"""The supervisor in this process, over real stand-in daemons: shares come, change, and go."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest
from gpuslice.core.model import Placement
from gpuslice.errors import DeviceError
from gpuslice.mps import control
from gpuslice.mps.api import DaemonSpec, DaemonStatus
from gpuslice.mps.process import boot_id
from gpuslice.mps.supervisor import Supervisor
from gpuslice.nvml.sim.nvml import SimNvml

from tests.kit.mps_node import MpsNode

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a daemon that serves several uids")
MOUNTS = pytest.mark.skipif(os.geteuid() != 0, reason="needs root with CAP_SYS_ADMIN: a mount namespace of its own")


def test_the_first_share_starts_a_daemon_with_its_ceilings(node: MpsNode) -> None:
    node.supervise()

    running = node.client.ensure(node.daemon())

    assert running == DaemonStatus(
        key="gpu-0",
        device=node.uuid(),
        pid=running.pid,
        memory_mib=10240,
        threads_percent=40,
        restarts=0,
        problem="",
    )
    assert node.client.statuses() == (running,)
    assert Path(f"/proc/{running.pid}").exists()


def test_ensuring_what_runs_already_asks_the_daemon_nothing(node: MpsNode) -> None:
    node.supervise()
    first = node.client.ensure(node.daemon())
    told = node.log()

    again = node.client.ensure(node.daemon())

    assert again == first
    assert node.log() == told


def test_a_program_gets_the_ceilings_and_no_more_memory_than_that(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())

    program = node.program()

    assert program.got() == ("10240", "40")
    assert program.allocates(10240) == "ok"
    assert program.allocates(10241) == "out of memory"
    assert program.end() == 0


def test_a_program_may_lower_its_own_ceilings_and_cannot_raise_them(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())

    low = node.program(CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=5120M", CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="20")
    high = node.program(CUDA_MPS_PINNED_DEVICE_MEM_LIMIT="0=20480M", CUDA_MPS_ACTIVE_THREAD_PERCENTAGE="80")

    assert low.got() == ("5120", "20")
    assert high.got() == ("10240", "40")


def test_a_daemon_without_ceilings_has_none(node: MpsNode) -> None:
    node.supervise()

    running = node.client.ensure(node.daemon(memory_mib=None, threads_percent=None))

    assert (running.memory_mib, running.threads_percent) == (None, None)
    assert node.program().got() == ("none", "100")


def test_changed_ceilings_hold_for_new_programs_only(node: MpsNode) -> None:
    node.supervise()
    first = node.client.ensure(node.daemon())
    before = node.program()
    assert before.got() == ("10240", "40")

    changed = node.client.ensure(node.daemon(memory_mib=20480, threads_percent=None))

    assert (changed.pid, changed.memory_mib, changed.threads_percent) == (first.pid, 20480, None)
    assert node.program().got() == ("20480", "100")
    assert before.allocates(20480) == "out of memory"


def test_a_ceiling_that_goes_is_none_for_new_programs(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())
    node.program().got()

    running = node.client.ensure(node.daemon(memory_mib=None))

    assert running.memory_mib is None
    memory, _ = node.program().got()
    assert int(memory) >= 1 << 24, "there is no command that takes a ceiling away, so it is beyond every card"


def test_limits_that_are_ignored_by_uuid_are_set_by_index(node: MpsNode) -> None:
    node.cue("ignore-uuid-limits")
    node.supervise()

    running = node.client.ensure(node.daemon())

    assert running.memory_mib == 10240
    assert node.program().got() == ("10240", "40")


def test_a_limit_that_was_not_taken_is_told_and_nothing_is_left(node: MpsNode) -> None:
    node.cue("ignore-limits")
    node.supervise()

    with pytest.raises(DeviceError, match="did not accept the memory ceiling of 10240 MiB and reports no ceiling"):
        node.client.ensure(node.daemon())

    assert node.client.statuses() == ()
    assert not node.client.pipe("gpu-0").parent.exists()


def test_a_change_that_was_not_taken_is_a_problem_until_it_is(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())
    ignored = node.cue("ignore-limits")
    with pytest.raises(DeviceError, match="did not accept"):
        node.client.ensure(node.daemon(memory_mib=20480))
    (troubled,) = node.client.statuses()

    ignored.unlink()
    well = node.client.ensure(node.daemon())

    assert "did not accept" in troubled.problem
    assert (well.pid, well.memory_mib, well.problem) == (troubled.pid, 10240, "")


def test_stopping_terminates_the_programs_first_and_removes_the_folder(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())
    program = node.program()
    program.got()

    node.client.stop("gpu-0")

    assert program.says() == "terminated"
    assert program.wait() == 1
    assert node.client.statuses() == ()
    assert not node.client.pipe("gpu-0").parent.exists()


def test_stopping_what_is_gone_succeeds(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())

    node.client.stop("gpu-0")
    node.client.stop("gpu-0")
    node.client.stop("never-was")


def test_one_daemon_stops_and_the_other_goes_on(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon(0))
    other = node.client.ensure(node.daemon(1))
    program = node.program(1)
    program.got()

    node.client.stop("gpu-0")

    assert node.client.statuses() == (other,)
    assert program.quiet()


def test_a_partition_is_shared_like_a_card(node: MpsNode) -> None:
    node.supervise()
    nvml = SimNvml(node.sim.folder, node.spec, latency="zero")
    nvml.set_mig_mode(node.uuid(), True)
    gi = nvml.create_gpu_instance(node.uuid(), 14, Placement(0, 2))
    _, uuid = nvml.create_compute_instance(node.uuid(), gi)
    nvml.close()

    running = node.client.ensure(node.daemon(device=uuid))

    assert (running.device, running.memory_mib) == (uuid, 10240)


def test_another_device_under_the_same_key_gets_a_daemon_of_its_own(node: MpsNode) -> None:
    node.supervise()
    first = node.client.ensure(node.daemon())

    second = node.client.ensure(node.daemon(device=node.uuid(1)))

    assert second.device == node.uuid(1)
    assert second.pid != first.pid
    assert not Path(f"/proc/{first.pid}").exists()


def test_many_who_ensure_and_stop_at_once_leave_what_the_last_one_wanted(node: MpsNode) -> None:
    node.supervise()
    threads = [threading.Thread(target=node.client.ensure, args=(node.daemon(),)) for _ in range(4)]
    threads[2:2] = [threading.Thread(target=node.client.stop, args=("gpu-0",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    running = node.client.ensure(node.daemon())

    assert node.client.statuses() == (running,)
    assert node.program().got() == ("10240", "40")


def test_an_unknown_device_is_told_in_the_words_of_the_daemon(node: MpsNode) -> None:
    node.supervise()

    with pytest.raises(DeviceError, match="ended with status 1 at its start and says 'No CUDA-capable device"):
        node.client.ensure(node.daemon(device="MIG-none"))

    assert node.client.statuses() == ()
    assert not node.client.pipe("gpu-0").parent.exists()


@AS_ROOT
def test_programs_of_two_users_run_at_once(node: MpsNode) -> None:
    node.supervise()
    node.client.ensure(node.daemon())

    first, second = node.program(uid=1000), node.program(uid=1001)

    assert first.got() == second.got() == ("10240", "40")


@AS_ROOT
def test_with_an_older_driver_one_user_waits_for_the_other(node: MpsNode) -> None:
    node.cue("refuse-multiuser")
    node.supervise()
    node.client.ensure(node.daemon())
    first = node.program(uid=1000)
    first.got()
    second = node.program(uid=1001)

    assert "serves only one uid at a time" in node.logged.wait("serves only one uid")
    assert second.quiet()
    assert first.end() == 0
    assert second.got() == ("10240", "40")


@MOUNTS
def test_a_daemon_has_the_shared_memory_that_its_programs_are_given(node: MpsNode) -> None:
    node.supervise()

    running = node.client.ensure(node.daemon())

    if node.logged.lines("no /dev/shm of its own"):
        pytest.skip("needs CAP_SYS_ADMIN: a mount namespace of its own")
    assert Path(f"/proc/{running.pid}/root/dev/shm").stat().st_ino == node.client.shm("gpu-0").stat().st_ino


@MOUNTS
def test_where_mounts_propagate_each_daemon_has_shared_memory_of_its_own(node: MpsNode) -> None:
    apart = ("unshare", "--mount", "--propagation", "shared")
    if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs CAP_SYS_ADMIN: a mount namespace of its own")
    supervisor = node.supervise_in_process(*apart)
    mounts = Path(f"/proc/{supervisor.pid}/mountinfo")

    daemon = node.client.ensure(node.daemon())
    node.client.ensure(node.daemon(1))
    with_two = mounts.read_text(encoding="utf-8").count(" - tmpfs gpuslice ")
    inside = Path(f"/proc/{daemon.pid}/mountinfo").read_text(encoding="utf-8")
    node.client.stop("gpu-0")
    with_one = mounts.read_text(encoding="utf-8").count(" - tmpfs gpuslice ")

    assert (with_two, with_one) == (2, 1)
    assert [line.split()[4] for line in inside.splitlines() if "tmpfs gpuslice" in line].count("/dev/shm") == 1
    assert not node.client.shm("gpu-0").exists()


# ---------------------------------------------------------------- folders


def test_what_an_earlier_boot_left_is_removed(node: MpsNode) -> None:
    folder = node.root / "gpu-0"
    folder.mkdir(parents=True)
    record = folder / "daemon.json"
    record.write_text(
        '{"daemon": {"key": "gpu-0", "device": "GPU-1", "memory_mib": 1, "threads_percent": null}, '
        f'"process": {{"pid": {os.getpid()}, "started": 1, "boot": "not {boot_id()}"}}}}'
    )

    node.supervise()

    assert not folder.exists()
    assert "of an earlier boot" in node.logged.wait("cannot adopt the MPS daemon")


def test_a_folder_that_tells_nothing_is_removed_and_what_is_no_daemons_stays(node: MpsNode) -> None:
    (node.root / "gpu-0" / "pipe").mkdir(parents=True)
    (node.root / "Not A Key").mkdir()

    node.supervise()

    assert not (node.root / "gpu-0").exists()
    assert (node.root / "Not A Key").exists()


@AS_ROOT
def test_a_folder_of_somebody_else_is_refused(node: MpsNode) -> None:
    node.supervise()
    folder = node.root / "gpu-0"
    folder.mkdir()
    os.chown(folder, 4711, -1)

    with pytest.raises(DeviceError, match="belongs to uid 4711, and the MPS supervisor runs as 0; remove it"):
        node.client.ensure(node.daemon())

    assert folder.exists()


def test_a_link_in_place_of_a_folder_is_refused(node: MpsNode) -> None:
    node.supervise()
    (node.root / "gpu-0").symlink_to(node.folder)

    with pytest.raises(DeviceError, match="is not a folder of gpuslice"):
        node.client.ensure(node.daemon())


def test_a_key_that_would_leave_the_root_is_refused(node: MpsNode) -> None:
    node.supervise()

    with pytest.raises(DeviceError, match="is not the key of an MPS daemon"):
        node.client.ensure(DaemonSpec(key="../up", device=node.uuid(), memory_mib=None, threads_percent=None))


def test_a_root_that_is_too_long_for_sockets_is_refused(node: MpsNode) -> None:
    root = node.folder / ("x" * 60) / ("y" * 40)

    with pytest.raises(DeviceError, match="bytes, more than the 107 that Linux accepts; start the MPS supervisor with"):
        Supervisor(root, node.command).open()


def test_a_driver_root_without_the_control_program_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=f"nvidia-cuda-mps-control is not in {tmp_path}"):
        control.program(tmp_path)


def test_a_control_program_that_cannot_be_run_is_told(node: MpsNode) -> None:
    node.command = ("/nonexistent/nvidia-cuda-mps-control",)
    node.supervise()

    with pytest.raises(DeviceError, match="cannot run /nonexistent/nvidia-cuda-mps-control: No such file"):
        node.client.ensure(node.daemon())


def test_a_second_supervisor_of_a_root_is_refused(node: MpsNode) -> None:
    node.supervise()

    with pytest.raises(DeviceError, match=f"another MPS supervisor serves {node.root}; stop that one first"):
        Supervisor(node.root, node.command).open()
