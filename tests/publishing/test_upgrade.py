"""The API server changes its version under a running driver. The offer follows, up and down, without a fight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.core.inventory import Inventory
from gpuslice.core.pools.backoff import BackoffConfig
from gpuslice.core.pools.pool import Features
from gpuslice.errors import ApiError
from gpuslice.kube import Kube
from gpuslice.nvml.session import Session
from gpuslice.publishing.api_features import ApiFeatures
from gpuslice.standin import resource_slices
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.publishing import DRIVER, FAST, NODE, a_controller, an_api_server, asked, wipe
from tests.kit.rig import Rig, a_claim

FULL = Features(partitionable=True, consumable=True, taints=True)
NONE = Features(partitionable=False, consumable=False, taints=False)
PLAIN = {"gpu", "monitor"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path / "api") as server:
        yield server


def devices(server: StandInApiServer) -> set[str]:
    return {d["name"] for body in server.all("resourceslices") for d in body["spec"].get("devices", ())}


def partitions(server: StandInApiServer) -> bool:
    return any(name.startswith("mig-") for name in devices(server))


@pytest.mark.parametrize("newer", ["1.36", "1.37"])
def test_an_upgraded_cluster_gets_the_partitions_without_a_restart(tmp_path: Path, short: Path, newer: str) -> None:
    with (
        an_api_server(tmp_path / "old", "1.35") as server,
        a_controller(server, Rig(short / "rig", "h100"), short, backoff=FAST),
    ):
        server.wait(lambda: devices(server) == PLAIN)

        server.become(newer)

        server.wait(lambda: partitions(server))


def test_a_gate_that_is_turned_on_or_off_under_one_version_is_noticed(server: StandInApiServer, short: Path) -> None:
    server.become("1.37", dropping=[resource_slices.PARTITIONABLE])
    with a_controller(server, Rig(short / "rig", "h100"), short, backoff=FAST):
        server.wait(lambda: "gpu" in devices(server))
        assert not partitions(server)

        server.become("1.37")
        server.wait(lambda: partitions(server))


def test_a_downgraded_cluster_gets_the_static_plan(server: StandInApiServer, short: Path) -> None:
    with a_controller(server, Rig(short / "rig", "h100"), short, backoff=FAST):
        server.wait(lambda: partitions(server))

        server.become("1.35")

        server.wait(lambda: devices(server) == PLAIN)


def test_no_device_of_a_claim_goes_while_the_cluster_is_upgraded_or_downgraded(
    server: StandInApiServer, short: Path
) -> None:
    rig = Rig(short / "rig", "h100")
    rig.inventory = Inventory.of(rig.gpus, rig.policy, NODE)
    rig.build(Session(lambda: rig.nvml))
    claim = a_claim("one", rig.device("mig-1g-19-0"))
    with a_controller(server, rig, short, backoff=FAST):
        server.wait(lambda: partitions(server))
        rig.prepare(claim)
        versions = asked(server, "/version")

        server.become("1.35")
        server.wait(lambda: asked(server, "/version") > versions + 4)
        assert "mig-1g-19-0" in devices(server)

        server.become("1.37")
        server.wait(lambda: asked(server, "/version") > versions + 8)
        assert "mig-1g-19-0" in devices(server)


def test_an_old_server_that_answers_for_a_while_after_a_wipe_costs_no_partition_for_good(
    server: StandInApiServer, short: Path
) -> None:
    with a_controller(server, Rig(short / "rig", "h100"), short, backoff=FAST) as controller:
        server.wait(lambda: partitions(server))

        server.become("1.35")
        wipe(server)
        server.wait(lambda: devices(server) == PLAIN)
        server.become("1.37")

        server.wait(lambda: partitions(server))
        server.wait(lambda: controller.problem() is None)


def test_what_only_the_writes_drop_is_sent_again_once_a_probe_shows_that_it_is_kept(
    server: StandInApiServer, short: Path
) -> None:
    """One of several servers is old. A new server answers the dry runs and the version."""
    with a_controller(server, Rig(short / "rig", "h100"), short, backoff=FAST):
        server.wait(lambda: partitions(server))
        server.gates = frozenset()
        wipe(server)
        server.wait(lambda: bool(server.all("resourceslices")) and not partitions(server))

        server.gates = resource_slices.gates("1.37")

        server.wait(lambda: partitions(server))


# ---------------------------------------------------------------- how often the driver looks, by a clock that we hold

CONFIG = BackoffConfig()


@pytest.fixture
def features(server: StandInApiServer) -> Iterator[ApiFeatures]:
    kube = Kube(server.kubeconfig)
    yield ApiFeatures(kube, DRIVER, NODE, CONFIG)
    kube.close()


def looks(
    features: ApiFeatures, until_s: int, *, dropped: bool = False, since_s: int = 0
) -> list[tuple[int, Features]]:
    """The times, in whole seconds, at which the driver took other features than before."""
    found = [(s, features.look(float(s), 0.5, dropped=dropped)) for s in range(since_s, until_s)]
    return [(s, news) for s, news in found if news is not None]


def test_a_look_is_one_get_while_the_version_stays(server: StandInApiServer, features: ApiFeatures) -> None:
    features.first(0.0, 0.5)
    dry, gets = asked(server, "dryRun"), asked(server, "/version")

    assert looks(features, 3601) == []

    assert asked(server, "dryRun") == dry
    assert asked(server, "/version") - gets == 3600 // 45


def test_another_version_is_probed_twice_and_then_believed(server: StandInApiServer, features: ApiFeatures) -> None:
    server.become("1.35")
    assert features.first(0.0, 0.5) == NONE
    server.become("1.37")

    assert looks(features, 70) == [(50, FULL)]


def test_one_odd_answer_out_of_two_changes_nothing(server: StandInApiServer, features: ApiFeatures) -> None:
    features.first(0.0, 0.5)
    server.become("1.35")
    assert looks(features, 46) == []
    server.become("1.37")

    assert looks(features, 300, since_s=46) == []


def test_a_fleet_spreads_its_looks(server: StandInApiServer, features: ApiFeatures) -> None:
    due = []
    for chance in (0.0, 0.5, 1.0):
        features.first(0.0, chance)
        due.append(features.due_s(0.0))

    assert due == [30.0, 45.0, 60.0]


def test_a_feature_that_stays_missing_is_asked_for_less_and_less(
    server: StandInApiServer, features: ApiFeatures
) -> None:
    server.become("1.35")
    features.first(0.0, 0.5)
    dry = asked(server, "dryRun")

    assert looks(features, 3600) == []

    probes = (asked(server, "dryRun") - dry) // 4
    assert 3600 // 600 <= probes <= 3600 // 600 + 6


def test_a_server_that_keeps_in_a_probe_and_drops_in_a_write_is_fought_less_and_less(features: ApiFeatures) -> None:
    """Each time that the driver takes features, it writes the whole offer once."""
    features.first(0.0, 0.5)

    taken = [s for s, _ in looks(features, 3600, dropped=True)]

    assert taken[0] < 70
    assert len(taken) <= 3600 // 300 + 4


def test_without_an_answer_the_next_look_comes_in_its_time(server: StandInApiServer, features: ApiFeatures) -> None:
    features.first(0.0, 0.5)
    server.fail(503, path="/version")

    with pytest.raises(ApiError):
        features.look(45.0, 0.5, dropped=False)

    assert features.due_s(45.0) == 45.0
