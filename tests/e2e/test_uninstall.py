"""The driver is removed from a real cluster: with and without pods that have claims, and after a removal that went wrong."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpuslice.core.removal import rule
from gpuslice.uninstall.cluster import NAME

from hack.lib import manifests
from hack.lib.cluster import binaries
from hack.lib.cluster.installed import CHART, NAMESPACE, RELEASE
from hack.lib.cluster.versions import HELMS
from tests.kit.cluster.bodies import exactly, made_from, pod, profile, template
from tests.kit.cluster.live import Cluster
from tests.kit.cluster.operators import DRIVER, Running, helm, own_uid, rolled_out, run_helm
from tests.kit.cluster.removed import left, nothing_within
from tests.kit.cluster.trouble import wait_logged

INSTALLED, SINCE = True, (1, 37)
_HERE = f"--namespace={NAMESPACE}"
_REQUESTS = {
    "gpu": exactly("gpu"),
    "mig": exactly("mig", where=profile("1g.10gb")),
    "mps": exactly("mps", capacity={"memory": "9Gi"}),
}


@pytest.fixture(autouse=True)
def installed_again(cluster: Cluster) -> Iterator[None]:
    """Whatever a test has removed is there again after it."""
    yield
    if RELEASE not in helm("list", "--short").split():
        install(cluster)


def install(cluster: Cluster) -> None:
    helm("install", RELEASE, str(CHART), "--values", str(cluster.folder / "values.json"), "--wait", "--timeout=120s")
    rolled_out(cluster)


def run(cluster: Cluster, *modes: str) -> Running:
    """A pod of each of these modes, which runs."""
    cluster.create(*(template(mode, _REQUESTS[mode]) for mode in modes))
    cluster.create(*(pod(mode, made_from(mode)) for mode in modes))
    return Running.of(cluster, modes)


def uninstall(*more: str) -> str:
    """Uninstall; what Helm prints of the hook's log."""
    done = run_helm("uninstall", RELEASE, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def use(cluster: Cluster, *modes: str) -> None:
    """Pods of these modes have run and have ended."""
    run(cluster, *modes)
    cluster.delete(*modes)


def test_an_idle_driver_leaves_nothing_on_the_node_and_in_the_api(cluster: Cluster) -> None:
    use(cluster, *("mig", "mps"))
    cluster.kubectl("delete", "resourceclaimtemplates", "--all")
    assert any(name.startswith("file") for name in left(cluster))
    assert any(name.startswith("process") for name in left(cluster))

    said = uninstall()

    nothing_within(cluster)
    assert "no claim has a device, and no node has a prepared claim" in said
    assert "no file of the driver is left on the nodes that are Ready" in said


@pytest.mark.parametrize("major", HELMS)
def test_with_a_pod_that_has_a_claim_it_is_refused_and_can_be_upgraded_again(cluster: Cluster, major: str) -> None:
    running = run(cluster, "mig")
    driver = own_uid(cluster, DRIVER)

    def run_helm(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(binaries.helm(major)), *arguments, "--namespace", NAMESPACE]
        environment = {**os.environ, "KUBECONFIG": str(cluster.folder / "admin.conf")}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    refused = run_helm("uninstall", RELEASE)

    assert refused.returncode == 1
    seen = refused.stdout + refused.stderr
    assert "1 claim holds GPUs of this driver (pod default/mig), so nothing was removed" in seen
    assert "1 claim holds GPUs" in cluster.kubectl("logs", "job/gpuslice-uninstall", _HERE)
    assert cluster.get("devicetaintrules") == []
    assert own_uid(cluster, DRIVER) == driver
    # Helm has marked the release as uninstalling before the hook ran.
    blocked = run_helm("upgrade", RELEASE, str(CHART), "--reuse-values")
    assert "has no deployed releases" in blocked.stderr
    history = json.loads(helm("history", RELEASE, "--output=json"))
    command = re.search(r"to keep the release instead, run: (helm [^\n\"]*)", seen)
    assert command is not None
    assert command[1] == f"helm rollback gpuslice {history[-1]['revision']} --namespace gpuslice-system"
    _, *words, _, _ = shlex.split(command[1])
    assert run_helm(*words).returncode == 0
    upgraded = run_helm("upgrade", RELEASE, str(CHART), "--reuse-values", "--wait", "--timeout=120s")
    assert upgraded.returncode == 0, upgraded.stderr
    assert running.undisturbed()
    assert own_uid(cluster, DRIVER) == driver


def test_after_a_refusal_it_can_be_uninstalled_when_the_pods_are_gone(cluster: Cluster) -> None:
    run(cluster, "mig")
    assert run_helm("uninstall", RELEASE).returncode == 1
    cluster.delete("mig")
    cluster.kubectl("delete", "resourceclaimtemplates", "--all")

    uninstall()

    nothing_within(cluster)


def test_by_force_pods_of_all_modes_are_evicted_and_nothing_is_left(cluster: Cluster) -> None:
    run(cluster, "mig", "mps")
    cluster.kubectl("delete", "resourceclaimtemplates", "--all")
    annotation = "gpuslice.dev/uninstall=evict"
    cluster.kubectl("annotate", "daemonset/gpuslice", _HERE, annotation, "--overwrite")

    said = uninstall()

    assert "evicted pod default/mig" in said
    assert cluster.get("pods", "--namespace=default") == []
    nothing_within(cluster)
    install(cluster)
    use(cluster, "mig", "mps")


def test_a_pod_that_hangs_without_driver_ends_when_it_is_installed_again(cluster: Cluster) -> None:
    run(cluster, "mig", "mps")
    assert run_helm("uninstall", RELEASE).returncode == 1
    leave_a_rule(cluster)
    uninstall("--no-hooks", "--wait")
    for left_over in ("job/gpuslice-uninstall", "devicetaintrule/gpuslice-uninstall"):
        cluster.kubectl("wait", "--for=delete", left_over, _HERE, "--timeout=30s")
    cluster.kubectl("wait", "--for=delete", "pod", f"--selector={DRIVER}", _HERE, "--timeout=60s")
    log = cluster.folder / "log" / "kubelet.log"
    begin = log.stat().st_size
    cluster.kubectl("delete", "pod", "mig", "mps", "--wait=false", "--grace-period=1")
    wait_logged(log, "unprepare dynamic resources: DRA driver gpuslice.dev is not registered", begin)
    assert len(cluster.get("pods", "--namespace=default")) == 2

    install(cluster)

    cluster.kubectl("wait", "--for=delete", "pod/mig", "pod/mps", "--timeout=120s")
    cluster.nothing_stays()


def leave_a_rule(cluster: Cluster) -> None:
    """Leave the rule of a removal that was killed."""
    (role,) = cluster.get("clusterroles", "--field-selector=metadata.name=gpuslice-uninstall")
    owner = {"apiVersion": role["apiVersion"], "kind": "ClusterRole"}
    cluster.create(rule(NAME, "gpuslice.dev", owner | {key: role["metadata"][key] for key in ("name", "uid")}))


def test_without_helm_the_same_job_is_applied_and_waited_for(cluster: Cluster, tmp_path: Path) -> None:
    uninstall()
    manifests.main(["--out", str(tmp_path), "--values", f"{cluster.folder}/values.json", "--namespace", NAMESPACE])
    deploy, job = f"--filename={tmp_path}", f"--filename={tmp_path}/uninstall"
    cluster.kubectl("apply", deploy)
    cluster.kubectl("rollout", "status", "daemonset/gpuslice", _HERE, "--timeout=120s")
    use(cluster, "mig")
    cluster.kubectl("delete", "resourceclaimtemplates", "--all")

    cluster.kubectl("apply", job)
    cluster.kubectl("wait", "--for=condition=Complete", "job/gpuslice-uninstall", _HERE, "--timeout=5m")
    cluster.kubectl("delete", "--ignore-not-found", job, deploy)

    nothing_within(cluster)
