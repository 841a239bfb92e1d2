"""The errors of the supervisor, its daemons and its clients if the machine, a driver or another release is unusable."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpuslice import __version__
from gpuslice.errors import DeviceError
from gpuslice.mps import control, daemon, launch
from gpuslice.mps.daemon import Timeouts
from gpuslice.mps.paths import Paths
from gpuslice.mps.process import PidfdProcess, ProcessId

from tests.kit.mps_node import SOON_S, MpsNode

APART = ("unshare", "--mount", "--propagation", "shared")
NO_RIGHT = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
MOUNTS = pytest.mark.skipif(
    subprocess.run([*APART, *NO_RIGHT, "true"], capture_output=True, check=False).returncode != 0,
    reason="needs root with CAP_SYS_ADMIN, unshare and setpriv",
)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a folder of another user")


def a_driver(node: MpsNode, refused: str) -> None:
    """A control program that refuses all its commands if one of them begins so. It tells the first one to the FIFO `asked`."""
    program, asked = node.folder / control.NAME, node.folder / "asked"
    os.mkfifo(asked)
    real = " ".join(node.command)
    program.write_text(
        f'#!/bin/sh\n[ $# -gt 0 ] && exec {real} "$@"\nlines=""\n'
        f'while read -r line; do\n  lines="$lines$line\n"\n'
        f'  case "$line" in "{refused}"*) echo "not known: $line"; exit 1;; esac\ndone\n'
        f'printf "%b" "$lines" | {real}\nstatus=$?\n'
        f'[ -e {asked}.on ] && printf "%b" "$lines" | head -n 1 > {asked}\nexit $status\n'
    )
    program.chmod(0o755)
    node.command = (str(program),)


# ---------------------------------------------------------------- drivers of other releases


def test_a_driver_that_knows_no_limit_by_index_is_limited_by_uuid(node: MpsNode) -> None:
    a_driver(node, "set_default_device_pinned_mem_limit 0")
    node.supervise()

    running = node.client.ensure(node.daemon())

    assert running.memory_mib == 10240
    assert "an MPS daemon refused a command" in node.logged.wait("not known: set_default_device_pinned_mem_limit 0")
    assert node.program().got() == ("10240", "40")


def test_a_ceiling_of_multiprocessors_that_was_not_taken_is_told(node: MpsNode) -> None:
    node.cue("ignore-limits")
    node.supervise()

    with pytest.raises(
        DeviceError, match=r"did not accept the ceiling of 40 % of the multiprocessors and reports 100 %"
    ):
        node.client.ensure(node.daemon(memory_mib=None))


def test_where_one_of_two_ceilings_is_refused_both_are_as_before(node: MpsNode) -> None:
    a_driver(node, "set_default_active_thread_percentage 60")
    node.supervise()
    node.client.ensure(node.daemon())

    with pytest.raises(DeviceError, match="did not accept the ceiling of 60 %"):
        node.client.ensure(node.daemon(memory_mib=20480, threads_percent=60))

    (running,) = node.client.statuses()
    assert (running.memory_mib, running.threads_percent) == (10240, 40)
    assert "did not accept the ceiling of 60 %" in running.problem
    assert node.program().got() == ("10240", "40")


def test_an_adopted_daemon_that_refuses_its_ceilings_runs_on_with_that_problem(node: MpsNode) -> None:
    supervisor = node.supervise_in_process()
    first = node.client.ensure(node.daemon())
    supervisor.kill()
    supervisor.wait()
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": str(node.client.pipe("gpu-0"))}
    lowered = "set_default_active_thread_percentage 10\n"
    subprocess.run(node.command, input=lowered, text=True, check=True, env=environment)
    a_driver(node, "set_default_active_thread_percentage 40")

    node.supervise()

    (adopted,) = node.client.statuses()
    assert (adopted.pid, adopted.threads_percent) == (first.pid, 10)
    assert "did not accept the ceiling of 40 % of the multiprocessors and reports 10 %" in adopted.problem


def test_the_control_program_of_a_driver_root_gets_the_libraries_of_that_root(tmp_path: Path) -> None:
    for name in ("usr/bin/nvidia-cuda-mps-control", "usr/bin/nvidia-cuda-mps-server", "usr/lib64/libcuda.so.1"):
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o755)
    links = tmp_path / "links"

    words = control.program(tmp_path / "root", links=links)

    assert words[:2] == ("env", f"LD_LIBRARY_PATH={links}")
    assert words[-1] == str(tmp_path / "root/usr/bin/nvidia-cuda-mps-control")
    assert {link.name for link in links.iterdir()} == {control.NAME, "nvidia-cuda-mps-server", "libcuda.so.1"}


# ---------------------------------------------------------------- daemons that are well, and daemons that are not for long


def test_a_daemon_whose_servers_serve_is_well(node: MpsNode) -> None:
    node.root.mkdir()
    process = daemon.start(Paths(node.root), node.daemon(), node.command, 5.0)
    try:
        assert process.probe() == ""  # without a server
        node.program().got()

        assert process.probe() == ""
    finally:
        process.stop()
    assert node.programs[0].wait() == 1


def test_a_daemon_that_ends_again_before_it_was_found_well_is_started_after_a_pause(node: MpsNode) -> None:
    node.supervise(Timeouts(probe_s=600))
    os.kill(node.client.ensure(node.daemon()).pid, signal.SIGKILL)
    node.logged.wait("was started again")

    os.kill(node.client.statuses()[0].pid, signal.SIGKILL)
    down = node.logged.wait("an MPS daemon is down")
    node.logged.wait("was started again", times=2)

    assert down.endswith("was killed by SIGKILL; it is started again in 1 s")
    (again,) = node.client.statuses()
    assert (again.pid > 0, again.restarts) == (True, 2)


def test_a_daemon_that_ends_after_it_was_found_well_is_started_again_at_once(node: MpsNode) -> None:
    a_driver(node, "nothing")
    node.supervise(Timeouts(probe_s=0.2, answer_s=10))
    os.kill(node.client.ensure(node.daemon()).pid, signal.SIGKILL)
    node.logged.wait("was started again")
    with os.fdopen(os.open(node.folder / "asked", os.O_RDWR), encoding="utf-8") as asked:
        (node.folder / "asked.on").touch()
        for _ in range(2):  # the second probe shows that the first one has ended
            while asked.readline() != "get_server_list\n":
                pass
        (node.folder / "asked.on").unlink()

        os.kill(node.client.statuses()[0].pid, signal.SIGKILL)
        node.logged.wait("was started again", times=2)

    assert not node.logged.lines("an MPS daemon is down")


# ---------------------------------------------------------------- the machine


def test_a_launcher_that_can_neither_mount_nor_run_its_command_says_both() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "gpuslice.mps.launch", "/nonexistent/shm", "/nonexistent/command"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert told.returncode == 127
    no_shm, cannot_run = told.stderr.splitlines()
    assert no_shm.startswith(launch.NO_SHM)
    assert cannot_run == "cannot run /nonexistent/command: No such file or directory"


@MOUNTS
def test_a_supervisor_that_may_not_mount_serves_and_says_what_is_missing(node: MpsNode) -> None:
    supervisor = node.supervise_in_process(*APART, *NO_RIGHT)

    running = node.client.ensure(node.daemon())

    assert (running.problem, node.program().got()) == ("", ("10240", "40"))
    supervisor.terminate()
    _, log = supervisor.communicate(timeout=SOON_S)
    assert f"fills the root folder key=gpu-0 root={node.root}: no tmpfs, because Operation not permitted" in log
    assert (
        "an MPS daemon has no /dev/shm of its own (Operation not permitted); run as root with CAP_SYS_ADMIN key=gpu-0"
        in log
    )


@MOUNTS
def test_a_daemon_that_is_started_again_keeps_the_shared_memory_of_its_programs(node: MpsNode) -> None:
    supervisor = node.supervise_in_process(*APART)
    first = node.client.ensure(node.daemon())
    inside = Path(f"/proc/{supervisor.pid}/root")
    there = (inside / node.client.shm("gpu-0").relative_to("/")).stat()

    process = PidfdProcess(ProcessId.of(first.pid))
    process.kill()
    assert process.ended(SOON_S)
    again = node.client.ensure(node.daemon())

    assert again.pid != first.pid
    mounts = Path(f"/proc/{supervisor.pid}/mountinfo").read_text(encoding="utf-8")
    assert mounts.count(" - tmpfs gpuslice ") == 1
    assert (inside / node.client.shm("gpu-0").relative_to("/")).stat().st_dev == there.st_dev


def test_a_folder_that_cannot_be_made_is_named_with_the_remedy(node: MpsNode) -> None:
    node.supervise()
    (node.root / "gpu-0").mkdir()
    (node.root / "gpu-0/pipe").touch()

    with pytest.raises(
        DeviceError, match=r"cannot make folder .*/gpu-0 of an MPS daemon: File exists .*check its owner"
    ):
        node.client.ensure(node.daemon())


def test_a_console_that_cannot_be_written_fails_the_start_and_leaves_nothing(node: MpsNode) -> None:
    node.supervise()
    (node.root / "gpu-0/log/console").mkdir(parents=True)

    with pytest.raises(DeviceError, match=r"cannot start an MPS daemon: Is a directory \(.*/console\)"):
        node.client.ensure(node.daemon())

    assert not (node.root / "gpu-0").exists()
    assert node.client.ensure(node.daemon()).problem == ""


@AS_ROOT
def test_a_folder_of_somebody_else_is_neither_adopted_nor_removed(node: MpsNode) -> None:
    (node.root / "gpu-0").mkdir(parents=True)
    os.chown(node.root / "gpu-0", 4711, -1)

    node.supervise()

    assert node.client.statuses() == ()
    assert (node.root / "gpu-0").exists()
    assert "belongs to uid 4711" in node.logged.wait("cannot remove the folder")


def test_a_supervisor_out_of_descriptors_says_so_and_serves_when_clients_have_gone(node: MpsNode) -> None:
    supervisor = node.supervise_in_process("prlimit", "--nofile=40")
    silent = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(50)]
    for client in silent:
        client.connect(str(node.root / "supervisor.sock"))
    assert supervisor.stderr is not None
    while "cannot accept a connection" not in (line := supervisor.stderr.readline()):
        assert line, "the supervisor has ended"

    for client in silent:
        client.close()

    assert node.client.statuses() == ()


def test_a_request_that_fails_in_an_unforeseen_way_is_answered_and_ends_nothing(node: MpsNode) -> None:
    node.supervise()

    with pytest.raises(DeviceError, match=r"the MPS supervisor failed unexpectedly \(ValueError: .*; see its log"):
        node.client.ensure(node.daemon(device="MIG-\0"))

    assert node.client.statuses() == ()
    assert node.client.ensure(node.daemon()).problem == ""


def test_a_supervisor_that_ends_starts_no_daemon_any_more(node: MpsNode) -> None:
    supervisor = node.supervise()
    node.supervisor = None
    supervisor.close()

    with pytest.raises(DeviceError, match="the MPS supervisor is ending; try again when the next one runs"):
        supervisor.ensure(node.daemon())

    assert not (node.root / "gpu-0").exists()


# ---------------------------------------------------------------- supervisors of other releases, as the driver meets them


@contextmanager
def another_supervisor(node: MpsNode, *answers: object) -> Iterator[None]:
    """It greets and answers its one client with these bodies, then hangs up."""
    node.root.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(node.root / "supervisor.sock"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rwb") as stream:
                for answer in answers:
                    stream.readline()
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()
                stream.readline()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            thread.join(SOON_S)


GREETING = {"gpuslice-mps": [1], "version": 1, "incarnation": "other", "release": "9.9"}
STATUS = {"key": "gpu-0", "device": "GPU-1", "memory_mib": None, "threads_percent": None, "problem": ""}


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        (
            [GREETING],
            r"cannot ensure the MPS daemon of GPU-\S+: the MPS supervisor at \S+ closed the connection without an answer",
        ),
        ([GREETING, {"running": []}], "the MPS supervisor answered without a daemon; see its log"),
        ([GREETING, {"running": [7]}], "7 describes no running MPS daemon; update the older one"),
        ([GREETING, {"running": [{**STATUS, "pid": "12"}]}], "pid of an MPS daemon is '12' and must be a whole number"),
        ([{"error": "this release has ended"}], "^this release has ended$"),
        (
            [{"gpuslice-mps": [7], "version": 7, "release": "9.9"}],
            r"gpuslice 9\.9 speaks versions \[7\] of the MPS supervisor's protocol, and this side \[1\]; update the older",
        ),
    ],
)
def test_an_answer_that_the_driver_does_not_understand_is_one_sentence(
    node: MpsNode, answers: list[object], sentence: str
) -> None:
    with another_supervisor(node, *answers), pytest.raises(DeviceError, match=sentence):
        node.client.ensure(node.daemon())


def test_a_newer_supervisor_may_say_more_than_the_driver_knows(node: MpsNode) -> None:
    body = {**STATUS, "pid": 12, "restarts": 0, "temperature": 40}
    with another_supervisor(node, {**GREETING, "more": __version__}, {"running": [body], "more": True}):
        assert node.client.ensure(node.daemon()).pid == 12
