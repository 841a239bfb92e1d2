"""What only a real API server and kubelet can show of the driver as a process of a node."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.kit.cluster.live import Cluster
from tests.kit.cluster.wanted import HACK_CLUSTER

SINCE = (1, 34)
_SLICE = """\
apiVersion: resource.k8s.io/v1
kind: ResourceSlice
metadata: {name: stolen}
spec:
  driver: gpuslice.dev
  nodeName: another-node
  pool: {name: p, generation: 1, resourceSliceCount: 1}
  devices: []
"""


def test_the_driver_publishes_in_its_own_name_and_every_card_has_a_pool(cluster: Cluster) -> None:
    slices = cluster.get("resourceslices")

    assert len({body["spec"]["pool"]["name"] for body in slices}) == 2
    assert {body["metadata"]["managedFields"][0]["manager"].partition("/")[0] for body in slices} == {"gpuslice"}


def test_the_token_of_a_node_publishes_nothing_for_another_node(cluster: Cluster) -> None:
    with pytest.raises(AssertionError, match="may only write ResourceSlices of that node"):
        cluster.kubectl("--kubeconfig", str(cluster.folder / "driver.conf"), "create", "-f", "-", given=_SLICE)


@pytest.mark.parametrize("what", ["pods", "secrets", "nodes"])
def test_the_driver_may_not_list_what_it_does_not_need(cluster: Cluster, what: str) -> None:
    with pytest.raises(AssertionError, match="Forbidden"):
        cluster.kubectl("--kubeconfig", str(cluster.folder / "driver.conf"), "get", what)


def test_a_killed_driver_comes_back_and_keeps_its_claims(cluster: Cluster) -> None:
    held = cluster.apply("whole-gpu")
    cluster.runs(held)
    before = cluster.records()

    os.kill(cluster.process("driver"), signal.SIGKILL)
    after = cluster.apply("whole-gpu", name="after")
    cluster.runs(after)

    assert set(before) < set(cluster.records())
    cluster.delete(held, after)
    assert cluster.records() == []


def test_a_second_cluster_is_refused(cluster: Cluster) -> None:
    second = subprocess.run([*HACK_CLUSTER, "up"], capture_output=True, text=True, check=False)

    assert (second.returncode, second.stderr.count("\n")) == (1, 1)
    assert "a cluster is there already" in second.stderr
