"""The stand-in for NVIDIA's control program: what it refuses, what it takes without a word, and what its clients see."""

from __future__ import annotations

import os
import select
import subprocess
from collections.abc import Iterator, Sequence

import pytest
from gpuslice.system.folder_watch import FolderWatch

from tests.kit.mps_node import SOON_S, MpsNode


class StandIn:
    """The program, on a pipe directory of its own."""

    def __init__(self, node: MpsNode) -> None:
        self._command = node.command
        self.pipe, self.logs = node.client.pipe("gpu-0"), node.client.log("gpu-0")
        self.pipe.mkdir(parents=True)
        self.logs.mkdir()
        self.environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": node.uuid(),
            "CUDA_MPS_PIPE_DIRECTORY": str(self.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(self.logs),
        }
        self.daemons: list[subprocess.Popen[str]] = []

    def start(self, *flags: str, **environment: str) -> None:
        """Run the daemon; returns when its socket is there."""
        watch = FolderWatch(self.pipe, arrivals=True)
        environment = {**self.environment, **environment}
        self.daemons.append(subprocess.Popen([*self._command, *flags], text=True, env=environment))
        names: list[str] = []
        while "control" not in names:
            assert select.select([watch.fileno()], [], [], SOON_S)[0]
            names += watch.read()
        watch.close()

    def run(self, *flags: str, prefix: Sequence[str] = (), **environment: str) -> tuple[int, str]:
        """Exit status and what it says, of a daemon that is to be refused."""
        done = subprocess.run(
            [*prefix, *self._command, *flags],
            capture_output=True,
            text=True,
            check=False,
            timeout=SOON_S,
            env={**self.environment, **environment},
        )
        return done.returncode, done.stderr.strip()

    def tell(self, *commands: str) -> list[str]:
        text = "".join(f"{command}\n" for command in commands)
        done = subprocess.run(
            self._command, input=text, capture_output=True, text=True, check=True, timeout=SOON_S, env=self.environment
        )
        return done.stdout.splitlines()

    def close(self) -> None:
        for daemon in self.daemons:
            if daemon.poll() is None:
                self.tell("quit -t 0")
            daemon.wait(SOON_S)


@pytest.fixture
def standin(node: MpsNode) -> Iterator[StandIn]:
    there = StandIn(node)
    yield there
    there.close()


def test_without_a_daemon_it_says_so_and_fails(standin: StandIn) -> None:
    assert standin.run() == (1, "Cannot find MPS control daemon process")


def test_a_second_daemon_of_a_pipe_directory_is_refused(standin: StandIn) -> None:
    standin.start("-f")

    assert standin.run("-f") == (1, "An instance of this daemon is already running")


def test_it_writes_its_pid_and_starts_no_server_before_the_first_program(standin: StandIn, node: MpsNode) -> None:
    standin.start("-f")
    pid = int((standin.pipe / "nvidia-cuda-mps-control.pid").read_text(encoding="ascii"))

    before = standin.tell("get_server_list")
    program = node.program()
    program.got()
    (server,) = standin.tell("get_server_list")

    assert pid == standin.daemons[0].pid
    assert before == []
    assert standin.tell(f"get_server_status {server}", f"get_client_list {server}") == ["ACTIVE", str(program.pid)]


@pytest.mark.parametrize("device", ["GPU-none", "2", "MIG-none", ""])
def test_a_device_that_is_not_there_is_refused(standin: StandIn, device: str) -> None:
    status, why = standin.run("-f", CUDA_VISIBLE_DEVICES=device)

    assert (status, why.partition(":")[0]) == (1, "No CUDA-capable device is detected")


def test_a_lost_card_is_refused(standin: StandIn, node: MpsNode) -> None:
    node.sim.lose(node.uuid())

    assert standin.run("-f")[0] == 1


def test_one_server_for_all_users_needs_root(standin: StandIn) -> None:
    nobody = ("unshare", "--user")  # a user namespace without a map: whoever it was, it is not root there
    if subprocess.run([*nobody, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a user namespace: to be without root")

    assert standin.run("-f", "-multiuser-server", prefix=nobody) == (1, "-multiuser-server requires root")


def test_unknown_flags_and_commands_are_refused(standin: StandIn) -> None:
    assert standin.run("-x") == (1, "unknown option -x")

    standin.start("-f")

    assert standin.tell(
        "fly", "get_server_status 1", "terminate_client 1 2", "set_default_device_pinned_mem_limit"
    ) == [
        "Unknown command: fly",
        "Server 1 does not exist",
        "Server 1 does not exist",
        "Invalid arguments: set_default_device_pinned_mem_limit",
    ]


@pytest.mark.parametrize("percent", ["0", "-1", "101", "many"])
def test_a_percentage_that_is_none_is_refused(standin: StandIn, percent: str) -> None:
    standin.start("-f")

    standin.tell(f"set_default_active_thread_percentage {percent}")

    assert standin.tell("get_default_active_thread_percentage") == ["100.0"]


def test_the_device_of_a_limit_is_not_validated(standin: StandIn, node: MpsNode) -> None:
    standin.start("-f")

    said = standin.tell(
        f"set_default_device_pinned_mem_limit {node.uuid(1)} 1G", "set_default_device_pinned_mem_limit 5 1G"
    )

    assert said == []
    assert standin.tell("get_default_device_pinned_mem_limit 0") == ["No limit set"]


def test_defaults_hold_for_servers_that_start_afterwards(standin: StandIn, node: MpsNode) -> None:
    standin.start("-f")
    node.program().got()

    standin.tell("set_default_device_pinned_mem_limit 0 2G", "set_default_active_thread_percentage 50")

    assert node.program().got() == ("none", "100")
    (server,) = standin.tell("get_server_list")
    assert standin.tell(f"get_device_pinned_mem_limit {server} 0") == ["No limit set"]
    standin.tell(f"set_device_pinned_mem_limit {server} 0 1G", f"set_active_thread_percentage {server} 30")
    assert node.program().got() == ("1024", "30")


def test_quitting_waits_for_the_programs_and_refuses_new_ones(standin: StandIn, node: MpsNode) -> None:
    standin.start("-f")
    program = node.program()
    program.got()

    standin.tell("quit")

    assert node.program().says() == "refused: the daemon is quitting"
    assert standin.daemons[0].poll() is None
    assert program.end() == 0
    assert standin.daemons[0].wait(SOON_S) == 0


def test_a_server_is_shut_down_with_its_programs_only_by_force(standin: StandIn, node: MpsNode) -> None:
    standin.start("-f")
    program = node.program()
    program.got()
    (server,) = standin.tell("get_server_list")

    assert standin.tell(f"shutdown_server {server}") == [f"Server {server} has clients"]
    assert standin.tell(f"shutdown_server {server} -f") == []
    assert program.says() == "terminated"
    assert program.wait() == 1


def test_a_program_loses_its_server_when_that_is_killed(standin: StandIn, node: MpsNode) -> None:
    standin.start("-f")
    program = node.program()
    program.got()
    (server,) = standin.tell("get_server_list")

    os.kill(int(server), 9)

    assert program.says() == "its server ended"
    assert program.end() == 1


def test_in_the_background_it_returns_and_serves(standin: StandIn) -> None:
    standin.start("-d")

    assert standin.daemons[0].wait(SOON_S) == 0
    assert standin.tell("start_server -uid 7") == []
    assert len(standin.tell("get_server_list")) == 1
    standin.tell("quit")
