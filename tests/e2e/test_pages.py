"""What the pages for operators say: their commands run as they are, and a user sees the sentences that they quote."""

from __future__ import annotations

import pytest

from tests.kit import pages
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.operators import typed
from tests.kit.cluster.trouble import wait_cleared, wait_deleted, wait_logged, without
from tests.kit.markdown import ROOT

_FAILED = "FailedPrepareDynamicResources"


def test_the_commands_of_the_pages_run_as_they_are(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the pages name files of the repository
    pod = cluster.apply("time-slice-share")
    cluster.runs(pod)
    (claim,) = (body["metadata"]["name"] for body in cluster.get("resourceclaims"))

    for command in pages.run_by(pages.AS_THEY_ARE):
        typed(cluster, command, {"POD": pod, "CLAIM": claim})


def test_without_a_driver_a_new_pod_says_so_and_an_old_one_stays_in_terminating_until_it_is_back(
    cluster: Cluster,
) -> None:
    cluster.runs(cluster.apply("mig-profile", name="old"))
    begin = (cluster.folder / "log/kubelet.log").stat().st_size

    with without("driver"):
        cluster.apply("mig-profile", name="new")
        cluster.event("new", _FAILED, "connect: connection refused")
        # A driver that ends in order removes its sockets; this one was killed.
        (cluster.folder / "kubelet/plugins_registry/gpuslice.dev-reg.sock").unlink()
        cluster.event("new", _FAILED, "DRA driver gpuslice.dev is not registered")
        cluster.kubectl("delete", "pod", "old", "--grace-period=1", "--wait=false")
        wait_logged(cluster.folder / "log/kubelet.log", "unprepare dynamic resources", begin)
        assert "old" in cluster.allocated()

    wait_deleted(cluster, "old")
    cluster.runs("new")
    cluster.delete("new")
    wait_cleared(cluster)
