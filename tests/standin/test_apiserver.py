"""The stand-in API server behaves like the real one in everything that a driver can notice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gpuslice.errors import ApiError, ConflictError, ExpiredError, NotFoundError
from gpuslice.kube import Kube
from gpuslice.standin import resource_slices
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.standin.store import RefusalError

Body = dict[str, Any]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StandInApiServer]:
    with StandInApiServer(tmp_path) as server:
        yield server


@pytest.fixture
def kube(server: StandInApiServer) -> Iterator[Kube]:
    kube = Kube(server.kubeconfig)
    yield kube
    kube.close()


def a_slice(*devices: Body, **spec: object) -> Body:
    pool = {"name": "n1/a", "generation": 1, "resourceSliceCount": 1}
    fields = {"driver": "gpuslice.dev", "nodeName": "n1", "pool": pool, "devices": list(devices), **spec}
    return {"metadata": {"generateName": "00000-gpuslice.dev-n1-"}, "spec": fields}


def test_a_generated_name_is_cut_at_58_characters_and_made_unique(kube: Kube) -> None:
    body = a_slice() | {"metadata": {"generateName": "00000-" + "x" * 80}}

    names = {kube.create_resource_slice(body)["metadata"]["name"] for _ in range(3)}

    assert len(names) == 3
    assert {(len(name), name[:58]) for name in names} == {(63, "00000-" + "x" * 52)}


def test_a_stale_update_and_a_change_of_an_immutable_field_are_refused(kube: Kube) -> None:
    first = kube.create_resource_slice(a_slice())
    second = kube.update_resource_slice(first | {"spec": first["spec"] | {"devices": [{"name": "gpu"}]}})

    with pytest.raises(ConflictError, match="has been modified"):
        kube.update_resource_slice(first)
    with pytest.raises(ApiError, match=r"nodeName: Invalid value.*immutable") as refused:
        kube.update_resource_slice(second | {"spec": second["spec"] | {"nodeName": "n2"}})
    assert refused.value.status == 422


def test_a_delete_holds_to_its_preconditions(kube: Kube) -> None:
    meta = kube.create_resource_slice(a_slice())["metadata"]

    with pytest.raises(ConflictError):
        kube.delete_resource_slice(meta["name"], uid=meta["uid"], resource_version="1")
    kube.delete_resource_slice(meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"])
    with pytest.raises(NotFoundError):
        kube.delete_resource_slice(meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"])


def test_a_dry_run_answers_and_stores_nothing(server: StandInApiServer, kube: Kube) -> None:
    assert kube.create_resource_slice(a_slice(), dry_run=True)["metadata"]["uid"]

    assert server.all("resourceslices") == []
    assert not server.writes


def test_a_list_is_filtered_by_driver_and_node(kube: Kube) -> None:
    for spec in ({}, {"nodeName": "n2"}, {"driver": "other.dev"}):
        kube.create_resource_slice(a_slice(**spec))

    bodies, _ = kube.resource_slices("gpuslice.dev", "n1")

    assert [(body["spec"]["driver"], body["spec"]["nodeName"]) for body in bodies] == [("gpuslice.dev", "n1")]


def test_a_watch_tells_what_happened_since_a_version_and_ends_with_a_bookmark(kube: Kube) -> None:
    _, version = kube.resource_slices("gpuslice.dev", "n1")
    body = kube.create_resource_slice(a_slice())
    kube.create_resource_slice(a_slice(nodeName="n2"))
    body = kube.update_resource_slice(body | {"spec": body["spec"] | {"devices": [{"name": "gpu"}]}})
    meta = body["metadata"]
    kube.delete_resource_slice(meta["name"], uid=meta["uid"], resource_version=meta["resourceVersion"])

    events = list(kube.watch_resource_slices("gpuslice.dev", "n1", version, timeout_s=1))

    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in events]
    assert versions == sorted(versions)


def test_a_watch_from_a_forgotten_version_is_expired(server: StandInApiServer, kube: Kube) -> None:
    kube.create_resource_slice(a_slice())
    server.store.compact()

    with pytest.raises(ExpiredError):
        list(kube.watch_resource_slices("gpuslice.dev", "n1", "1000", timeout_s=1))


@pytest.mark.parametrize("version", ["1.34", "1.35"])
def test_older_servers_drop_counters_shares_and_taints(tmp_path: Path, version: str) -> None:
    policy = {"default": "1Gi"}
    device = {
        "name": "gpu",
        "allowMultipleAllocations": True,
        "capacity": {"memory": {"value": "80Gi", "requestPolicy": policy}},
        "consumesCounters": [{"counterSet": "card", "counters": {"m": {"value": "1"}}}],
        "taints": [{"key": "gpuslice.dev/xid", "effect": "NoSchedule"}],
    }
    with StandInApiServer(tmp_path, version) as server:
        spec = server.create("resourceslices", a_slice(device))["spec"]

    assert spec["devices"] == [{"name": "gpu", "capacity": {"memory": {"value": "80Gi"}}}]


def test_newer_servers_keep_them_and_date_taints(server: StandInApiServer) -> None:
    taint = {"key": "gpuslice.dev/xid", "effect": "NoSchedule"}

    spec = server.create("resourceslices", a_slice({"name": "gpu", "taints": [taint]}))["spec"]

    (kept,) = spec["devices"][0]["taints"]
    assert kept == taint | {"timeAdded": kept["timeAdded"]}


def test_a_server_before_134_does_not_have_the_group(tmp_path: Path) -> None:
    with StandInApiServer(tmp_path, "1.33") as server, pytest.raises(ApiError, match=r"1\.34 or later"):
        list(Kube(server.kubeconfig).claims())


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("2048Mi", "2Gi"),
        ("9856Mi", "9856Mi"),
        ("1000", "1k"),
        ("1024", "1024"),
        ("0.5", "500m"),
        ("0Mi", "0"),
        ("7", "7"),
    ],
)
def test_quantities_come_back_in_canonical_form(text: str, canonical: str) -> None:
    assert resource_slices.canonical(text) == canonical


@pytest.mark.parametrize(
    "spec",
    [
        {"devices": [{"name": f"d{i}", "taints": [{"key": "k", "effect": "None"}]} for i in range(65)]},
        {"devices": [{"name": "gpu"}], "sharedCounters": [{"name": "c", "counters": {"m": {"value": "1"}}}]},
        {"sharedCounters": [{"name": "c", "counters": {f"m{i}": {"value": "1"} for i in range(33)}}]},
        {"devices": [{"name": "gpu"}, {"name": "gpu"}]},
        {"devices": [{"name": "gpu", "capacity": {"m": {"value": "1", "requestPolicy": {"default": "1"}}}}]},
        {"nodeName": None},
    ],
)
def test_slices_that_break_a_rule_are_refused(server: StandInApiServer, spec: Body) -> None:
    with pytest.raises(RefusalError) as refused:
        server.create("resourceslices", a_slice(**spec))

    assert refused.value.status == 422


def test_an_object_with_finalizers_is_only_marked_until_they_are_gone(server: StandInApiServer) -> None:
    server.create("resourceclaims", {"metadata": {"name": "c", "finalizers": ["x/protect"]}}, "ns")

    server.delete("resourceclaims", "c", "ns")
    marked = server.get("resourceclaims", "c", "ns")
    server.update("resourceclaims", marked | {"metadata": marked["metadata"] | {"finalizers": []}})

    assert "deletionTimestamp" in marked["metadata"]
    assert server.all("resourceclaims") == []


def test_state_outlives_an_absence_on_the_same_port(server: StandInApiServer, kube: Kube) -> None:
    server.add_node("n1")
    port = server.port

    server.away()
    with pytest.raises(ApiError):
        kube.node_uid("n1")
    server.back()

    assert server.port == port
    assert kube.node_uid("n1") == server.get("nodes", "n1")["metadata"]["uid"]


def test_it_runs_as_a_process_until_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gpuslice.standin.apiserver", "--folder", str(tmp_path), "--node", "n1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        kube = Kube(tmp_path / "kubeconfig")

        assert address == f"https://127.0.0.1:{(tmp_path / 'port').read_text()}"
        assert kube.node_uid("n1")
        kube.close()
        os.kill(process.pid, signal.SIGTERM)

        assert process.wait(10) == 0
