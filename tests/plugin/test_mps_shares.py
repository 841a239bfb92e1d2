"""Shares of a card by MPS: the transaction over a real supervisor, real (stand-in) daemons and stand-in CUDA programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.core.model import MIB, Claim, Settings
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ClaimError, DeviceError
from gpuslice.mps import control
from gpuslice.mps.api import DaemonStatus
from gpuslice.mps.supervisor import Supervisor
from gpuslice.nvml.api import MPS_SERVER, ComputeMode
from gpuslice.nvml.sim.node import SimNode

from tests.kit.mps_node import StandInProgram
from tests.kit.rig import Rig, a_claim, a_ref, a_share
from tests.plugin.test_shares import GIB, env

TWINS = Policy.parse(
    {
        "apiVersion": "gpuslice.dev/v1alpha1",
        "kind": "Policy",
        "default": {"sharedPartitions": ["mps", "timeslice"], "static": {"mps": 4}},
    }
)


def a_supervisor(folder: Path) -> Supervisor:
    return Supervisor(folder / "mps", control.stand_in(folder / "node"))


@pytest.fixture
def rig(short: Path) -> Iterator[Rig]:
    there = Rig(short, policy=TWINS)
    supervisor = a_supervisor(short)
    supervisor.open()
    yield there
    supervisor.close()
    there.nvml.close()


def by_mps(rig: Rig, name: str, gib: int = 10, percent: int = 0, clients: int = 1, device: str = "mps") -> Claim:
    ceiling = {"smPercent": percent} if percent else {}
    return a_share(name, rig.device(device), {"memory": gib * GIB, "clients": clients, **ceiling})


def daemon(rig: Rig) -> DaemonStatus:
    (running,) = rig.mps.statuses()
    return running


def program(rig: Rig, claim: Claim) -> StandInProgram:
    """A CUDA program in a container of this claim."""
    return StandInProgram.of_environment(env(rig, claim))


@pytest.mark.contract(30, 44)
def test_the_first_share_starts_the_daemon_and_the_last_one_ends_it(rig: Rig) -> None:
    claims = [by_mps(rig, name) for name in ("one", "two")]
    for claim in claims:
        rig.prepare(claim)
    pid = daemon(rig).pid
    assert rig.figures() == (ComputeMode.EXCLUSIVE_PROCESS, 0)

    rig.unprepare(claims[0])
    assert (daemon(rig).pid, daemon(rig).problem) == (pid, "")
    assert rig.figures() == (ComputeMode.EXCLUSIVE_PROCESS, 0)

    rig.unprepare(claims[1])
    assert rig.mps.statuses() == ()
    rig.assert_empty()


@pytest.mark.contract(35)
def test_the_daemon_s_ceilings_are_those_of_the_largest_share_and_each_program_keeps_to_its_own(rig: Rig) -> None:
    small, large = by_mps(rig, "small", gib=10, percent=20), by_mps(rig, "large", gib=40, percent=60)
    rig.prepare(small)
    rig.prepare(large)

    assert (daemon(rig).memory_mib, daemon(rig).threads_percent) == (40960, 60)
    told = env(rig, small)
    assert told["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == "0=10240M"
    assert told["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "20"
    assert told["GPUSLICE_GPU_0_MEMORY_ENFORCEMENT"] == "mps"
    running = program(rig, small)
    assert running.got() == ("10240", "20")
    assert running.allocates(40961) != "ok"  # the daemon's own ceiling, whatever the program does to its environment
    running.end()

    rig.unprepare(large)
    assert (daemon(rig).memory_mib, daemon(rig).threads_percent) == (10240, 20)


@pytest.mark.contract(31)
@pytest.mark.parametrize("other", ["gpu", "timeslice", "mig-7g-0-0", "mig-1g-19-0-mps"])
def test_mps_on_a_card_excludes_every_other_mode_and_gives_way_when_it_is_empty(rig: Rig, other: str) -> None:
    mine, theirs = by_mps(rig, "mine"), a_claim("theirs", rig.device(other))

    rig.assert_take_turns(mine, theirs)


def test_shares_of_a_partition_have_a_daemon_of_their_own_on_its_uuid(rig: Rig) -> None:
    shares = [by_mps(rig, name, gib=2, device="mig-1g-19-0-mps") for name in ("one", "two")]
    beside = by_mps(rig, "beside", gib=2, device="mig-1g-19-1-mps")
    uuids = {rig.prepare(claim).devices[0].uuid for claim in shares} | {rig.prepare(beside).devices[0].uuid}

    assert len(uuids) == 2
    assert {running.device for running in rig.mps.statuses()} == uuids
    for claim in (*shares, beside):
        rig.unprepare(claim)
    assert rig.mps.statuses() == ()
    rig.assert_empty()


def test_a_killed_driver_disturbs_no_client_and_finds_the_limits_as_they_were(rig: Rig) -> None:
    claims = [by_mps(rig, f"c{number}", gib=10 - number % 2) for number in range(8)]
    for claim in claims:
        rig.prepare(claim)
    programs = [program(rig, claim) for claim in claims]
    limits, before = [running.got() for running in programs], daemon(rig)

    again = rig.restart()  # nothing was handed over: the process is as dead as after SIGKILL
    again.recover()
    again.preparer.ensure_daemons(again.gpus[0].uuid)
    prepared = [again.prepare(claim) for claim in claims]

    assert len(prepared) == 8
    assert daemon(again) == before
    assert all(running.quiet() for running in programs)
    assert limits == [(str((10 - number % 2) * 1024), "100") for number in range(8)]
    assert [running.end() for running in programs] == [0] * 8


def test_daemons_of_a_lost_supervisor_are_made_again_from_the_records(short: Path) -> None:
    rig = Rig(short, policy=TWINS)
    first = a_supervisor(short)
    first.open()
    claim = by_mps(rig, "one", gib=12)
    rig.prepare(claim)
    pipe = rig.mps.pipe(daemon(rig).key)
    first.close()
    with pytest.raises(DeviceError, match="no MPS supervisor answers"):
        rig.mps.statuses()

    second = a_supervisor(short)
    second.open()
    rig.preparer.ensure_daemons(rig.gpus[0].uuid)

    assert (daemon(rig).memory_mib, rig.mps.pipe(daemon(rig).key)) == (12288, pipe)
    rig.unprepare(claim)
    rig.assert_empty()
    second.close()


def test_without_a_supervisor_a_share_is_refused_with_a_sentence_and_the_card_stays_free(short: Path) -> None:
    rig = Rig(short)
    with pytest.raises(DeviceError, match=r"no MPS supervisor answers at .*; start it: gpuslice mps-supervisor"):
        rig.ask(by_mps(rig, "one"))

    rig.assert_empty()
    rig.prepare(a_claim("two", rig.device("gpu")))


def test_a_daemon_that_takes_no_limit_leaves_nothing_half_made(rig: Rig) -> None:
    cue = rig.folder / "node" / "mps"
    cue.mkdir(exist_ok=True)
    (cue / "ignore-limits").touch()
    with pytest.raises(DeviceError, match="did not accept the memory ceiling of 10240 MiB"):
        rig.ask(by_mps(rig, "one"))
    assert rig.mps.statuses() == ()
    rig.assert_empty()

    (cue / "ignore-limits").unlink()
    rig.prepare(by_mps(rig, "one"))


def test_fixed_parts_of_a_static_plan_share_one_daemon(short: Path) -> None:
    rig = Rig(short, "h100", TWINS, static=True)
    supervisor = a_supervisor(short)
    supervisor.open()
    claims = [a_claim(name, rig.device(f"mps-{part}")) for part, name in enumerate(("one", "two"))]
    for claim in claims:
        rig.prepare(claim)

    quarter = rig.inventory.pools[0].memory_mib // 4
    assert daemon(rig).memory_mib == quarter
    assert env(rig, claims[1])["CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"] == f"0={quarter}M"
    for claim in claims:
        rig.unprepare(claim)
    rig.assert_empty()
    supervisor.close()


def test_a_share_beyond_what_is_left_waits_for_those_who_hold_it(rig: Rig) -> None:
    """A scheduler of an early 1.36 patch over-allocates; a limit that MPS cannot keep would be no limit."""
    first = by_mps(rig, "first", gib=50, percent=80, clients=40)
    rig.prepare(first)

    assert rig.busy(by_mps(rig, "memory", gib=30)) == (first.ref,)
    assert rig.busy(by_mps(rig, "percent", gib=1, percent=30)) == (first.ref,)
    assert rig.busy(by_mps(rig, "clients", gib=1, clients=20)) == (first.ref,)
    assert daemon(rig).memory_mib == 50 * GIB // MIB


def test_a_repeated_prepare_has_its_daemon_made_again(short: Path) -> None:
    rig = Rig(short)
    first = a_supervisor(short)
    first.open()
    claim = by_mps(rig, "one")
    rig.prepare(claim)
    first.close()
    with pytest.raises(DeviceError, match="no MPS supervisor answers"):
        rig.ask(claim)

    second = a_supervisor(short)
    second.open()
    rig.prepare(claim)

    assert (daemon(rig).memory_mib, daemon(rig).problem) == (10240, "")
    rig.unprepare(claim)
    second.close()


def test_several_mps_shares_in_one_request_are_refused_for_a_program_can_use_one(rig: Rig) -> None:
    (first,) = by_mps(rig, "one").allocations
    (second,) = by_mps(rig, "two").allocations

    with pytest.raises(
        ClaimError, match=r"request gpu-0 of claim .* has 2 MPS shares, but a container can use only one"
    ):
        rig.ask(Claim(a_ref("both"), (first, second)))
    rig.assert_empty()


def test_a_daemon_that_cannot_be_mended_keeps_none_of_its_neighbours(rig: Rig) -> None:
    shares = [by_mps(rig, name, gib=2, device=f"mig-1g-19-{place}-mps") for place, name in enumerate(("one", "two"))]
    uuids = [str(rig.prepare(claim).devices[0].uuid) for claim in shares]
    for running in rig.mps.statuses():
        rig.mps.stop(running.key)
    cues = rig.folder / "node" / "mps"
    cues.mkdir(exist_ok=True)
    (cues / f"refuse-start.{uuids[0]}").touch()

    with pytest.raises(DeviceError):
        rig.preparer.ensure_daemons(rig.gpus[0].uuid)

    assert [running.device for running in rig.mps.statuses() if not running.problem] == [uuids[1]]


def test_a_server_of_mps_alone_does_not_keep_an_orphan(rig: Rig) -> None:
    claim = by_mps(rig, "one")
    rig.prepare(claim)
    (record,) = rig.checkpoint.records().values()
    assert not rig.preparer.in_use(record)

    SimNode(rig.folder / "node").run_process(rig.gpus[0].uuid, name=MPS_SERVER)

    assert not rig.preparer.in_use(record)


# ---------------------------------------------------------------- settings that are kept


KEEP = Policy.parse(
    {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": {"keep": ["computeMode", "timeSlice"]}}
)


def test_a_policy_that_keeps_the_compute_mode_has_shares_and_the_card_s_own_mode(short: Path) -> None:
    there = Rig(short, policy=KEEP)
    supervisor = a_supervisor(short)
    supervisor.open()
    claim = by_mps(there, "one")

    there.prepare(claim)

    assert there.figures() == (ComputeMode.DEFAULT, 0)
    assert daemon(there).memory_mib == 10 * 1024
    assert env(there, claim)["GPUSLICE_GPU_0_MEMORY_ENFORCEMENT"] == "none"  # a program can go past the daemon
    there.unprepare(claim)
    assert there.figures() == (ComputeMode.DEFAULT, 0)
    there.assert_empty()
    supervisor.close()
    there.nvml.close()


def test_a_share_that_set_the_compute_mode_gives_it_back_under_a_policy_that_keeps_it(short: Path) -> None:
    before = Rig(short, policy=Policy.default())
    supervisor = a_supervisor(short)
    supervisor.open()
    claim = by_mps(before, "one")
    before.prepare(claim)
    before.nvml.close()

    after = Rig(short, policy=KEEP)
    after.unprepare(claim)

    assert after.figures() == (ComputeMode.DEFAULT, 0)
    after.assert_empty()
    supervisor.close()
    after.nvml.close()


def test_a_kept_compute_mode_in_which_no_program_starts_is_refused_with_the_remedy(short: Path) -> None:
    there = Rig(short, policy=KEEP)
    supervisor = a_supervisor(short)
    supervisor.open()
    there.nvml.set_compute_mode(there.gpus[0].uuid, ComputeMode.PROHIBITED)

    with pytest.raises(DeviceError, match="has compute mode PROHIBITED, in which no program starts, and this node's"):
        there.prepare(by_mps(there, "one"))

    assert there.figures() == (ComputeMode.PROHIBITED, 0)
    assert there.mps.statuses() == ()
    assert there.records() == set()
    supervisor.close()
    there.nvml.close()


def test_a_policy_that_keeps_the_time_slice_refuses_an_interval_and_names_itself(short: Path) -> None:
    there = Rig(short, policy=KEEP)
    claim = a_share("one", there.device("gpu"), settings=Settings(interval="short"))

    with pytest.raises(
        ClaimError, match=r"/gpu cannot have the time-slice interval 'short', because this node's policy"
    ):
        there.prepare(claim)

    assert there.figures() == (ComputeMode.DEFAULT, 0)
    there.nvml.close()
