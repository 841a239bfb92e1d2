"""deploy/uninstall: the Job, its rights, and the pods that clean the nodes."""

from __future__ import annotations

import subprocess
from pathlib import Path
from time import monotonic
from typing import Any

import kubernetes_validate
import pytest
import yaml
from gpuslice import config
from gpuslice.answers import Call
from gpuslice.api import Api
from gpuslice.core import removal
from gpuslice.errors import ConfigError
from gpuslice.standin.apiserver import StandInApiServer
from gpuslice.standin.http import HttpRequest
from gpuslice.uninstall import cluster as door
from gpuslice.uninstall import manifest
from gpuslice.uninstall.cluster import Cluster
from gpuslice.uninstall.steps import CLEANUP, DRIVER, SUPERVISOR, Uninstall

from hack.lib.cluster.binaries import helm
from hack.lib.cluster.versions import HELMS
from tests.kit.chart import CHART, EVERYTHING, NOTHING, as_read, mounts, pod, rendered
from tests.kit.workloads import NAMESPACE, Workloads

FILE = Path(__file__).parents[2] / "deploy" / "uninstall" / "uninstall.yaml"
Body = dict[str, Any]
RUNS_S = 270  # `gpuslice uninstall`
HELM_WAITS_S = 300


def only(kind: str, bodies: list[Body] | None = None) -> Body:
    """The object of the removal of this kind, in these bodies or in deploy/."""
    if bodies is None:
        bodies = list(yaml.safe_load_all(FILE.read_text(encoding="utf-8")))
    (found,) = (body for body in bodies if body["kind"] == kind and body["metadata"]["name"] == "gpuslice-uninstall")
    return found


def cleanup(values: Body | None = None) -> Body:
    """The DaemonSet of the clean-up."""
    found = only("ConfigMap", None if values is None else rendered(values))
    daemonset: Body = yaml.safe_load(found["data"]["cleanup.yaml"])
    return daemonset


def templated(release: str, major: str = "3", *flags: str) -> list[Body]:
    """What Helm itself makes of the chart, with the hooks."""
    if not helm(major).exists():
        pytest.skip("deploy/chart is not rendered: no Helm (hack/cluster build --only helm)")
    command = [str(helm(major)), "template", release, str(CHART), "--namespace", "gpus", *flags]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=50).stdout
    return [body for body in yaml.safe_load_all(text) if body]


# ---------------------------------------------------------------- the Job


@pytest.mark.parametrize("major", HELMS)
def test_helm_runs_the_job_before_it_deletes_and_prints_its_log(major: str) -> None:
    job = only("Job", templated("mine", major))

    assert job["metadata"]["annotations"] == {
        "helm.sh/hook": "pre-delete",
        "helm.sh/hook-delete-policy": "before-hook-creation,hook-succeeded",
        "helm.sh/hook-output-log-policy": "hook-failed,hook-succeeded",
    }
    environment = {entry["name"]: entry.get("value") for entry in container(job)["env"]}
    assert environment["HELM_RELEASE"] == "mine"
    assert environment["HELM_REVISION"] == "1"


def test_without_helm_the_job_is_applied_apart_and_names_no_release() -> None:
    text = FILE.read_text(encoding="utf-8")

    assert "helm.sh" not in text
    assert "HELM_" not in text
    assert not [path for path in FILE.parents[1].glob("*.yaml") if "gpuslice-uninstall" in path.read_text()]


def container(workload: Body) -> Body:
    (found,) = workload["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_a_refusal_is_seen_once_and_stays_to_be_read() -> None:
    job = only("Job")

    assert job["spec"]["backoffLimit"] == 0
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert container(job)["terminationMessagePolicy"] == "FallbackToLogsOnError"
    assert container(cleanup())["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_a_job_that_cannot_start_ends_before_helm_stops_to_wait() -> None:
    """Otherwise it would remove the driver hours later, after `helm rollback`. Without Helm, who applied it can delete it."""
    assert RUNS_S < only("Job", templated("mine"))["spec"]["activeDeadlineSeconds"] < HELM_WAITS_S
    assert "activeDeadlineSeconds" not in only("Job")["spec"]


def test_a_job_that_may_wait_longer_has_a_later_end() -> None:
    """For `helm uninstall --timeout 1h`."""
    later = templated("mine", "3", "--set", "extraEnv[0].name=TIMEOUT", "--set-string", "extraEnv[0].value=3500")

    assert only("Job", later)["spec"]["activeDeadlineSeconds"] == 3525


@pytest.mark.parametrize("name", ["2026", "yes", "1e3"])
def test_a_release_whose_name_looks_like_no_text_can_be_uninstalled(name: str) -> None:
    job = only("Job", templated(name))

    assert {entry["name"]: entry.get("value") for entry in container(job)["env"]}["HELM_RELEASE"] == name


def test_the_job_needs_no_root_and_changes_nothing_in_its_container() -> None:
    spec = only("Job")["spec"]["template"]["spec"]

    assert spec["securityContext"]["runAsNonRoot"]
    assert container(only("Job"))["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


# ---------------------------------------------------------------- its rights


class RecordingApi(Api):
    def __init__(self, kubeconfig: Path) -> None:
        super().__init__(kubeconfig)
        self.calls: list[Call] = []

    def _send(self, call: Call, *arguments: Any, **more: Any) -> Any:
        self.calls.append(call)
        return super()._send(call, *arguments, **more)


def test_the_rights_are_exactly_those_of_the_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_GLANCE_S", 0.1)
    with StandInApiServer(tmp_path) as server, Workloads(server, ("n1", "n2")) as nodes:
        nodes.install()
        nodes.run("p")
        nodes.report("n2", ready=False)
        nodes.force()

        def cleans(node: str, arguments: list[str]) -> tuple[int, str]:
            server.wait(lambda: any(map(watches_pods, server.requests)))
            return 0, ""

        nodes.cleanup = cleans
        api = RecordingApi(server.kubeconfig)
        cluster = Cluster(api, NAMESPACE, config.DRIVER_NAME)
        Uninstall(cluster=cluster, cleanup=cleanup(), until=monotonic() + 20, say=lambda _: None).run()

    here = f"/namespaces/{NAMESPACE}/"
    asked = {
        (here in call.path, *right) for call in api.calls if call.resource != "APIResourceList" for right in of(call)
    }
    allowed = {
        (kind == "Role", group, resource, verb, name)
        for kind in ("Role", "ClusterRole")
        for rule in only(kind)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames", [""])
    }
    assert asked == allowed


def watches_pods(request: HttpRequest) -> bool:
    return request.watching and request.path.endswith("/pods")


def of(call: Call) -> list[tuple[str, str, str, str]]:
    """Group, resource, verb and name of a request. The names of evicted and deleted pods are not known before."""
    named = call.verb in ("get", "delete", "update") and call.resource != "pods"
    return [(call.group, call.resource, call.verb, call.name if named else "")]


@pytest.mark.parametrize("kind", ["Role", "ClusterRole"])
def test_the_account_of_the_job_has_them(kind: str) -> None:
    binding, account = only(f"{kind}Binding"), only("ServiceAccount")["metadata"]

    assert binding["roleRef"]["name"] == only(kind)["metadata"]["name"]
    assert binding["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert only("Job")["spec"]["template"]["spec"]["serviceAccountName"] == account["name"]


def test_the_objects_that_own_what_the_job_makes_have_its_name() -> None:
    assert only("ConfigMap")["metadata"]["name"] == only("ClusterRole")["metadata"]["name"] == door.NAME


def test_openshift_allows_each_pod_by_the_constraints_of_its_account() -> None:
    bodies = templated("mine", "3", "--api-versions", "security.openshift.io/v1")
    allowed = {
        subject["name"]: body["roleRef"]["name"].rpartition(":")[2]
        for body in bodies
        if body["kind"] == "RoleBinding" and body["roleRef"]["name"].startswith("system:openshift:scc:")
        for subject in body["subjects"]
    }
    specs = [body["spec"]["template"]["spec"] for body in bodies if body["kind"] in ("DaemonSet", "Job")]
    specs.append(yaml.safe_load(only("ConfigMap", bodies)["data"]["cleanup.yaml"])["spec"]["template"]["spec"])

    assert len(specs) == 4
    for spec in specs:
        privileged = [c["securityContext"].get("privileged", False) for c in spec["containers"]]
        assert allowed[spec["serviceAccountName"]] == ("privileged" if any(privileged) else "nonroot-v2")
    assert not [
        body for body in rendered({}) if body["metadata"]["name"] in ("gpuslice-privileged", "gpuslice-nonroot")
    ]


# ---------------------------------------------------------------- the pods that clean the nodes


def test_the_command_takes_the_clean_up_as_the_chart_describes_it(tmp_path: Path) -> None:
    file = tmp_path / "cleanup.yaml"
    file.write_text(only("ConfigMap")["data"]["cleanup.yaml"], encoding="utf-8")

    found = manifest.read(file)

    assert found == cleanup()
    assert found["metadata"]["name"] == CLEANUP
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert labels == found["spec"]["selector"]["matchLabels"] == {"app.kubernetes.io/name": CLEANUP}
    (entry,) = (entry for entry in container(only("Job"))["env"] if entry["name"] == "MANIFEST")
    (mount,) = container(only("Job"))["volumeMounts"]
    assert entry["value"] == f"{mount['mountPath']}/cleanup.yaml"


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
@pytest.mark.parametrize("values", [EVERYTHING, NOTHING], ids=["everything-set", "everything-off"])
def test_the_clean_up_is_what_the_api_server_accepts(values: Body, version: str) -> None:
    kubernetes_validate.validate(cleanup(values), version, strict=True)


@pytest.mark.parametrize("values", [EVERYTHING, {}], ids=["everything-set", "defaults"])
def test_the_clean_up_looks_where_the_driver_wrote(values: Body) -> None:
    spec, driver = cleanup(values)["spec"]["template"]["spec"], pod(DRIVER, values)["spec"]
    settings, theirs, found = as_read(spec), as_read(driver), mounts(spec)

    for name in config.CLEANUP_FLAGS:
        assert getattr(settings, name) == getattr(theirs, name)
    # A folder that is mounted itself cannot be removed.
    assert found[settings.plugin_folder.parent] == settings.plugin_folder.parent
    assert found[settings.kubelet_registrar_directory_path] == settings.kubelet_registrar_directory_path
    assert found[settings.cdi_root] == settings.cdi_root
    here = Path(next(one["value"] for one in spec["containers"][0]["env"] if one["name"] == "MPS_ROOT_CTR_PATH"))
    assert found[here.parents[1]] / here.relative_to(here.parents[1]) == settings.mps_root
    assert not found.keys() & {settings.plugin_folder, here, here.parent}


@pytest.mark.parametrize("values", [EVERYTHING, NOTHING], ids=["everything-set", "everything-off"])
def test_the_clean_up_comes_to_the_nodes_of_the_driver(values: Body) -> None:
    spec, driver = cleanup(values)["spec"]["template"]["spec"], pod(DRIVER, values)["spec"]

    for field in ("affinity", "nodeSelector", "priorityClassName", "imagePullSecrets"):
        assert spec.get(field) == driver.get(field)
    for field in ("image", "imagePullPolicy"):
        assert spec["containers"][0].get(field) == driver["containers"][0].get(field)
    assert spec["tolerations"] == [{"operator": "Exists"}]


def test_an_unmount_in_the_clean_up_is_one_on_the_node() -> None:
    (run,) = (mount for mount in container(cleanup())["volumeMounts"] if mount["name"] == "run")

    assert run["mountPropagation"] == "Bidirectional"
    assert cleanup()["spec"]["template"]["spec"]["hostPID"]


# Where containers have mounts of their runtime: CRI-O makes /run/.containerenv and /run/secrets in each container.
OF_RUNTIMES = [
    Path(path) for path in ("/run/.containerenv", "/run/secrets", "/dev/termination-log", "/etc/hosts", "/proc")
]


@pytest.mark.parametrize("values", [EVERYTHING, {}, {"cdiRoot": "/run/cdi"}], ids=["everything-set", "defaults", "run"])
def test_nothing_is_mounted_below_a_mount_that_the_node_shares(values: Body) -> None:
    """Such a mount would appear on the node, and stay there after the end of the container."""
    specs = [cleanup(values)["spec"]["template"]["spec"], pod(SUPERVISOR, values)["spec"], pod(DRIVER, values)["spec"]]
    for spec in specs:
        for part in (*spec["containers"], *spec.get("initContainers", [])):
            mounted = {
                in_the_image(mount["mountPath"]): mount.get("mountPropagation") for mount in part["volumeMounts"]
            }
            shared = {path for path, propagation in mounted.items() if propagation == "Bidirectional"}
            assert not [path for path in (*mounted, *OF_RUNTIMES) if shared & {*path.parents}]


def in_the_image(path: str) -> Path:
    """/var/run of the image is a link (hack/lib/image/recipe.py)."""
    return Path("/run", *Path(path).parts[3:]) if Path(path).parts[:3] == ("/", "var", "run") else Path(path)


def test_the_daemonsets_that_end_are_those_of_the_chart() -> None:
    names = {body["metadata"]["name"] for body in rendered({}) if body["kind"] == "DaemonSet"}

    assert names == {DRIVER, SUPERVISOR}
    for name in names:
        assert pod(name, {})["metadata"]["labels"] == {"app.kubernetes.io/name": name}


@pytest.mark.parametrize(
    "text", ["", "[]", "kind: Pod", "kind: DaemonSet", "kind: DaemonSet\nspec: {template: {spec: {containers: []}}}"]
)
def test_another_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")

    with pytest.raises(ConfigError, match="is not a DaemonSet with one container; use the one of deploy/chart"):
        manifest.read(tmp_path / "file")


def test_the_annotation_in_the_rights_is_the_one_that_counts() -> None:
    assert f"{removal.EVICT}=evict" in FILE.read_text(encoding="utf-8")
