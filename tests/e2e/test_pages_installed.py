"""The commands of the pages about a driver in pods: they run as they are, on the driver that our chart installed."""

from __future__ import annotations

import pytest

from tests.kit import pages
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.operators import DRIVER, own_pods, rolled_out, typed
from tests.kit.markdown import ROOT

INSTALLED, SINCE = True, (1, 37)


def test_the_commands_about_an_installed_driver_run_as_they_are(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)  # the pages name files of the repository

    for command in pages.run_by(pages.INSTALLED):
        (pod,) = (body["metadata"]["name"] for body in own_pods(cluster, DRIVER))
        typed(cluster, command, {"POD": pod, "NODE": "node1"})
        rolled_out(cluster)
