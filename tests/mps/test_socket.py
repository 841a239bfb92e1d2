"""The socket between driver and supervisor: its messages, and the clients that must not block it."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
import sys

import pytest
from gpuslice import __version__
from gpuslice.core.json import UncheckedBody
from gpuslice.errors import DeviceError
from gpuslice.mps.client import MpsClient

from tests.kit.mps_node import MpsNode

HEAVY = ("grpc", "kubernetes", "asyncio", "google", "prometheus_client", "yaml", "pynvml", "urllib3")


def _talk(node: MpsNode, *lines: bytes) -> list[UncheckedBody]:
    """Say these lines at once, and hear all answers."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(node.root / "supervisor.sock"))
        connection.sendall(b"".join(lines))
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as stream:
            return [json.loads(line) for line in stream]


HELLO = b'{"gpuslice-mps": [1]}\n'


def test_the_supervisor_greets_with_its_incarnation_and_release(node: MpsNode) -> None:
    supervisor = node.supervise()

    greeting, answer = _talk(node, HELLO, b'{"op": "hello"}\n')

    assert greeting == {
        "gpuslice-mps": [1],
        "version": 1,
        "incarnation": supervisor.incarnation,
        "release": __version__,
    }
    assert answer == {"running": []}
    assert node.client.incarnation() == supervisor.incarnation
    running = node.client.ensure(node.daemon())
    assert node.client.seen() == (supervisor.incarnation, (running,))


def test_the_highest_version_that_both_speak_is_spoken(node: MpsNode) -> None:
    node.supervise()

    greeting, *_ = _talk(node, b'{"gpuslice-mps": [2, 1, 7], "release": "9.9", "new": true}\n', b'{"op": "hello"}\n')

    assert greeting["version"] == 1


def test_two_that_share_no_version_are_told_which_to_update(node: MpsNode) -> None:
    node.supervise()

    (answer,) = _talk(node, b'{"gpuslice-mps": [7], "release": "9.9"}\n')

    assert answer == {
        "error": "gpuslice 9.9 speaks versions [7] of the MPS supervisor's protocol, and this side [1]; "
        "update the older one of driver and supervisor"
    }


@pytest.mark.parametrize(
    "line", [b"nonsense\n", b"[]\n", b"\xff\xfe\n", b"{}\n", b"[" * 9999 + b"\n", b'{"op": "hello"}\n']
)
def test_what_is_no_greeting_is_answered_in_one_sentence(node: MpsNode, line: bytes) -> None:
    node.supervise()

    (answer,) = _talk(node, line)

    assert str(answer["error"]).startswith("the MPS supervisor does not understand the request (")


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (
            b'{"op": "fly"}',
            'the MPS supervisor does not know operation "fly"; update the supervisor, because the driver is newer',
        ),
        (b'{"op": "ensure"}', "None describes no MPS daemon; update the older one of driver and supervisor"),
        (b'{"op": "ensure", "daemon": {"key": 1}}', "key of an MPS daemon is 1 and must be a text"),
        (b'{"op": "stop", "key": "../etc"}', "'../etc' is not the key of an MPS daemon"),
        (
            b'{"op": "ensure", "daemon": {"key": "a", "device": "GPU-1", "memory_mib": 0}}',
            "a memory ceiling of 0 MiB lets no client run; use at least 1, or none",
        ),
        (
            b'{"op": "ensure", "daemon": {"key": "a", "device": "GPU-1", "threads_percent": 101}}',
            "101 % of the multiprocessors is not a valid ceiling; use 1 to 100, or none",
        ),
        (
            b'{"op": "ensure", "daemon": {"key": "a", "device": "GPU-1", "memory_mib": "much"}}',
            "memory_mib of an MPS daemon is 'much' and must be a whole number",
        ),
    ],
)
def test_a_request_that_makes_no_sense_is_answered_in_one_sentence(
    node: MpsNode, request_: bytes, sentence: str
) -> None:
    node.supervise()

    _, answer = _talk(node, HELLO, request_ + b"\n")

    assert str(answer["error"]).startswith(sentence)


def test_a_client_that_says_nothing_keeps_nobody_waiting(node: MpsNode) -> None:
    node.supervise()

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(node.root / "supervisor.sock"))
        silent.sendall(b'{"gpuslice')

        assert node.client.ensure(node.daemon()).memory_mib == 10240


def test_a_client_that_goes_away_early_leaves_the_supervisor_unimpressed(node: MpsNode) -> None:
    node.supervise()

    assert _talk(node) != []
    assert len(_talk(node, HELLO)) == 2
    assert node.client.statuses() == ()


def test_the_socket_is_for_its_owner_alone(node: MpsNode) -> None:
    node.supervise()

    assert stat.S_IMODE((node.root / "supervisor.sock").stat().st_mode) == 0o600


def test_without_a_supervisor_the_error_says_which_program_to_start(node: MpsNode) -> None:
    calls = (
        lambda: node.client.ensure(node.daemon()),
        node.client.statuses,
        node.client.incarnation,
    )

    for call in calls:
        with pytest.raises(DeviceError, match=r"no MPS supervisor answers at .*; start it: gpuslice mps-supervisor"):
            call()


def test_without_a_supervisor_a_daemon_that_never_was_is_stopped_and_one_that_may_run_is_not(node: MpsNode) -> None:
    node.client.stop("gpu-0")
    node.client.pipe("gpu-0").mkdir(parents=True)

    with pytest.raises(DeviceError, match=r"no MPS supervisor answers at"):
        node.client.stop("gpu-0")


def test_a_daemon_that_ended_with_its_supervisor_is_stopped_and_one_that_was_started_since_is_not(
    node: MpsNode,
) -> None:
    node.supervise()
    node.client.ensure(node.daemon())
    node.close()
    node.client.stop("gpu-0")
    assert node.client.pipe("gpu-0").exists(), "the driver may only read there"

    node.supervise()
    (daemon,) = node.client.statuses()
    assert not (node.root / daemon.key / "ended").exists()


def test_a_supervisor_that_does_not_greet_back_is_told(node: MpsNode) -> None:
    node.root.mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(node.root / "supervisor.sock"))
        other.listen()

        with pytest.raises(DeviceError, match=r"did not answer within 2 s; see its log"):
            MpsClient(node.root).statuses()


def test_the_supervisor_loads_nothing_heavy() -> None:
    program = f"""
import sys
from gpuslice import cli, config
from gpuslice.mps import control, supervisor
print([name for name in {HEAVY!r} if name in sys.modules])
"""

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == "[]"


def test_the_driver_loads_only_the_clients_side() -> None:
    program = (
        "import sys, gpuslice.app; print(sorted(name for name in sys.modules if name.startswith('gpuslice.mps.')))"
    )

    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert loaded.strip() == str([f"gpuslice.mps.{name}" for name in ("api", "client", "paths", "wire")])
