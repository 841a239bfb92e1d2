"""The scheduler hands a device on as soon as a pod's object is gone, though its containers and its claim's devices are not."""

from __future__ import annotations

import pytest

from tests.kit.cluster.bodies import STUBBORN
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.trouble import until_logged, wait_cleared, warnings

_FORCED = ("--force", "--grace-period=0", "--wait=false")


def _occupied(cluster: Cluster, example: str) -> str:
    """Have every device of this kind held by pods; the name of one whose container does not end at SIGTERM."""
    cluster.apply(example, name="gone", command=STUBBORN)
    cluster.runs("gone")
    cluster.apply("whole-gpu", name="other")
    cluster.runs("other")
    return "gone"


@pytest.mark.parametrize("example", ["whole-gpu", "mig-profile", "mps-share", "time-slice-share"])
def test_the_successor_of_a_force_deleted_pod_waits_and_is_never_refused(cluster: Cluster, example: str) -> None:
    """A refusal would be a warning in its events, and the kubelet's next try seconds away."""
    gone = _occupied(cluster, example)

    with until_logged(cluster, "waiting for holders"):
        cluster.kubectl("delete", "pod", gone, *_FORCED)
        cluster.apply("whole-gpu", name="successor")

    cluster.runs("successor")
    assert warnings(cluster, "successor") == []


def test_a_successor_that_is_deleted_while_it_waits_leaves_nothing(cluster: Cluster) -> None:
    gone = _occupied(cluster, "whole-gpu")
    with until_logged(cluster, "waiting for holders"):
        cluster.kubectl("delete", "pod", gone, *_FORCED)
        cluster.apply("whole-gpu", name="successor")

    assert warnings(cluster, "successor") == []
    cluster.delete("successor")
    cluster.delete("other")

    wait_cleared(cluster)


def test_a_force_deleted_pod_alone_leaves_nothing(cluster: Cluster) -> None:
    gone = _occupied(cluster, "mig-profile")

    with until_logged(cluster, "unprepare done claim=default/gone"):
        cluster.kubectl("delete", "pod", gone, *_FORCED)
    cluster.delete("other")

    wait_cleared(cluster)
