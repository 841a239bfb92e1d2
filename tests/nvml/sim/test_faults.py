"""Faults on cue, and which calls wait for each other. The test itself ends every wait."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from gpuslice.core.model import GpuUuid, Placement
from gpuslice.errors import ConfigError, DeviceError
from gpuslice.nvml.api import Code
from gpuslice.nvml.sim.faults import CODES
from gpuslice.nvml.sim.nvml import SECONDS, SimNvml
from gpuslice.system.files import try_lock

ONE_G, AT_0 = 19, Placement(0, 1)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[SimNvml]:
    opened = SimNvml(tmp_path, "h100x2:mig", latency="zero")
    yield opened
    opened.close()


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


def gpus(node: SimNvml) -> tuple[GpuUuid, GpuUuid]:
    one, two = node.cards
    return one.uuid, two.uuid


def refused(code: Code) -> pytest.RaisesExc[DeviceError]:
    return pytest.RaisesExc(DeviceError, check=lambda error: error.code == code)


def test_a_cued_call_fails_once_with_its_code_and_changes_nothing(node: SimNvml) -> None:
    one, _ = gpus(node)
    node.cue("fail", "create_gpu_instance", one, code=Code.UNKNOWN)
    with refused(Code.UNKNOWN):
        node.create_gpu_instance(one, ONE_G, AT_0)
    assert node.look(one).partitions == ()
    node.create_gpu_instance(one, ONE_G, AT_0)


def test_a_call_can_take_effect_and_fail_all_the_same(node: SimNvml) -> None:
    one, _ = gpus(node)
    node.cue("fail", "create_gpu_instance", code=Code.UNKNOWN, done=True)
    with refused(Code.UNKNOWN):
        node.create_gpu_instance(one, ONE_G, AT_0)
    assert len(node.look(one).partitions) == 1


def test_a_cue_lets_calls_through_first_and_then_hits_as_many_as_it_says(node: SimNvml) -> None:
    one, two = gpus(node)
    node.cue("fail", "look", one, code=Code.UNKNOWN, skip=1, times=2)
    said = []
    for _ in range(4):
        node.look(two)
        try:
            node.look(one)
            said.append("ok")
        except DeviceError:
            said.append("failed")
    assert said == ["ok", "failed", "failed", "ok"]
    assert node.cues() == {}


def test_a_cue_without_an_end_lasts_until_it_is_withdrawn(node: SimNvml) -> None:
    one, _ = gpus(node)
    cue = node.cue("fail", "memory", one, code=Code.NO_PERMISSION, times=None)
    for _ in range(3):
        with refused(Code.NO_PERMISSION):
            node.memory(one)
    node.withdraw(cue)
    node.memory(one)


def test_a_card_can_be_lost_in_the_middle_of_a_call(node: SimNvml) -> None:
    one, _ = gpus(node)
    gi = node.create_gpu_instance(one, ONE_G, AT_0)
    node.cue("lose", "create_compute_instance", one)
    for _ in range(2):
        with refused(Code.GPU_IS_LOST):
            node.create_compute_instance(one, gi)
    assert one not in {gpu.uuid for gpu in node.gpus()}


def test_one_card_that_cannot_be_listed_takes_no_other_with_it(node: SimNvml) -> None:
    one, two = gpus(node)
    node.cue("fail", "gpus", one, code=Code.UNKNOWN)
    assert [gpu.uuid for gpu in node.gpus()] == [two]
    assert len(node.lost()) == 1


@pytest.mark.parametrize("call", sorted(CODES))
def test_every_call_can_be_cued_with_what_nvml_documents_for_it_and_with_nothing_else(node: SimNvml, call: str) -> None:
    for code in CODES[call]:
        node.withdraw(node.cue("fail", call, code=code))
    with pytest.raises(ConfigError, match="does not document"):
        node.cue("fail", call, code=Code.LIBRARY_NOT_FOUND)


def test_a_cue_for_a_call_that_does_not_exist_is_refused(node: SimNvml) -> None:
    with pytest.raises(ConfigError, match="is not a call"):
        node.cue("hang", "create_partition")


def test_a_hung_call_goes_on_when_its_cue_is_withdrawn(node: SimNvml, thread: ThreadPoolExecutor) -> None:
    one, _ = gpus(node)
    cue = node.cue("hang", "create_gpu_instance", one)
    hung = thread.submit(node.create_gpu_instance, one, ONE_G, AT_0)
    assert node.wait_hung(cue, 30)
    assert node.look(one).partitions == () and not hung.done()
    node.withdraw(cue)
    assert hung.result(30) == 7


def test_another_process_can_cue_and_withdraw_a_hang(tmp_path: Path, node: SimNvml, thread: ThreadPoolExecutor) -> None:
    one, _ = gpus(node)
    outside = SimNvml(tmp_path)
    cue = outside.cue("hang", "look", one)
    hung = thread.submit(node.look, one)
    assert outside.wait_hung(cue, 30)
    outside.reboot()  # ends hangs, too
    assert not hung.result(30).mig
    outside.close()


def test_closing_ends_a_hang_of_this_process(node: SimNvml, thread: ThreadPoolExecutor) -> None:
    one, _ = gpus(node)
    cue = node.cue("hang", "look", one, times=None)
    hung = thread.submit(node.look, one)
    assert node.wait_hung(cue, 30)
    node.close()
    with refused(Code.UNINITIALIZED):
        hung.result(30)
    with refused(Code.UNINITIALIZED):
        node.look(one)


def test_closing_ends_a_wait_for_events(node: SimNvml, thread: ThreadPoolExecutor) -> None:
    assert node.wait_event(0) is None
    waiting = thread.submit(node.wait_event, 3600.0)
    node.close()
    try:
        assert waiting.result(30) is None
    except DeviceError as e:  # the wait began after the close
        assert e.code == Code.UNINITIALIZED


def test_a_hung_card_lets_others_work_and_itself_be_read(node: SimNvml, thread: ThreadPoolExecutor) -> None:
    one, two = gpus(node)
    cue = node.cue("hang", "destroy_gpu_instance", one)
    gi = node.create_gpu_instance(one, ONE_G, AT_0)
    hung = thread.submit(node.destroy_gpu_instance, one, gi)
    assert node.wait_hung(cue, 30)
    node.create_gpu_instance(two, ONE_G, AT_0)
    assert len(node.look(one).partitions) == 1
    node.withdraw(cue)
    hung.result(30)


def test_changes_of_two_cards_run_at_the_same_time(node: SimNvml, thread: ThreadPoolExecutor) -> None:
    cues = {gpu: node.cue("hang", "create_gpu_instance", gpu) for gpu in gpus(node)}
    calls: list[Future[int]] = [thread.submit(node.create_gpu_instance, gpu, ONE_G, AT_0) for gpu in cues]
    assert all(node.wait_hung(cue, 30) for cue in cues.values())  # both are inside at once
    node.withdraw()
    assert [call.result(30) for call in calls] == [7, 7]


def test_changes_of_one_card_take_turns(tmp_path: Path, node: SimNvml, thread: ThreadPoolExecutor) -> None:
    one, _ = gpus(node)
    cue = node.cue("hang", "create_gpu_instance", one)
    hung = thread.submit(node.create_gpu_instance, one, ONE_G, AT_0)
    assert node.wait_hung(cue, 30)
    assert try_lock(tmp_path / "gpu0.turn") is None
    node.withdraw(cue)
    hung.result(30)


def test_where_nvml_serialises_everything_one_hung_read_holds_up_the_node(
    tmp_path: Path, thread: ThreadPoolExecutor
) -> None:
    node = SimNvml(tmp_path, "h100x2", latency="serial")
    one, two = gpus(node)
    cue = node.cue("hang", "look", one)
    hung = thread.submit(node.look, one)
    assert node.wait_hung(cue, 30)
    assert try_lock(tmp_path / "node.turn") is None
    waiting = thread.submit(node.look, two)
    node.withdraw(cue)
    assert hung.result(30) == waiting.result(30)
    node.close()


def test_every_call_but_the_wait_for_events_takes_simulated_time() -> None:
    assert set(SECONDS) == set(CODES) - {"start", "wait_event"}


def test_realistic_time_is_spent_by_default_and_ends_when_the_node_is_closed(
    tmp_path: Path, thread: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SECONDS, "look", 3600.0)
    node = SimNvml(tmp_path, "h100")
    slow = thread.submit(node.look, node.cards[0].uuid)
    node.close()
    with refused(Code.UNINITIALIZED):
        slow.result(30)
