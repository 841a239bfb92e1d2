"""`helm install` against a cluster: what its notes say, and what it refuses. The cluster is as much as Helm looks at."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from gpuslice.core import removal

from hack.lib.cluster.binaries import helm
from hack.lib.cluster.versions import HELMS
from tests.kit.chart import CHART
from tests.kit.helm_server import HelmServer

GPU_NODE = {
    "apiVersion": "v1",
    "kind": "Node",
    "metadata": {"name": "gpu-1", "labels": {"nvidia.com/gpu.present": "true"}},
}
BARE_NODE = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "bare-1"}}

pytestmark = pytest.mark.skipif(
    not all(helm(major).exists() for major in HELMS),
    reason="deploy/chart is not rendered: no Helm (hack/cluster build --only helm)",
)


def install(
    folder: Path,
    objects: Sequence[dict[str, Any]] = (),
    *,
    version: str = "v1.37.0",
    values: dict[str, Any] | None = None,
    major: str = "3",
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """`helm install` as a dry run, which looks into the cluster, and prints the notes."""
    file = folder / "values.json"
    file.write_text(json.dumps(values or {}), encoding="utf-8")
    with HelmServer(folder, objects, version) as server:
        command = [str(helm(major)), "install", "gpuslice", str(chart), "--namespace", "gpus", "--values", str(file)]
        more = ["--dry-run=server", "--disable-openapi-validation", "--kubeconfig", str(server.kubeconfig)]
        return subprocess.run([*command, *more], capture_output=True, text=True, timeout=30, check=False)


def notes(folder: Path, *arguments: Any, **options: Any) -> str:
    done = install(folder, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:\n")[2]


def a_namespace(**labels: str) -> dict[str, Any]:
    found = {f"pod-security.kubernetes.io/{key}": value for key, value in labels.items()}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "gpus", "labels": found}}


# ---------------------------------------------------------------- the notes


@pytest.mark.parametrize("major", HELMS)
def test_a_cluster_without_a_node_for_the_driver_is_named_with_the_labels_and_the_command(
    tmp_path: Path, major: str
) -> None:
    text = notes(tmp_path, [BARE_NODE], major=major)

    assert "WARNING: no pod of the driver starts, because none of the 1 nodes of this cluster has the labels" in text
    assert "feature.node.kubernetes.io/pci-10de.present=true  (affinity)" in text
    assert "    kubectl label node NODE nvidia.com/gpu.present=true\n" in text


def test_the_nodes_that_match_are_named(tmp_path: Path) -> None:
    text = notes(tmp_path, [BARE_NODE, GPU_NODE])

    assert "The labels of 1 of 2 nodes match: gpu-1\n" in text
    assert "WARNING" not in text


def test_a_cluster_that_shows_no_nodes_causes_no_warning(tmp_path: Path) -> None:
    """As with `helm template` and Argo CD, whose lookups are empty."""
    assert "WARNING" not in notes(tmp_path)


TERMS = [
    ({"a": "1"}, [], {"a": "1"}, True),
    ({"a": "1"}, [], {"a": "2"}, False),
    ({"a": "1"}, [("b", "Exists", [])], {"b": "x"}, False),
    ({}, [("b", "Exists", [])], {"b": "x"}, True),
    ({}, [("b", "DoesNotExist", [])], {"b": "x"}, False),
    ({}, [("b", "NotIn", ["x"])], {}, True),
    ({}, [("b", "NotIn", ["x"])], {"b": "x"}, False),
    ({}, [("b", "In", ["x", "y"])], {"b": "y"}, True),
    ({}, [("b", "Gt", ["3"])], {"b": "4"}, True),
    ({}, [("b", "Gt", ["3"])], {"b": "3"}, False),
    ({}, [("b", "Lt", ["3"])], {}, False),
    ({}, [("b", "Exists", []), ("c", "Exists", [])], {"b": "x"}, False),
]


@pytest.mark.parametrize(("selector", "expressions", "labels", "fits"), TERMS)
def test_nodes_match_as_the_scheduler_matches_them(
    tmp_path: Path, selector: dict[str, str], expressions: list[tuple[str, str, list[str]]], labels: Any, fits: bool
) -> None:
    term = {"matchExpressions": [{"key": k, "operator": o, **({"values": v} if v else {})} for k, o, v in expressions]}
    required = {"nodeSelectorTerms": [term]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}} if expressions else None
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "one", "labels": labels}}

    text = notes(tmp_path, [node], values={"nodeSelector": selector, "affinity": affinity})

    assert ("The labels of 1 of 1 nodes match: one" in text) is fits
    assert ("WARNING" in text) is not fits


@pytest.mark.parametrize(
    ("taint", "tolerations", "named"),
    [
        ({"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}, [], "gpu-1: dedicated=gpu:NoSchedule\n"),
        (
            {"key": "dedicated", "effect": "NoExecute"},
            [{"key": "dedicated", "effect": "NoSchedule"}],
            "dedicated:NoExec",
        ),
        ({"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}, [{"key": "dedicated", "value": "gpu"}], ""),
        (
            {"key": "dedicated", "value": "gpu", "effect": "NoSchedule"},
            [{"key": "dedicated", "value": "a"}],
            "dedicated=",
        ),
        ({"key": "dedicated", "value": "gpu", "effect": "NoSchedule"}, [{"operator": "Exists"}], ""),
        ({"key": "dedicated", "effect": "PreferNoSchedule"}, [], ""),
        ({"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}, [], ""),
    ],
)
def test_a_taint_that_keeps_the_driver_away_is_named(
    tmp_path: Path, taint: dict[str, str], tolerations: list[dict[str, str]], named: str
) -> None:
    text = notes(tmp_path, [{**GPU_NODE, "spec": {"taints": [taint]}}], values={"tolerations": tolerations})

    assert named in text
    assert ("taints that the driver does not tolerate" in text) is bool(named)


def test_a_label_of_the_user_is_in_the_command(tmp_path: Path) -> None:
    text = notes(tmp_path, [BARE_NODE], values={"nodeSelector": {"pool": "cards"}, "affinity": None})

    assert "    pool=cards  (nodeSelector)\n" in text
    assert "    kubectl label node NODE pool=cards\n" in text


def test_simulated_cards_need_no_label(tmp_path: Path) -> None:
    text = notes(tmp_path, [BARE_NODE], values={"simulate": "h100x2"})

    assert "The labels of 1 of 1 nodes match: bare-1\n" in text
    assert "The driver simulates these cards on each node: h100x2." in text


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("v1.35.2", "Kubernetes v1.35.2 offers each card whole, or in a fixed layout (`static` in the policy"),
        ("v1.36.1", "WARNING: the scheduler of Kubernetes v1.36.1 can give a card out twice"),
        ("v1.36.2", ""),
        ("v1.37.0", ""),
    ],
)
def test_what_a_release_of_kubernetes_does_not_offer_is_said(tmp_path: Path, version: str, said: str) -> None:
    text = notes(tmp_path, version=version)

    assert said in text
    assert ("1.36.2" in text) is bool(said)


def test_an_older_kubernetes_is_refused(tmp_path: Path) -> None:
    done = install(tmp_path, version="v1.33.4")

    assert done.returncode == 1
    assert "chart requires kubeVersion: >=1.34.0-0 which is incompatible with Kubernetes v1.33.4" in done.stderr


def test_a_namespace_that_refuses_privileged_pods_is_said_with_the_command(tmp_path: Path) -> None:
    command = "kubectl label namespace gpus pod-security.kubernetes.io/enforce=privileged"

    refusing = notes(tmp_path, [a_namespace(enforce="baseline")])
    unknown = notes(tmp_path, [a_namespace()])

    assert "no pod of the driver starts, because namespace gpus enforces the pod security level baseline" in refusing
    assert f"    {command} --overwrite\n" in refusing
    assert f"If no pods appear, the namespace may refuse privileged pods. To allow them:\n    {command}\n" in unknown
    assert "privileged" not in notes(tmp_path, [a_namespace(enforce="privileged")])


def test_the_quota_of_gke_is_named(tmp_path: Path) -> None:
    on_gke = notes(tmp_path, version="v1.37.0-gke.1000")

    assert "WARNING: GKE allows system-node-critical only in namespaces with a quota for it." in on_gke
    assert '"insufficient quota to match these scopes"' in notes(tmp_path)
    assert "quota" not in notes(tmp_path, version="v1.37.0-gke.1000", values={"priorityQuota": True})
    assert "quota" not in notes(tmp_path, values={"priorityClassName": ""})


@pytest.mark.parametrize(("notes_of_it", "warned"), [({removal.EVICT: "evict"}, True), ({removal.EVICT: ""}, False)])
def test_a_wish_for_evictions_that_is_left_from_a_removal_is_named(
    tmp_path: Path, notes_of_it: dict[str, str], warned: bool
) -> None:
    """`helm rollback` keeps the annotation, and the next removal would not refuse."""
    ours = {"meta.helm.sh/release-name": "gpuslice", "meta.helm.sh/release-namespace": "gpus"}
    labels = {"app.kubernetes.io/managed-by": "Helm"}
    meta = {"name": "gpuslice", "namespace": "gpus", "labels": labels, "annotations": ours | notes_of_it}

    text = notes(tmp_path, [{"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": meta}])

    assert ("kubectl annotate daemonset/gpuslice --namespace gpus gpuslice.dev/uninstall-\n" in text) is warned


def test_an_image_without_a_registry_is_said(tmp_path: Path) -> None:
    assert "--set image.repository=REGISTRY/gpuslice\n" in notes(tmp_path)
    assert "REGISTRY" not in notes(tmp_path, values={"image": {"repository": "a.b/gpuslice"}})


# ---------------------------------------------------------------- what is refused


def a_role(name: str, namespace: str) -> dict[str, Any]:
    annotations = {"meta.helm.sh/release-name": name, "meta.helm.sh/release-namespace": namespace}
    metadata = {"name": "gpuslice", "annotations": annotations, "labels": {"app.kubernetes.io/managed-by": "Helm"}}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": metadata}


@pytest.mark.parametrize("major", HELMS)
@pytest.mark.parametrize(("name", "namespace"), [("other", "gpus"), ("gpuslice", "there")])
def test_a_second_release_is_refused_with_the_name_of_the_first(
    tmp_path: Path, name: str, namespace: str, major: str
) -> None:
    done = install(tmp_path, [a_role(name, namespace)], major=major)

    assert done.returncode == 1
    assert (
        f"gpuslice is installed already, as release {name} in namespace {namespace}, and a cluster can have"
        in done.stderr
    )
    assert f"helm upgrade {name} --namespace {namespace}" in done.stderr


@pytest.mark.parametrize("major", HELMS)
def test_the_release_itself_is_not_a_second_one(tmp_path: Path, major: str) -> None:
    assert install(tmp_path, [a_role("gpuslice", "gpus")], major=major).returncode == 0


@pytest.mark.parametrize("major", HELMS)
def test_the_values_of_the_first_chart_still_work(tmp_path: Path, major: str) -> None:
    """`helm upgrade --reuse-values` takes the values of the old chart, so what is newer is missing."""
    chart = shutil.copytree(CHART, tmp_path / "chart")
    shutil.copy(Path(__file__).parents[1] / "golden/0.1.0/values.yaml", chart / "values.yaml")

    now, then = (install(tmp_path, major=major, chart=path) for path in (CHART, chart))

    assert then.returncode == 0, then.stderr
    assert then.stdout.partition("MANIFEST:")[2] == now.stdout.partition("MANIFEST:")[2]
