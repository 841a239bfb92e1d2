"""Daemons that end, hang or fail, and supervisors that go and come back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpuslice.errors import DeviceError
from gpuslice.mps.daemon import Timeouts
from gpuslice.mps.monitor import pause_s
from gpuslice.mps.process import PidfdProcess, ProcessId
from gpuslice.mps.supervisor import Supervisor

from tests.kit.mps_node import QUICK, SOON_S, MpsNode

SMALL_KIB = 30 * 1024


def _gone(pid: int) -> bool:
    """Whether the process ends soon, or has."""
    try:
        return PidfdProcess(ProcessId.of(pid)).ended(SOON_S)
    except ProcessLookupError:
        return True


def _servers(node: MpsNode, key: str = "gpu-0") -> list[int]:
    """Pids of the servers that this daemon has started."""
    lines = (node.client.log(key) / "server.log").read_text(encoding="utf-8").splitlines()
    return [int(line.partition("server pid=")[2].split()[0]) for line in lines if line.endswith("started")]


# ---------------------------------------------------------------- daemons


def test_a_killed_daemon_is_started_again_at_the_same_paths_and_told(node: MpsNode) -> None:
    node.supervise()
    first = node.client.ensure(node.daemon())
    pipe = node.client.pipe("gpu-0").stat()
    program = node.program()
    program.got()

    os.kill(first.pid, signal.SIGKILL)
    node.logged.wait("was started again")
    (again,) = node.client.statuses()

    assert again.problem == (
        f"the MPS daemon of {node.uuid()} was killed by SIGKILL; it was started again, and its clients were lost"
    )
    assert (again.restarts, again.memory_mib, again.threads_percent) == (1, 10240, 40)
    assert again.pid != first.pid
    assert node.client.pipe("gpu-0").stat().st_ino == pipe.st_ino
    assert program.wait() == 1
    assert node.program().got() == ("10240", "40")


def test_ensuring_a_daemon_that_was_started_again_ends_its_problem(node: MpsNode) -> None:
    node.supervise()
    os.kill(node.client.ensure(node.daemon()).pid, signal.SIGKILL)
    node.logged.wait("was started again")

    running = node.client.ensure(node.daemon())

    assert (running.problem, running.restarts) == ("", 1)


def test_the_servers_of_a_killed_daemon_go_with_it(node: MpsNode) -> None:
    node.supervise()
    daemon = node.client.ensure(node.daemon())
    node.program().got()
    (server,) = _servers(node)

    os.kill(daemon.pid, signal.SIGKILL)
    node.logged.wait("was started again")

    assert _gone(server)


def test_a_daemon_that_stops_answering_is_replaced(node: MpsNode) -> None:
    node.supervise(QUICK)
    first = node.client.ensure(node.daemon())

    os.kill(first.pid, signal.SIGSTOP)
    node.logged.wait("was started again")
    (again,) = node.client.statuses()

    assert "did not answer within 0.5 s to 'get_server_list'" in again.problem
    assert again.pid != first.pid
    assert _gone(first.pid)


def test_a_daemon_that_hangs_when_it_is_changed_is_told_and_replaced_at_once(node: MpsNode) -> None:
    node.supervise(Timeouts(probe_s=600, answer_s=0.5))
    node.client.ensure(node.daemon())
    hang = node.cue("hang")

    with pytest.raises(DeviceError, match="did not answer within"):
        node.client.ensure(node.daemon(memory_mib=20480))
    node.logged.wait("is replaced key=gpu-0")
    hang.unlink()

    assert node.client.ensure(node.daemon(memory_mib=20480)).memory_mib == 20480


def test_a_server_in_fault_is_told_and_its_daemon_replaced(node: MpsNode) -> None:
    node.supervise(QUICK)
    first = node.client.ensure(node.daemon())
    program = node.program()
    program.got()

    node.cue("fault")
    node.logged.wait("was started again")
    (again,) = node.client.statuses()

    assert "is in FAULT after a fatal error of one client" in again.problem
    assert again.pid != first.pid
    assert program.wait() == 1


def test_a_daemon_that_cannot_be_started_again_is_down_until_it_can(node: MpsNode) -> None:
    node.supervise()
    first = node.client.ensure(node.daemon())
    refused = node.cue("refuse-start")

    os.kill(first.pid, signal.SIGKILL)
    node.logged.wait("an MPS daemon is down")
    (down,) = node.client.statuses()
    refused.unlink()
    node.logged.wait("was started again")  # a second later, by itself

    assert (down.pid, down.memory_mib) == (0, None)
    assert "was killed by SIGKILL, and it cannot be started again: " in down.problem
    assert down.problem.endswith("; it is started again in 1 s")
    assert node.client.statuses()[0].pid > 0


def test_ensuring_a_daemon_that_is_down_does_not_wait_for_its_pause(node: MpsNode) -> None:
    node.supervise()
    first = node.client.ensure(node.daemon())
    refused = node.cue("refuse-start")
    os.kill(first.pid, signal.SIGKILL)
    node.logged.wait("an MPS daemon is down")
    with pytest.raises(DeviceError, match="ended with status 1 at its start"):
        node.client.ensure(node.daemon())
    refused.unlink()

    running = node.client.ensure(node.daemon())

    assert (running.problem, running.pid > 0) == ("", True)


def test_the_first_start_is_at_once_and_pauses_double_up_to_a_minute() -> None:
    assert [pause_s(failures) for failures in range(9)] == [0, 1, 2, 4, 8, 16, 32, 60, 60]


def test_a_stopped_daemon_that_hangs_is_killed_and_its_folder_removed(node: MpsNode) -> None:
    node.supervise(QUICK)
    daemon = node.client.ensure(node.daemon())
    node.program().got()
    (server,) = _servers(node)
    os.kill(daemon.pid, signal.SIGSTOP)

    node.client.stop("gpu-0")

    assert _gone(daemon.pid)
    assert _gone(server)
    assert not node.client.pipe("gpu-0").parent.exists()


# ---------------------------------------------------------------- supervisors


def test_a_supervisor_without_the_control_program_stops_daemons_and_adopts_the_others_when_it_comes(
    node: MpsNode, unmeasured: None
) -> None:
    """In an update, the container of the NVIDIA driver waits until the pods have left, and then fills the driver root."""
    first = node.supervise_in_process()
    leaves, stays = node.client.ensure(node.daemon(0)), node.client.ensure(node.daemon(1))
    first.kill()
    first.wait()
    node.supervisor = Supervisor(node.root, (), missing="nvidia-cuda-mps-control is not in /driver-root; install it")
    node.supervisor.open()

    node.client.stop("gpu-0")
    assert _gone(leaves.pid)
    assert not (node.root / "gpu-0").exists()
    with pytest.raises(DeviceError, match="nvidia-cuda-mps-control is not in /driver-root"):
        node.client.ensure(node.daemon(1))

    node.supervisor.equip(node.command)
    assert node.client.statuses() == (stays,)
    assert node.client.ensure(node.daemon(0)).problem == ""


def test_a_supervisor_in_an_empty_driver_root_serves_and_says_what_is_missing(
    node: MpsNode, short: Path, unmeasured: None
) -> None:
    (short / "root").mkdir()

    node.supervise_in_process(simulated=False, more=("--driver-root-ctr-path", str(short / "root")))

    node.client.stop("gpu-0")
    with pytest.raises(DeviceError, match="nvidia-cuda-mps-control is not in"):
        node.client.ensure(node.daemon())


@pytest.mark.parametrize("thread", ["mps-accept", "mps-gpu-0"])
def test_a_supervisor_one_of_whose_threads_dies_ends_says_which_and_leaves_its_daemons(
    node: MpsNode, unmeasured: None, thread: str
) -> None:
    supervisor = node.supervise_in_process()
    before = node.client.ensure(node.daemon())
    supervisor.kill()
    supervisor.wait()

    doomed = node.spawn("tests.kit.dead_thread", DEAD=thread)
    _, said = doomed.communicate(timeout=SOON_S)

    assert doomed.returncode == 1
    sentence = f"thread {thread} ended by ValueError: planted; the process ends, so that it is started again"
    assert sentence in said.splitlines()[-1]
    node.supervise()
    assert node.client.statuses() == (before,)


def test_a_killed_supervisors_daemons_and_programs_go_on_and_are_adopted(short: Path, unmeasured: None) -> None:
    node = MpsNode(short, "h100x8")
    supervisor = node.supervise_in_process()
    before = [node.client.ensure(node.daemon(gpu, memory_mib=1024 * (gpu + 1))) for gpu in range(8)]
    programs = [node.program(gpu) for gpu in range(8)]
    ceilings = [program.got() for program in programs]
    incarnation = node.client.incarnation()

    supervisor.kill()
    supervisor.wait()
    successor = node.supervise_in_process()

    assert node.client.statuses() == tuple(before)
    assert node.client.incarnation() != incarnation
    assert [node.client.ensure(node.daemon(gpu, memory_mib=1024 * (gpu + 1))) for gpu in range(8)] == before
    assert all(program.quiet() for program in programs)
    assert [node.program(gpu).got() for gpu in range(8)] == ceilings
    assert _resident_kib(successor.pid) <= SMALL_KIB
    node.close()


def _resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    return int(status.partition("VmRSS:")[2].split()[0])


def test_a_daemon_that_died_without_a_supervisor_is_started_again_by_the_next(node: MpsNode) -> None:
    supervisor = node.supervise_in_process()
    first = node.client.ensure(node.daemon())
    node.program().got()
    (server,) = _servers(node)

    supervisor.kill()
    supervisor.wait()
    os.kill(first.pid, signal.SIGKILL)
    node.supervise()
    (again,) = node.client.statuses()

    assert "ended while no supervisor ran; it was started again" in again.problem
    assert (again.memory_mib, again.threads_percent) == (10240, 40)
    assert _gone(server)


def test_a_daemon_that_hangs_at_adoption_is_replaced(node: MpsNode) -> None:
    supervisor = node.supervise_in_process()
    first = node.client.ensure(node.daemon())

    supervisor.kill()
    supervisor.wait()
    os.kill(first.pid, signal.SIGSTOP)
    node.supervise(QUICK)
    (again,) = node.client.statuses()

    assert again.pid != first.pid
    assert _gone(first.pid)


def test_a_daemon_that_lost_its_ceilings_has_them_again_after_adoption(node: MpsNode) -> None:
    supervisor = node.supervise_in_process()
    first = node.client.ensure(node.daemon())
    supervisor.kill()
    supervisor.wait()
    told = f"set_default_device_pinned_mem_limit {node.uuid()} 1G\nset_default_device_pinned_mem_limit 0 1G\n"
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(node.client.pipe("gpu-0"))}
    subprocess.run(node.command, input=told, text=True, check=True, env=environment)

    node.supervise()

    assert node.client.statuses() == (first,)
    assert node.program().got() == ("10240", "40")


def test_a_process_that_got_the_pid_of_a_daemon_is_left_alone(node: MpsNode) -> None:
    folder = node.root / "gpu-0"
    folder.mkdir(parents=True)
    stranger = subprocess.Popen(["sleep", "100"])
    here = ProcessId.of(stranger.pid)
    body = {"key": "gpu-0", "device": node.uuid(), "memory_mib": None, "threads_percent": None}
    process = {"pid": here.pid, "started": here.started - 1, "boot": here.boot}
    (folder / "daemon.json").write_text(json.dumps({"daemon": body, "process": process}))

    node.supervise()

    assert node.client.statuses()[0].pid != stranger.pid
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_sigterm_ends_all_daemons_and_the_next_supervisor_starts_them_at_the_same_paths(node: MpsNode) -> None:
    supervisor = node.supervise_in_process()
    daemons = [node.client.ensure(node.daemon(gpu)) for gpu in range(2)]
    program = node.program()
    program.got()
    pipe = node.client.pipe("gpu-0").stat()

    supervisor.terminate()

    assert supervisor.wait(SOON_S) == 0
    assert program.says() == "terminated"
    assert all(_gone(daemon.pid) for daemon in daemons)
    with pytest.raises(DeviceError, match=r"no MPS supervisor answers at .*start it: gpuslice mps-supervisor"):
        node.client.statuses()
    node.supervise()
    assert [one.problem != "" and one.pid > 0 for one in node.client.statuses()] == [True, True]
    assert node.client.pipe("gpu-0").stat().st_ino == pipe.st_ino


def test_a_second_supervisor_process_says_why_it_ends(node: MpsNode) -> None:
    node.supervise()
    arguments = ["--mps-root", str(node.root), "--simulate", node.spec, "--simulate-folder", str(node.sim.folder)]

    second = subprocess.run(
        [sys.executable, "-m", "gpuslice", "mps-supervisor", *arguments], capture_output=True, text=True, check=False
    )

    assert second.returncode == 1
    assert f"another MPS supervisor serves {node.root}; stop that one first, or use another root" in second.stderr
