"""What the API server can do is found out before anything is written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.core.pools.pool import Features
from gpuslice.errors import ApiError
from gpuslice.kube import Kube
from gpuslice.publishing.api_features import probe
from gpuslice.standin import resource_slices
from gpuslice.standin.apiserver import StandInApiServer

from tests.kit.publishing import DRIVER, NODE, an_api_server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with an_api_server(tmp_path) as server:
        yield server


@pytest.mark.contract(56)
@pytest.mark.parametrize(
    ("version", "dropping", "expected"),
    [
        ("1.37", [], (True, True, True)),
        ("1.36", [], (True, True, True)),
        ("1.35", [], (False, False, False)),
        ("1.34", [], (False, False, False)),
        ("1.37", [resource_slices.PARTITIONABLE], (False, True, True)),
        ("1.37", [resource_slices.CONSUMABLE], (True, False, True)),
        ("1.37", [resource_slices.TAINTS], (True, True, False)),
    ],
)
def test_features_are_found_out_without_storing_anything(
    tmp_path: Path, version: str, dropping: list[str], expected: tuple[bool, bool, bool]
) -> None:
    with StandInApiServer(tmp_path, version, dropping=dropping) as server:
        found = probe(Kube(server.kubeconfig), DRIVER, NODE)

        assert (found.partitionable, found.consumable, found.taints) == expected
        assert not server.writes


def test_a_feature_whose_field_is_refused_is_off(server: StandInApiServer) -> None:
    server.fail(422, path="dryRun", text="spec.sharedCounters: Forbidden: feature gate is off")

    assert probe(Kube(server.kubeconfig), DRIVER, NODE) == Features(partitionable=False, consumable=True, taints=True)


def test_a_refusal_that_says_nothing_about_fields_is_an_error_and_not_a_missing_feature(
    server: StandInApiServer,
) -> None:
    server.fail(422, path="dryRun", text="denied by policy: this node may not write slices of another")

    with pytest.raises(ApiError, match="denied by policy"):
        probe(Kube(server.kubeconfig), DRIVER, NODE)
