"""Where the API server drops what keeps overlapping devices apart, what overlaps is never published, not for a moment.

So it is on Kubernetes 1.35: there the slices of a newer release were accepted, and the scheduler gave a whole card to one
claim and a partition of it to the next (measured on 1.35.4). A watch that begins before the driver does sees every state.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.kit.cluster.bodies import Body, exactly, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.trouble import Instances, hack_cluster, versions, wait_logged

SINCE, UNTIL = (1, 34), (1, 35)
_CARDS = 2
_SLICES = "/apis/resource.k8s.io/v1/resourceslices"
_SMALL = exactly("mig", where=profile("1g.10gb"))
_LARGE = exactly("mig", where=profile("3g.40gb"))

Publish = Callable[[Body], list[set[str]]]


@pytest.fixture
def publish(cluster: Cluster, tmp_path: Path) -> Iterator[Publish]:
    """Start a driver with this policy where nothing is published; the devices of the pools in every state there was."""
    instances = Instances(cluster)
    watches: list[subprocess.Popen[bytes]] = []

    def start(policy: Body) -> list[set[str]]:
        file, seen = tmp_path / "policy.yaml", tmp_path / "seen"
        header = {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy"}
        file.write_text(yaml.safe_dump({**header, "default": policy}))
        since = json.loads(cluster.kubectl("get", "--raw", _SLICES))["metadata"]["resourceVersion"]
        with seen.open("wb") as written:
            command = cluster.command("get", "--raw", f"{_SLICES}?watch=1&resourceVersion={since}")
            watches.append(subprocess.Popen(command, stdout=written))
        log = instances.start("--policy", str(file))
        wait_logged(log, "registered with the kubelet")
        wait_logged(log, "published")
        newest = max(int(body["metadata"]["resourceVersion"]) for body in cluster.get("resourceslices"))
        wait_logged(seen, f'"resourceVersion":"{newest}"')
        return list(_states(seen))

    with contextlib.ExitStack() as stack:
        stack.callback(hack_cluster, "start", "driver")
        stack.callback(instances.end)
        hack_cluster("stop", "driver", "--gently")
        cluster.kubectl("delete", "resourceslices", "--all")
        yield start
        for watch in watches:
            watch.terminate()
            watch.wait()


def _states(file: Path) -> Iterator[set[str]]:
    """The names of a pool's devices after each change of it; the monitor left out, which takes nothing of the card."""
    slices: dict[str, Body] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        spec = event["object"]["spec"]
        slices[event["object"]["metadata"]["name"]] = spec if event["type"] != "DELETED" else {**spec, "devices": []}
        pool = [body for body in slices.values() if body["pool"]["name"] == spec["pool"]["name"]]
        yield {device["name"] for body in pool for device in body.get("devices") or ()} - {"monitor"}


@pytest.mark.parametrize(
    ("policy", "offered", "fits", "waits"),
    [
        ({}, {"gpu"}, [exactly("gpu")], [_SMALL, exactly("mps"), exactly("timeslice")]),
        ({"static": {"timeslice": 3}}, {f"timeslice-{n}" for n in range(3)}, [exactly("timeslice")] * 3, [exactly("gpu")]),
        ({"static": {"mps": 3}}, {f"mps-{n}" for n in range(3)}, [exactly("mps")] * 3, [exactly("gpu"), _SMALL]),
        ({"static": {"1g.10gb": 2, "3g.40gb": 1}}, set(), [_SMALL, _SMALL, _LARGE], [exactly("gpu"), exactly("mps")]),
    ],
    ids=["nothing said", "shares by time", "MPS shares", "MIG layout"],
)  # fmt: skip
def test_a_card_is_offered_in_one_way_and_given_out_once(
    cluster: Cluster, publish: Publish, policy: Body, offered: set[str], fits: list[Body], waits: list[Body]
) -> None:
    states = publish(policy)

    final = offered or states[-1]
    assert states
    assert all(state <= final for state in states)
    assert len(final) == len(fits)
    running = [_asked_for(cluster, f"has-{n}", request) for n, request in enumerate(fits * _CARDS)]
    cluster.runs(*running)
    waiting = [_asked_for(cluster, f"waits-{n}", request) for n, request in enumerate([*waits, fits[0]])]
    for name in waiting:
        assert "cannot allocate all claims" in cluster.has_to_wait(name)
    assert len(cluster.records()) == len(running)
    cluster.delete(*running, *waiting)
    cluster.nothing_stays()


def _asked_for(cluster: Cluster, name: str, request: Body) -> str:
    cluster.create(template(name, request), pod(name, made_from(name)))
    return name


def test_a_pod_finds_the_whole_card_in_its_container(cluster: Cluster) -> None:
    cluster.runs(cluster.apply("whole-gpu"))

    assert cluster.environment("whole-gpu")["GPUSLICE_GPU_DEVICE"].endswith("/gpu")


def test_an_update_leaves_the_slices_as_they_are(cluster: Cluster) -> None:
    before = versions(cluster)

    hack_cluster("stop", "driver", "--gently")
    hack_cluster("start", "driver")

    cluster.runs(cluster.apply("whole-gpu"))
    assert versions(cluster) == before
