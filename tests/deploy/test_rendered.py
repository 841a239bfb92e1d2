"""What the chart makes of many values: each reaches the object that it is about."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpuslice
import kubernetes_validate
import pytest
import yaml
from gpuslice.core.policy.rules import Policy

from tests.kit.chart import CHART, DRIVER, EVERYTHING, NOTHING, POLICY, SUPERVISOR, as_read, mounts, pod, rendered


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
@pytest.mark.parametrize("values", [EVERYTHING, NOTHING], ids=["everything-set", "everything-off"])
def test_what_is_rendered_is_what_the_api_server_accepts(values: dict[str, Any], version: str) -> None:
    for body in rendered(values):
        kubernetes_validate.validate(body, version, strict=True)


def test_the_driver_finds_mounted_what_it_is_told() -> None:
    spec = pod(DRIVER, EVERYTHING)["spec"]
    settings, found = as_read(spec), mounts(spec)

    assert settings.kubelet_plugins_directory_path == Path("/var/lib/k0s/kubelet/plugins")
    assert settings.cdi_root == Path("/etc/cdi")
    for path in (settings.plugin_folder, settings.kubelet_registrar_directory_path, settings.cdi_root):
        assert found[path] == path
    assert found[settings.driver_root_ctr_path] == settings.nvidia_driver_root == Path("/run/nvidia/driver")
    assert settings.http_endpoint == ":8080"
    assert spec["containers"][0]["ports"] == [{"name": "http", "containerPort": 8080}]
    assert settings.log_level == "debug"


def test_driver_and_supervisor_simulate_the_same_cards_in_the_same_folder() -> None:
    specs = [pod(name, EVERYTHING)["spec"] for name in (DRIVER, SUPERVISOR)]

    first, second = (as_read(spec) for spec in specs)
    assert first.simulate == second.simulate == "a100-40gx2:mig+l4"
    assert first.simulated_node == second.simulated_node
    for spec in specs:
        assert mounts(spec)[first.plugin_folder] == first.plugin_folder


def test_simulated_cards_need_no_label_on_their_node() -> None:
    spec = pod(DRIVER, {"simulate": "h100x2"})["spec"]

    assert "affinity" not in spec
    assert replace(as_read(spec), simulate="") == as_read(pod(DRIVER, {})["spec"])


def test_driver_and_supervisor_are_the_same_release_on_the_same_nodes() -> None:
    cases: tuple[dict[str, Any], ...] = (EVERYTHING, NOTHING | {"supervisor": {}}, {"affinity": {"podAffinity": {}}})
    for values in cases:
        first, second = (pod(name, values)["spec"] for name in (DRIVER, SUPERVISOR))

        for field in ("affinity", "nodeSelector", "tolerations", "priorityClassName", "imagePullSecrets"):
            assert first.get(field) == second.get(field)
        for field in ("image", "imagePullPolicy"):
            assert first["containers"][0].get(field) == second["containers"][0].get(field)


def test_the_scheduling_is_as_said() -> None:
    spec = pod(DRIVER, {key: value for key, value in EVERYTHING.items() if key != "simulate"})["spec"]
    bare = pod(DRIVER, NOTHING)["spec"]

    assert spec["nodeSelector"] == {"pool": "cards"}
    assert spec["affinity"].keys() == {"nodeAffinity", "podAntiAffinity"}  # Helm merges, and null takes away
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert spec["priorityClassName"] == "ours"
    assert not bare.keys() & {"affinity", "nodeSelector", "tolerations", "priorityClassName"}


def test_the_image_is_of_the_registry_that_is_named() -> None:
    spec = pod(DRIVER, EVERYTHING)["spec"]

    assert spec["containers"][0]["image"] == "example/gpuslice:1"
    assert spec["containers"][0]["imagePullPolicy"] == "Always"
    assert spec["imagePullSecrets"] == [{"name": "login"}]


def test_the_policy_arrives_as_it_was_written_and_replaces_the_pods() -> None:
    (body,) = (body for body in rendered(EVERYTHING) if body["metadata"]["name"] == "gpuslice-policy")
    noted = [
        pod(DRIVER, {"policy": text})["metadata"].get("annotations") for text in ("", POLICY, POLICY + "gpus: []\n")
    ]

    assert body["data"] == {"policy.yaml": POLICY}
    assert Policy.parse(yaml.safe_load(body["data"]["policy.yaml"])) != Policy.default()
    assert len({str(annotations) for annotations in noted}) == 3
    # A pod with MPS daemons is never replaced for it.
    assert "annotations" not in pod(SUPERVISOR, EVERYTHING)["metadata"]


@pytest.mark.parametrize(
    "text",
    [
        f"\n\n{POLICY}\n",
        f"    # ours\n{POLICY}",
        "".join(f"  {line}\n" for line in POLICY.splitlines()),
        POLICY.replace("\n", "\r\n"),
        POLICY.rstrip(),
    ],
    ids=["empty-lines", "indented-comment", "all-indented", "of-windows", "no-last-newline"],
)
def test_however_a_policy_is_indented_its_meaning_arrives(text: str) -> None:
    (body,) = (body for body in rendered({"policy": text}) if body["metadata"]["name"] == "gpuslice-policy")

    assert yaml.safe_load(body["data"]["policy.yaml"]) == yaml.safe_load(POLICY)


@pytest.mark.parametrize(
    "path",
    ["simulate", "priorityClassName", "policy", "deviceClasses.extendedResourceName", "image.tag", "image.digest"],
)
def test_null_is_as_good_as_empty(path: str) -> None:
    """Helm takes a value away that is null, and `affinity=null` is in the documentation."""
    section, _, name = path.rpartition(".")
    null, empty = ({section: {name: value}} if section else {name: value} for value in (None, ""))

    assert rendered(null) == rendered(empty)


def test_what_is_switched_off_is_not_there() -> None:
    kinds = [body["kind"] for body in rendered(NOTHING)]

    assert kinds.count("DaemonSet") == 1
    assert "DeviceClass" not in kinds


@pytest.mark.parametrize(
    ("name", "offered"), [("", []), ("example.com/card", ["example.com/card", "example.com/mig-1g.18gb"])]
)
def test_nvidias_device_plugin_keeps_its_names_where_it_is_said(name: str, offered: list[str]) -> None:
    said = {"extendedResourceName": name, "migProfiles": ["1g.18gb"]}
    specs = [body["spec"] for body in rendered({"deviceClasses": said}) if "spec" in body]

    assert [spec["extendedResourceName"] for spec in specs if "extendedResourceName" in spec] == offered


def test_in_another_namespace_the_rights_and_the_admission_policy_are_of_its_account() -> None:
    bodies = rendered({}, "--namespace", "gpus")

    assert {body["metadata"].get("namespace", "gpus") for body in bodies} == {"gpus"}
    assert "gpuslice-system" not in json.dumps(bodies)
    (guard,) = (body for body in bodies if body["kind"] == "ValidatingAdmissionPolicy")
    assert "system:serviceaccount:gpus:gpuslice" in guard["spec"]["matchConditions"][0]["expression"]


def test_the_digest_of_an_image_needs_no_tag() -> None:
    digest = f"sha256:{'0' * 64}"
    images = [
        pod(DRIVER, {"image": {"repository": "a.b:5000/gpuslice", **more}})["spec"]["containers"][0]["image"]
        for more in ({}, {"digest": digest}, {"digest": digest, "tag": "1"})
    ]

    name = "a.b:5000/gpuslice"
    assert images == [f"{name}:{gpuslice.__version__}", f"{name}@{digest}", f"{name}:1@{digest}"]


def test_on_the_network_of_the_node_an_update_ends_the_old_pod_first() -> None:
    """Kubernetes makes each containerPort a port of the node, so a second pod could never be scheduled there."""
    spec, (step, driver) = pod(DRIVER, EVERYTHING)["spec"], containers(pod(DRIVER, EVERYTHING)["spec"])
    (body,) = (
        body for body in rendered(EVERYTHING) if body["metadata"]["name"] == DRIVER and body["kind"] == "DaemonSet"
    )

    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert body["spec"]["updateStrategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    assert "hostNetwork" not in pod(DRIVER, {})["spec"]
    for entry in (step, driver):
        environment = {variable["name"]: variable.get("value") for variable in entry["env"]}
        assert environment["KUBERNETES_SERVICE_HOST"] == "fd00::1"
        assert environment["KUBERNETES_SERVICE_PORT"] == "6443"


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [*spec.get("initContainers", ()), *spec["containers"]]


def test_each_flag_can_be_set_by_its_variable() -> None:
    driver, supervisor = (pod(name, EVERYTHING)["spec"] for name in (DRIVER, SUPERVISOR))

    assert as_read(driver).simulate_latency == "zero"
    assert as_read(supervisor).simulate_folder == Path("/var/lib/k0s/kubelet/plugins/gpuslice.dev/simulated")
    for spec in (driver, supervisor):
        for entry in containers(spec):
            names = [variable["name"] for variable in entry["env"]]
            assert len(names) == len(
                set(names)
            )  # Helm 4 applies on the server, which refuses a name that is there twice


def test_a_variable_of_a_secret_is_a_reference() -> None:
    reference = {"name": "HTTPS_PROXY", "valueFrom": {"secretKeyRef": {"name": "proxy", "key": "url"}}}

    assert reference in pod(DRIVER, {"extraEnv": [reference]})["spec"]["containers"][0]["env"]


def test_no_variable_that_the_chart_sets_can_be_set_twice() -> None:
    """The list of these names in the templates has each of them."""
    taken = (CHART / "templates/_pod.tpl").read_text(encoding="utf-8")
    own = {
        entry["name"] for values in (EVERYTHING["extraEnv"], EVERYTHING["supervisor"]["extraEnv"]) for entry in values
    }
    names = {
        entry["name"] for of in (DRIVER, SUPERVISOR) for entry in pod(of, EVERYTHING)["spec"]["containers"][0]["env"]
    }

    assert {name for name in names - own if f'"{name}" "' not in taken} == set()


def test_the_quota_of_a_priority_class_is_made_where_it_is_asked_for() -> None:
    quotas = [body for body in rendered(EVERYTHING) if body["kind"] == "ResourceQuota"]

    assert [quota["spec"]["scopeSelector"]["matchExpressions"] for quota in quotas] == [
        [{"scopeName": "PriorityClass", "operator": "In", "values": ["ours"]}]
    ]
    assert "ResourceQuota" not in {body["kind"] for body in rendered({})}


def test_the_step_before_the_driver_can_be_left_out() -> None:
    spec = pod(DRIVER, NOTHING)["spec"]

    assert "initContainers" not in spec
    assert not any("pod-resources" in volume.get("hostPath", {}).get("path", "") for volume in spec["volumes"])
