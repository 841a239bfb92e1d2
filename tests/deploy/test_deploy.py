"""deploy/*.yaml without a cluster: schemas of every supported version, and names that must agree."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from gpuslice import config, kube
from gpuslice.core.policy.rules import Policy
from gpuslice.mps import control

from tests.kit.manifests import DEPLOY, DRIVER, FILES, ROOT, documents, mounts, names_in_environment, only, pod

# ---------------------------------------------------------------- schemas and names


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_what_the_api_server_accepts(path: Path, version: str) -> None:
    for body in documents(path):
        kubernetes_validate.validate(body, version, strict=True)


@pytest.mark.parametrize("path", sorted((DEPLOY / "examples/operator").glob("*.yaml")), ids=lambda path: path.name)
def test_a_file_for_operators_is_what_the_newest_api_server_accepts(path: Path) -> None:
    for body in documents(path):
        kubernetes_validate.validate(body, "1.37", strict=True)


def test_the_daemonset_runs_as_the_account_that_has_the_rights() -> None:
    account = only("ServiceAccount", "gpuslice")["metadata"]
    binding = only("ClusterRoleBinding")

    assert pod()["serviceAccountName"] == account["name"]
    assert only("DaemonSet", "gpuslice")["metadata"]["namespace"] == account["namespace"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    assert binding["roleRef"]["name"] == only("ClusterRole")["metadata"]["name"]


def test_the_admission_policy_guards_the_account_that_the_daemonset_runs_as() -> None:
    """A policy for an account that nobody uses guards nothing, and nobody notices."""
    policy = only("ValidatingAdmissionPolicy")
    account = only("ServiceAccount", "gpuslice")["metadata"]

    conditions = [condition["expression"] for condition in policy["spec"]["matchConditions"]]

    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert conditions == [f'request.userInfo.username == "{user}"']
    assert only("ValidatingAdmissionPolicyBinding")["spec"]["policyName"] == policy["metadata"]["name"]
    assert f"== '{DRIVER}'" in policy["spec"]["validations"][-1]["expression"]


FOR_EVERYBODY = ("version", "selfsubjectaccessreviews")  # by the ClusterRoles system:discovery and system:basic-user


def test_the_role_has_exactly_the_rights_that_the_driver_uses() -> None:
    calls = re.findall(r'\bCall\(\s*"(\w+)", "(\w+)"', (ROOT / "driver/gpuslice/kube.py").read_text(encoding="utf-8"))
    used = {(verb, resource) for verb, resource in calls if resource not in FOR_EVERYBODY}
    granted = {(v, r) for rule in only("ClusterRole")["rules"] for v in rule["verbs"] for r in rule["resources"]}

    assert set(kube.RIGHTS) == used
    # Beside list and watch, for a person who looks with the driver's own rights; the driver itself never gets one.
    assert granted == used | {("get", "resourceslices")}


def test_the_daemonset_sets_what_the_driver_reads() -> None:
    (container,) = pod()["containers"]
    found = {path: entry["host"] for path, entry in mounts(pod()).items()}
    defaults = config.Config()

    assert names_in_environment(pod()) - {"NVIDIA_VISIBLE_DEVICES"} <= {
        name.upper() for name in defaults.__dataclass_fields__
    }
    for path in (defaults.plugin_folder, defaults.kubelet_registrar_directory_path, defaults.cdi_root):
        assert found[str(path)] == str(path)
    assert container["ports"][0]["containerPort"] == 9510


def test_an_update_never_leaves_the_node_without_a_driver() -> None:
    strategy = only("DaemonSet", "gpuslice")["spec"]["updateStrategy"]["rollingUpdate"]
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in pod()["containers"][0]["env"]
        if "valueFrom" in entry
    }

    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}
    assert fields == {"NODE_NAME": "spec.nodeName", "POD_UID": "metadata.uid", "POD_NAMESPACE": "metadata.namespace"}
    assert pod()["terminationGracePeriodSeconds"] > 20


# ---------------------------------------------------------------- the MPS supervisor

SUPERVISOR = "gpuslice-mps-supervisor"


def test_driver_and_supervisor_meet_at_the_same_path_of_the_node() -> None:
    """The driver hands out that path for containers, and the runtime looks for it on the node."""
    root = str(config.Config().mps_root)
    driver, supervisor = mounts(pod())[root], mounts(pod(SUPERVISOR))[root]

    assert driver["host"] == supervisor["host"] == root
    assert supervisor["mountPropagation"] == "Bidirectional"
    assert driver["mountPropagation"] == "HostToContainer"
    # Whoever sets it in one of them must set it in both, and move the mounts as well.
    assert "MPS_ROOT" not in names_in_environment(pod()) | names_in_environment(pod(SUPERVISOR))


def test_the_supervisor_runs_where_the_driver_runs_and_as_the_same_release() -> None:
    driver, supervisor = pod(), pod(SUPERVISOR)

    for field in ("affinity", "tolerations", "priorityClassName"):
        assert supervisor[field] == driver[field]
    assert supervisor["containers"][0]["image"] == driver["containers"][0]["image"]
    namespaces = {only("DaemonSet", name)["metadata"]["namespace"] for name in ("gpuslice", SUPERVISOR)}
    assert namespaces == {"gpuslice-system"}


def test_the_supervisor_has_an_account_without_rights_and_without_a_token() -> None:
    spec = pod(SUPERVISOR)
    account = only("ServiceAccount", spec["serviceAccountName"])

    assert account["automountServiceAccountToken"] is False
    assert spec["automountServiceAccountToken"] is False
    assert [subject["name"] for subject in only("ClusterRoleBinding")["subjects"]] == ["gpuslice"]
    assert not any("projected" in volume for volume in spec["volumes"])


def test_nothing_restarts_the_supervisor_by_itself_for_its_daemons_would_end_with_it() -> None:
    (container,) = pod(SUPERVISOR)["containers"]

    assert only("DaemonSet", SUPERVISOR)["spec"]["updateStrategy"] == {"type": "OnDelete"}
    assert not container.keys() & {"livenessProbe", "startupProbe"}
    assert "limits" not in container["resources"]


def test_the_supervisor_is_given_what_it_reads() -> None:
    (container,) = pod(SUPERVISOR)["containers"]
    found = mounts(pod(SUPERVISOR))
    environment = {entry["name"]: entry["value"] for entry in container["env"]}

    assert environment.keys() - {"NVIDIA_VISIBLE_DEVICES"} <= {name.upper() for name in config.SUPERVISOR_FLAGS}
    assert found[environment["DRIVER_ROOT_CTR_PATH"]]["host"] == mounts(pod())["/driver-root"]["host"]
    assert found["/dev"]["host"] == "/dev"
    # All else of its file system is read-only.
    assert found[str(control.LINKS)]["host"] is None
    assert container["securityContext"] == {"privileged": True, "readOnlyRootFilesystem": True}


def test_the_policy_that_is_shipped_is_the_default() -> None:
    text = only("ConfigMap")["data"]["policy.yaml"]

    assert Policy.parse(yaml.safe_load(text)) == Policy.default()


# ---------------------------------------------------------------- where an operator looks


@pytest.mark.parametrize("daemonset", ["gpuslice", SUPERVISOR])
def test_kubectl_describe_has_the_reason_why_a_container_ended(daemonset: str) -> None:
    """`Last State` has a message only by this policy: by default Kubernetes takes it from a file that nobody writes."""
    spec = pod(daemonset)
    containers = [*spec.get("initContainers", ()), *spec["containers"]]

    assert {entry["terminationMessagePolicy"] for entry in containers} == {"FallbackToLogsOnError"}
    # The kubelet mounts the file into the container: below /dev, it would be a file in the node's own /dev.
    assert {entry["terminationMessagePath"] for entry in containers} == {"/run/termination-log"}


def test_the_step_before_the_driver_sees_what_the_driver_sees() -> None:
    spec = pod()
    (step,), (driver,) = spec["initContainers"], spec["containers"]
    mounted = {entry["mountPath"]: entry for entry in driver["volumeMounts"]}

    assert (step["args"], step["image"], step["env"]) == (["preflight"], driver["image"], driver["env"])
    assert step["resources"] == driver["resources"]  # the larger of the two counts for the pod
    own = [entry for entry in step["volumeMounts"] if entry != mounted.get(entry["mountPath"])]
    assert [(entry["mountPath"], entry["readOnly"]) for entry in own] == [("/var/lib/kubelet/pod-resources", True)]
    names = {name.lower() for name in names_in_environment(spec)} - {"nvidia_visible_devices"}
    assert names <= set(config.PREFLIGHT_FLAGS)
