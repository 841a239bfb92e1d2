"""Waits at the start. For the API server: logged once, longer and longer, and ended if waiting changes nothing. For the
kubelet: not long.
"""

from __future__ import annotations

import concurrent.futures
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest
from gpuslice.errors import LastingApiError
from gpuslice.publishing.controller import SliceController
from gpuslice.standin import tls
from gpuslice.standin.apiserver import TOKEN, StandInApiServer

from tests.kit.publishing import FAST, a_controller, a_line, an_api_server, asked
from tests.kit.rig import Rig, a_claim

SOON = replace(FAST, hopeless_s=0.1)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path / "api") as server:
        yield server


def waiting(server: StandInApiServer, rig: Rig) -> AbstractContextManager[SliceController]:
    return a_controller(server, rig, rig.folder, backoff=SOON)


def refuse_the_token(server: StandInApiServer, folder: Path) -> None:
    text = server.kubeconfig.read_text(encoding="utf-8")
    server.kubeconfig.write_text(re.sub(f"token: {TOKEN}", "token: revoked", text), encoding="utf-8")


def distrust_the_certificate(server: StandInApiServer, folder: Path) -> None:
    folder.mkdir()
    other = tls.make(folder).certificate
    text = server.kubeconfig.read_text(encoding="utf-8")
    server.kubeconfig.write_text(re.sub("certificate-authority: .*", f"certificate-authority: {other}", text))


def turn_old(server: StandInApiServer, folder: Path) -> None:
    server.version = "1.33"


LASTING = [
    pytest.param(refuse_the_token, "check the token", id="token"),
    pytest.param(distrust_the_certificate, "name the certificate authority of this cluster", id="certificate"),
    pytest.param(turn_old, "Kubernetes 1.34 or later is needed", id="version"),
]


@pytest.mark.parametrize(("spoil", "says"), LASTING)
def test_a_refusal_that_waiting_does_not_change_ends_the_wait(
    server: StandInApiServer, short: Path, spoil: Callable[[StandInApiServer, Path], None], says: str
) -> None:
    spoil(server, short / "other")

    with (
        waiting(server, Rig(short / "rig", "l4")) as controller,
        pytest.raises(LastingApiError, match=says) as error,
    ):
        controller.refused.result(10)

    assert "no claim is prepared on this node" in str(error.value)


@pytest.mark.parametrize(("spoil", "says"), LASTING)
def test_a_node_with_a_prepared_claim_goes_on_serving_it_whatever_the_api_server_says(
    server: StandInApiServer, short: Path, spoil: Callable[[StandInApiServer, Path], None], says: str
) -> None:
    spoil(server, short / "other")
    rig = Rig(short / "rig", "l4")
    claim = a_claim("one", rig.device("gpu"))
    rig.prepare(claim)

    with a_line("cannot find out what the API server supports") as told, waiting(server, rig) as controller:
        assert told.wait(10)
        with pytest.raises(concurrent.futures.TimeoutError):
            controller.refused.result(5 * SOON.hopeless_s)
        assert says in (controller.problem() or "")
        rig.unprepare(claim)

        with pytest.raises(LastingApiError, match=says):
            controller.refused.result(10)


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_what_the_api_server_or_its_administrator_mends_is_waited_for_and_told_once(
    server: StandInApiServer, short: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    server.fail(status, times=100, path="dryRun")
    caplog.set_level(logging.INFO)
    with waiting(server, Rig(short / "rig", "l4")) as controller:
        server.wait(lambda: asked(server, "dryRun") > 10)
        assert not controller.refused.done()
        server.release()
        server.wait(lambda: bool(server.all("resourceslices")))

    told = [r.getMessage() for r in caplog.records if "cannot find out what the API server supports" in r.getMessage()]
    assert told
    assert len(told) == len(set(told))


def test_an_answer_that_no_api_server_gives_does_not_end_the_thread(server: StandInApiServer, short: Path) -> None:
    """A web server in the wrong place answers 200 to everything: publishing was over for ever, without a word."""
    server.fail(200, times=3, path="dryRun")
    with waiting(server, Rig(short / "rig", "l4")):
        server.wait(lambda: bool(server.all("resourceslices")))


def test_news_of_the_node_does_not_make_the_waiting_shorter(server: StandInApiServer, short: Path) -> None:
    server.fail(500, times=1000, path="dryRun")
    late = replace(FAST, retry_s=1e6, retry_most_s=1e6)  # the next probe never comes in a test
    rig = Rig(short / "rig", "l4")
    with (
        a_line("cannot find out what the API server supports") as told,
        a_controller(server, rig, rig.folder, backoff=late) as controller,
    ):
        assert told.wait(10)
        before = asked(server, "dryRun")
        for _ in range(1000):
            controller.nudge()

        with pytest.raises(TimeoutError):
            server.wait(lambda: asked(server, "dryRun") > before, 0.3)


def test_the_first_slices_wait_for_the_kubelet_because_pods_may_wait_for_them(
    server: StandInApiServer, short: Path
) -> None:
    with (
        a_line("found out which fields") as told,
        a_controller(server, Rig(short / "rig", "l4"), short, kubelet_s=60.0) as controller,
    ):
        assert told.wait(10)
        with pytest.raises(TimeoutError):
            server.wait(lambda: server.all("resourceslices"), 0.5)

        controller.catch_up()

        server.wait(lambda: server.all("resourceslices"))


def test_a_kubelet_that_does_not_register_delays_the_first_slices_only_a_little(
    server: StandInApiServer, short: Path
) -> None:
    with a_controller(server, Rig(short / "rig", "l4"), short, kubelet_s=0.2):
        server.wait(lambda: server.all("resourceslices"))


def test_an_end_waits_for_no_kubelet(server: StandInApiServer, short: Path) -> None:
    with (
        a_line("found out which fields") as told,
        a_controller(server, Rig(short / "rig", "l4"), short, kubelet_s=60.0) as controller,
    ):
        assert told.wait(10)
        thread = next(thread for thread in threading.enumerate() if thread.name == "controller")

        controller.stop()

        thread.join(10)
        assert not thread.is_alive()
    assert server.all("resourceslices") == []
