"""The removal on the cluster, against the stand-in API server: its order, its refusals, and what stays after each."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from gpuslice.api import Api
from gpuslice.core.removal import Helm
from gpuslice.errors import ApiError, RemovalError
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.standin.store import Key
from gpuslice.uninstall import cluster as door
from gpuslice.uninstall import steps
from gpuslice.uninstall.cluster import Cluster
from gpuslice.uninstall.steps import Uninstall

from tests.kit.workloads import NAMESPACE, Workloads

LABELS = {"app.kubernetes.io/name": "gpuslice-cleanup"}
MANIFEST: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "DaemonSet",
    "metadata": {"name": "gpuslice-cleanup"},
    "spec": {"template": {"metadata": {"labels": LABELS}, "spec": {"containers": [{"name": "cleanup"}]}}},
}


@pytest.fixture
def api(tmp_path: Path) -> Iterator[StandInApiServer]:
    with StandInApiServer(tmp_path / "api") as api:
        yield api


@pytest.fixture
def nodes(api: StandInApiServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Workloads]:
    for name in ("_OUTAGE_S", "_PAUSE_S", "_GLANCE_S"):
        monkeypatch.setattr(door, name, 0.1)
    monkeypatch.setattr(steps, "_AGAIN_S", 0.05)
    with Workloads(api, ("n1", "n2")) as nodes:
        nodes.install()
        yield nodes


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def removal(api: StandInApiServer, nodes: Workloads, said: list[str]) -> Uninstall:
    return Uninstall(
        cluster=Cluster(Api(api.kubeconfig), NAMESPACE, "gpuslice.dev"),
        cleanup=MANIFEST,
        until=monotonic() + 20,
        say=said.append,
        helm=Helm("gpuslice", "3"),
    )


def serves(nodes: Workloads) -> bool:
    """Whether the driver is as it was before the removal, and nothing of the removal is left."""
    nothing_of_the_removal(nodes)
    return nodes.names("daemonsets") == ["gpuslice", "gpuslice-mps-supervisor"]


def nothing_of_the_removal(nodes: Workloads) -> None:
    nodes.api.wait(lambda: not [name for name in nodes.names("pods") if name.startswith("gpuslice-cleanup")])
    assert "gpuslice-cleanup" not in nodes.names("daemonsets")
    assert nodes.names("devicetaintrules") == []


# ---------------------------------------------------------------- nobody has a claim


def test_without_claims_every_node_is_cleaned_after_the_driver_has_ended(nodes: Workloads, removal: Uninstall) -> None:
    at: list[tuple[str, list[str], list[str]]] = []

    def cleanup(node: str, arguments: list[str]) -> tuple[int, str]:
        at.append((node, arguments, [name for name in nodes.names("daemonsets") if name != "gpuslice-cleanup"]))
        assert nodes.names("devicetaintrules") == ["gpuslice-uninstall"]
        return 0, ""

    nodes.cleanup = cleanup
    nodes.api.create("resourceslices", a_slice(), "")

    removal.run()

    both = ["gpuslice", "gpuslice-mps-supervisor"]
    assert sorted(at[:2]) == [("n1", ["cleanup", "--check"], both), ("n2", ["cleanup", "--check"], both)]
    assert sorted(at[2:]) == [("n1", ["cleanup"], []), ("n2", ["cleanup"], [])]
    assert nodes.names("daemonsets") == nodes.names("pods") == nodes.names("resourceslices") == []
    nothing_of_the_removal(nodes)


def a_slice() -> dict[str, Any]:
    pool = {"name": "n1/1", "generation": 1, "resourceSliceCount": 1}
    return {
        "metadata": {"name": "s"},
        "spec": {"driver": "gpuslice.dev", "nodeName": "n1", "pool": pool, "devices": []},
    }


def test_a_second_removal_finds_nothing_and_succeeds(nodes: Workloads, removal: Uninstall) -> None:
    removal.run()
    removal.run()

    assert len(nodes.runs) == 8
    nothing_of_the_removal(nodes)


def test_a_removal_that_was_killed_is_taken_up(nodes: Workloads, removal: Uninstall) -> None:
    removal.cluster.create_rule()
    removal.cluster.create_daemonset(MANIFEST | {"spec": with_arguments("cleanup")})

    removal.run()

    nothing_of_the_removal(nodes)
    assert nodes.names("daemonsets") == []


def with_arguments(*arguments: str) -> dict[str, Any]:
    template = MANIFEST["spec"]["template"]
    return {"template": template | {"spec": {"containers": [{"name": "cleanup", "args": list(arguments)}]}}}


def test_what_a_killed_removal_leaves_goes_with_the_release(nodes: Workloads, removal: Uninstall) -> None:
    removal.cluster.create_rule()
    removal.cluster.create_daemonset(MANIFEST | {"spec": with_arguments("cleanup")})

    nodes.api.delete("clusterroles", "gpuslice-uninstall")
    nodes.api.delete("configmaps", "gpuslice-uninstall", NAMESPACE)

    nodes.api.wait(lambda: nodes.names("devicetaintrules") == [])
    nodes.api.wait(lambda: "gpuslice-cleanup" not in nodes.names("daemonsets"))


def test_a_job_that_was_refused_goes_with_the_release_too(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    nodes.run("p")
    api.fail(409, 2, method="PUT", path="jobs")  # the controller of Jobs was faster
    with pytest.raises(RemovalError):
        removal.run()
    assert nodes.names("jobs") == ["gpuslice-uninstall"]

    api.delete("configmaps", "gpuslice-uninstall", NAMESPACE)

    api.wait(lambda: nodes.names("jobs") == [])


def test_a_job_that_may_have_no_owner_removes_the_driver_all_the_same(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    """OpenShift lets only those change the owner of an object who may delete it."""
    api.fail(403, 1, method="PUT", path="jobs")

    removal.run()

    assert nodes.names("daemonsets") == []


def test_the_command_by_hand_needs_no_job(api: StandInApiServer, nodes: Workloads, removal: Uninstall) -> None:
    api.delete("jobs", "gpuslice-uninstall", NAMESPACE)

    removal.run()

    assert nodes.names("daemonsets") == []


@pytest.mark.parametrize("notes", [{}, {"meta.helm.sh/release-name": "other"}])
def test_a_job_that_came_with_helm_template_removes_nothing(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, notes: dict[str, str]
) -> None:
    """`helm template` prints hooks among the objects, so `helm template | kubectl apply` starts the Job at once."""
    noted(api, notes)

    with pytest.raises(RemovalError) as refused:
        removal.run()

    assert str(refused.value) == (
        "Helm did not install the release gpuslice, so this Job came with `helm template`, and nothing was removed; add "
        "--no-hooks to helm template, and run: kubectl delete job gpuslice-uninstall --namespace gpuslice-system; to remove "
        "the driver, see docs/uninstall.md, Without Helm"
    )
    assert serves(nodes)
    assert nodes.runs == []


def noted(api: StandInApiServer, notes: dict[str, str]) -> None:
    """The ConfigMap of the removal has these annotations."""
    config_map = api.get("configmaps", "gpuslice-uninstall", NAMESPACE)
    config_map["metadata"]["annotations"] = notes
    api.update("configmaps", config_map)


def test_argo_cd_runs_the_job_when_it_deletes_the_application(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    noted(api, {"argocd.argoproj.io/tracking-id": "gpus:/ConfigMap:gpuslice-system/gpuslice-uninstall"})

    removal.run()

    assert nodes.names("daemonsets") == []


def test_without_helm_the_applied_job_is_the_wish_to_remove(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    noted(api, {})

    replace(removal, helm=Helm()).run()

    assert nodes.names("daemonsets") == []


def test_a_removal_waits_for_the_end_of_one_that_was_interrupted(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    labels = {"app.kubernetes.io/name": "gpuslice-uninstall"}
    earlier = {"metadata": {"name": "earlier", "labels": labels}, "spec": {"nodeName": "n1"}}
    nodes.stuck.add("earlier")
    api.create("pods", earlier, NAMESPACE)
    api.create("pods", {**earlier, "metadata": {"name": "this", "labels": labels}}, NAMESPACE)
    api.store.mark(Key("pods", NAMESPACE, "earlier"), {"deletionTimestamp": "2026-01-01T00:00:00Z"})

    with pytest.raises(RemovalError, match="the pod of an earlier removal has not ended"):
        replace(removal, until=monotonic() + 1).run()
    assert api.writes["create devicetaintrules"] == 0

    api.delete("pods", "earlier", NAMESPACE)
    removal.run()
    assert nodes.names("pods") == ["this"]


def test_a_removal_does_not_wait_for_one_on_a_node_that_is_not_ready(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    body = {"metadata": {"name": "earlier", "labels": {"app.kubernetes.io/name": "gpuslice-uninstall"}}}
    nodes.report("n2", ready=False)
    api.create("pods", body | {"spec": {"nodeName": "n2"}}, NAMESPACE)
    api.store.mark(Key("pods", NAMESPACE, "earlier"), {"deletionTimestamp": "2026-01-01T00:00:00Z"})

    removal.run()

    assert nodes.names("daemonsets") == []


def test_the_rule_taints_all_devices_of_the_driver_and_no_pod(nodes: Workloads, removal: Uninstall) -> None:
    removal.cluster.create_rule()

    (rule,) = nodes.api.all("devicetaintrules")
    assert rule["spec"] == {
        "deviceSelector": {"driver": "gpuslice.dev"},
        "taint": {"key": "gpuslice.dev/uninstall", "effect": "NoSchedule"},
    }


def test_an_api_server_without_taint_rules_is_asked_for_none(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, said: list[str]
) -> None:
    api.become("1.36")

    removal.run()

    assert "this API server has no DeviceTaintRule" in said[0]
    assert api.writes["create devicetaintrules"] == 0
    assert nodes.names("daemonsets") == []


# ---------------------------------------------------------------- somebody has one


def test_with_a_claim_nothing_is_removed_and_the_remedies_are_named(nodes: Workloads, removal: Uninstall) -> None:
    for number in range(5):
        nodes.run(f"p{number}")

    with pytest.raises(RemovalError) as refused:
        removal.run()

    assert str(refused.value) == (
        "5 claims hold GPUs of this driver (pod default/p0, pod default/p1, pod default/p2 and 2 more), so nothing was "
        "removed; delete these pods, or have them evicted by: kubectl annotate daemonset/gpuslice --namespace "
        "gpuslice-system gpuslice.dev/uninstall=evict --overwrite; then uninstall again; to keep the release instead, run: "
        "helm rollback gpuslice 3 --namespace gpuslice-system"
    )
    assert serves(nodes)
    assert nodes.runs == []


def test_without_helm_no_command_of_helm_is_named(nodes: Workloads, removal: Uninstall) -> None:
    nodes.run("p")

    with pytest.raises(RemovalError) as refused:
        replace(removal, helm=Helm()).run()

    assert "1 claim holds GPUs of this driver (pod default/p)" in str(refused.value)
    assert "helm" not in str(refused.value)


def test_claims_of_other_drivers_do_not_count(nodes: Workloads, removal: Uninstall) -> None:
    nodes.run("p", driver="other.example")

    removal.run()

    assert nodes.names("pods") == ["p"]


@pytest.mark.parametrize("value", ["", "Evict", "true"])
def test_another_value_of_the_annotation_evicts_nobody(nodes: Workloads, removal: Uninstall, value: str) -> None:
    nodes.run("p")
    nodes.annotate(value)

    with pytest.raises(RemovalError, match="nothing was removed"):
        removal.run()
    assert nodes.names("pods").count("p") == 1


def test_by_force_the_driver_serves_until_the_pods_are_gone(nodes: Workloads, removal: Uninstall) -> None:
    nodes.run("p", "n1")
    nodes.run("q", "n2")
    nodes.force()
    at: list[list[str]] = []

    def cleanup(node: str, arguments: list[str]) -> tuple[int, str]:
        at.append([name for name in nodes.names("pods") if name in ("p", "q")])
        return 0, ""

    nodes.cleanup = cleanup

    removal.run()

    assert at == [[], [], [], []]
    assert nodes.names("pods") == nodes.names("daemonsets") == []
    nothing_of_the_removal(nodes)


def test_a_budget_is_respected_and_named_until_it_allows_the_eviction(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, said: list[str]
) -> None:
    api.create(
        "poddisruptionbudgets",
        {
            "metadata": {"name": "keep"},
            "spec": {"selector": {"matchLabels": {"app": "train"}}},
            "status": {"disruptionsAllowed": 0, "desiredHealthy": 2, "currentHealthy": 2},
        },
        "default",
    )
    nodes.run("p", labels={"app": "train"})
    nodes.force()

    def allowed(sentence: str) -> None:
        said.append(sentence)
        if "cannot be evicted yet" in sentence:
            budget = api.get("poddisruptionbudgets", "keep", "default")
            budget["status"]["disruptionsAllowed"] = 1
            api.update("poddisruptionbudgets", budget)

    replace(removal, say=allowed).run()

    words = "The disruption budget keep needs 2 healthy pods and has 2 currently"
    assert f"pod default/p cannot be evicted yet: {words}" in said
    assert said.index("evicted pod default/p") > said.index(f"pod default/p cannot be evicted yet: {words}")
    assert nodes.names("daemonsets") == []


def test_a_pod_that_never_ends_is_named_and_the_driver_serves_on(nodes: Workloads, removal: Uninstall) -> None:
    nodes.run("p")
    nodes.stuck.add("p")
    nodes.force()

    with pytest.raises(RemovalError) as refused:
        replace(removal, until=monotonic() + 1).run()

    assert str(refused.value) == (
        "pod default/p did not end in time; the driver serves on, so end the pods and uninstall again"
    )
    assert serves(nodes)


def test_two_budgets_for_one_pod_are_named_in_the_servers_words(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    for name in ("a", "b"):
        api.create("poddisruptionbudgets", {"metadata": {"name": name}, "spec": {"selector": {}}}, "default")
    nodes.run("p")
    nodes.force()

    with pytest.raises(RemovalError, match="more than one PodDisruptionBudget"):
        replace(removal, until=monotonic() + 1).run()


def test_a_claim_that_comes_between_look_and_end_stops_the_removal(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall
) -> None:
    """Without taint rules the scheduler goes on."""
    api.become("1.36")

    def cleanup(node: str, arguments: list[str]) -> tuple[int, str]:
        if node == "n2":
            nodes.run("late")
        return 0, ""

    nodes.cleanup = cleanup

    with pytest.raises(RemovalError, match="pod default/late"):
        removal.run()
    assert serves(nodes)


def test_a_claim_that_comes_while_the_driver_ends_needs_the_driver_again(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, said: list[str]
) -> None:
    api.become("1.36")

    def late(sentence: str) -> None:
        if sentence.startswith("daemonset/gpuslice-mps-supervisor is gone"):
            nodes.run("late")

    with pytest.raises(RemovalError) as stopped:
        replace(removal, say=late).run()

    assert str(stopped.value) == (
        "pod default/late got a GPU while the driver ended, and only the driver can end this; run: helm rollback gpuslice 3 "
        "--namespace gpuslice-system; then delete the pods and uninstall again"
    )


# ---------------------------------------------------------------- nodes


def test_a_prepared_claim_on_a_node_keeps_the_driver_and_is_named(nodes: Workloads, removal: Uninstall) -> None:
    nodes.cleanup = lambda node, arguments: (
        (3, "a line\ngpuslice: prepared on this node: ns/c") if node == "n2" else (0, "")
    )

    with pytest.raises(RemovalError) as refused:
        replace(removal, until=monotonic() + 1).run()

    assert str(refused.value) == (
        "the look for prepared claims is not done on 1 node (n2: prepared on this node: ns/c); uninstall again"
    )
    assert serves(nodes)


def test_a_node_that_refuses_its_clean_up_is_named_at_once(nodes: Workloads, removal: Uninstall) -> None:
    def cleanup(node: str, arguments: list[str]) -> tuple[int, str]:
        return (3, "gpuslice: cannot remove it") if node == "n2" and arguments == ["cleanup"] else (0, "")

    nodes.cleanup = cleanup

    with pytest.raises(RemovalError, match=r"the removal of files is not done on 1 node \(n2: cannot remove it\)"):
        removal.run()
    nothing_of_the_removal(nodes)


def test_a_node_that_is_not_ready_is_named_and_does_not_stop_the_others(
    nodes: Workloads, removal: Uninstall, said: list[str]
) -> None:
    nodes.report("n2", ready=False)

    removal.run()

    assert nodes.runs == [("n1", ["cleanup", "--check"]), ("n1", ["cleanup"])]
    sentence = (
        "node n2 is not Ready, so the driver's files stay there; when the node is back, install and uninstall again"
    )
    assert sentence in said
    assert nodes.names("daemonsets") == []
    nothing_of_the_removal(nodes)


def test_claims_of_a_node_that_is_not_ready_do_not_stop_a_forced_removal(
    nodes: Workloads, removal: Uninstall, said: list[str]
) -> None:
    nodes.run("p", "n2")
    nodes.report("n2", ready=False)
    nodes.force()

    removal.run()

    assert any(sentence.startswith("node n2 is not Ready") for sentence in said)
    assert nodes.names("daemonsets") == []


def test_without_force_a_claim_of_a_node_that_is_not_ready_is_refused_as_any_other(
    nodes: Workloads, removal: Uninstall
) -> None:
    """The node may be back in a minute, and its pod would hang."""
    nodes.run("p", "n2")
    nodes.report("n2", ready=False)

    with pytest.raises(RemovalError, match="1 claim holds GPUs of this driver"):
        removal.run()
    assert serves(nodes)


# ---------------------------------------------------------------- trouble with the API server


@pytest.mark.parametrize("path", ["daemonsets/gpuslice", "resourceslices", "pods", "resourceclaims", "nodes"])
@pytest.mark.parametrize("status", [403, 500])
def test_a_refusal_of_the_api_server_ends_it_and_the_rule_goes(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, path: str, status: int
) -> None:
    nodes.run("p")
    nodes.force()
    api.fail(status, 1000, path=path)

    with pytest.raises((ApiError, RemovalError), match="refused on cue"):
        replace(removal, until=monotonic() + 2).run()

    assert nodes.names("devicetaintrules") == []


def test_a_short_outage_is_waited_out(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_OUTAGE_S", 10.0)
    api.cut(2, path="daemonsets")
    api.cut(2, path="watch=true")
    api.fail(503, 2, path="devicetaintrules")

    removal.run()

    assert nodes.names("daemonsets") == nodes.names("devicetaintrules") == []


def test_an_api_server_that_goes_away_ends_it_with_a_sentence_about_the_rule(
    api: StandInApiServer, nodes: Workloads, removal: Uninstall, said: list[str]
) -> None:
    def cut(sentence: str) -> None:
        said.append(sentence)
        if sentence.startswith("no claim has a device"):
            api.away()

    try:
        with pytest.raises(ApiError, match="no answer from the API server"):
            replace(removal, say=cut).run()
    finally:
        api.back()

    assert any("run: kubectl delete devicetaintrule gpuslice-uninstall" in sentence for sentence in said)


# ---------------------------------------------------------------- the command


def command(api: StandInApiServer, tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "cleanup.yaml").write_text(json.dumps(MANIFEST), encoding="utf-8")
    flags = [
        "--kubeconfig",
        str(api.kubeconfig),
        "--namespace",
        NAMESPACE,
        "--manifest",
        str(tmp_path / "cleanup.yaml"),
    ]
    return [sys.executable, "-m", "gpuslice", "uninstall", *flags, *more]


def test_the_command_says_each_step_and_ends_with_0(api: StandInApiServer, nodes: Workloads, tmp_path: Path) -> None:
    done = subprocess.run(command(api, tmp_path), capture_output=True, text=True, check=False, timeout=50)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "devicetaintrule/gpuslice-uninstall keeps new claims away from the devices",
        "no claim has a device, and no node has a prepared claim",
        "daemonset/gpuslice is gone, with its pods",
        "daemonset/gpuslice-mps-supervisor is gone, with its pods",
        "no file of the driver is left on the nodes that are Ready",
    ]


def test_the_command_ends_a_refusal_with_1_and_one_sentence(
    api: StandInApiServer, nodes: Workloads, tmp_path: Path
) -> None:
    nodes.run("p")

    more = ("--helm-release", "gpuslice", "--helm-revision", "7")
    done = subprocess.run(command(api, tmp_path, *more), capture_output=True, text=True, check=False, timeout=50)

    assert done.returncode == 1
    assert done.stderr.startswith("gpuslice: 1 claim holds GPUs of this driver (pod default/p), so nothing was removed")
    assert "helm rollback gpuslice 7" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_end_of_its_pod_takes_the_rule_away(api: StandInApiServer, nodes: Workloads, tmp_path: Path) -> None:
    nodes.run("p")
    nodes.stuck.add("p")
    nodes.force()
    with subprocess.Popen(command(api, tmp_path), stdout=subprocess.PIPE, text=True) as process:
        api.wait(lambda: any("eviction" in request.path for request in api.requests), 30)

        os.kill(process.pid, signal.SIGTERM)

        assert process.wait(30) == 1
    assert serves(nodes)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--manifest", "x"], "the namespace of the driver is missing; use --namespace or NAMESPACE"),
        (["--namespace", "x"], "the DaemonSet of the clean-up is missing; use --manifest or MANIFEST"),
        (["--namespace", "x", "--manifest", "x", "--timeout", "5m"], "--timeout is '5m' and must be a whole number"),
        (["--namespace", "x", "--manifest", "/dev/null"], "/dev/null"),
    ],
)
def test_a_wrong_flag_is_named(flags: list[str], sentence: str) -> None:
    line = [sys.executable, "-m", "gpuslice", "uninstall", *flags]
    environment = {key: value for key, value in os.environ.items() if key not in ("NAMESPACE", "MANIFEST", "TIMEOUT")}
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=50, env=environment)

    assert done.returncode == 2
    assert sentence in done.stderr
