"""deploy/ without a cluster: schemas of every supported version, names that must agree, and examples that really work."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from driver import config
from driver.core import claims, pool
from driver.core.model import ClaimRef, ClaimUid
from driver.core.policy import Policy
from driver.core.pool import Features
from driver.demo import scheduler
from driver.demo.scheduler import Request
from driver.demo.slices import amount
from tests.rig import NODE, Rig

Body = Mapping[str, Any]
ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
FILES = sorted(DEPLOY.rglob("*.yaml"))
EXAMPLES = sorted(path for path in (DEPLOY / "examples").glob("*.yaml"))
DRIVER = config.DRIVER_NAME


def documents(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def only(kind: str, *paths: Path) -> dict[str, Any]:
    (found,) = (body for body in documents(*(paths or FILES)) if body["kind"] == kind)
    return found


def pod() -> dict[str, Any]:
    spec: dict[str, Any] = only("DaemonSet")["spec"]["template"]["spec"]
    return spec


# ---------------------------------------------------------------- schemas and names


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_is_what_the_api_server_accepts(path: Path, version: str) -> None:
    for body in documents(path):
        kubernetes_validate.validate(body, version, strict=True)


def test_the_daemonset_runs_as_the_account_that_has_the_rights() -> None:
    account = only("ServiceAccount")["metadata"]
    binding = only("ClusterRoleBinding")

    assert pod()["serviceAccountName"] == account["name"]
    assert only("DaemonSet")["metadata"]["namespace"] == account["namespace"]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
    ]
    assert binding["roleRef"]["name"] == only("ClusterRole")["metadata"]["name"]


def test_the_admission_policy_guards_the_account_that_the_daemonset_runs_as() -> None:
    """A policy for an account that nobody uses guards nothing, and nobody notices."""
    policy = only("ValidatingAdmissionPolicy")
    account = only("ServiceAccount")["metadata"]

    conditions = [condition["expression"] for condition in policy["spec"]["matchConditions"]]

    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert conditions == [f'request.userInfo.username == "{user}"']
    assert only("ValidatingAdmissionPolicyBinding")["spec"]["policyName"] == policy["metadata"]["name"]
    assert f"== '{DRIVER}'" in policy["spec"]["validations"][-1]["expression"]


def test_the_role_has_exactly_the_rights_that_the_driver_uses() -> None:
    calls = re.findall(r'_Call\(\s*"(\w+)", "(\w+)"', (ROOT / "driver/kube.py").read_text(encoding="utf-8"))
    used = {(verb, resource) for verb, resource in calls if resource != "version"}  # for everybody: system:discovery
    granted = {(v, r) for rule in only("ClusterRole")["rules"] for v in rule["verbs"] for r in rule["resources"]}

    # Beside list and watch, for a person who looks with the driver's own rights; the driver itself never gets one.
    assert granted == used | {("get", "resourceslices")}


def test_the_daemonset_sets_what_the_driver_reads() -> None:
    (container,) = pod()["containers"]
    names = {entry["name"] for entry in container["env"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    paths = {v["name"]: v["hostPath"]["path"] for v in pod()["volumes"] if "hostPath" in v}
    defaults = config.Config()

    assert names - {"NVIDIA_VISIBLE_DEVICES"} <= {name.upper() for name in defaults.__dataclass_fields__}
    assert mounts["plugin"] == paths["plugin"] == str(defaults.plugin_folder)
    assert mounts["registry"] == paths["registry"] == str(defaults.kubelet_registrar_directory_path)
    assert mounts["cdi"] == paths["cdi"] == str(defaults.cdi_root)
    assert container["ports"][0]["containerPort"] == 9510


def test_an_update_never_leaves_the_node_without_a_driver() -> None:
    strategy = only("DaemonSet")["spec"]["updateStrategy"]["rollingUpdate"]
    fields = {
        entry["name"]: entry["valueFrom"]["fieldRef"]["fieldPath"]
        for entry in pod()["containers"][0]["env"]
        if "valueFrom" in entry
    }

    assert strategy == {"maxSurge": 1, "maxUnavailable": 0}
    assert fields == {"NODE_NAME": "spec.nodeName", "POD_UID": "metadata.uid"}
    assert pod()["terminationGracePeriodSeconds"] > 20


def test_the_policy_that_is_shipped_is_the_default() -> None:
    text = only("ConfigMap")["data"]["policy.yaml"]

    assert Policy.parse(yaml.safe_load(text)) == Policy.default()


# ---------------------------------------------------------------- classes and examples

# Our selectors use a corner of CEL that reads as Python after three replacements; whatever else is in them is refused.
_CEL = (
    (re.compile(r"device\.attributes\['gpuslice\.dev'\]\.(\w+)"), r"attributes['\1']"),
    (re.compile(r"device\.capacity\['gpuslice\.dev'\]\.(\w+)\.compareTo\(quantity\('(\w+)'\)\)"), r"over('\1', '\2')"),
    (re.compile(r"device\.driver"), "driver"),
)
_KNOWN = re.compile(r"(attributes\['\w+'\]|over\('\w+', '\w+'\)|driver|'[\w.-]*'|==|>=|\[|\]|\bin\b|\band\b|0|\s)*")


def selected(expression: str) -> Callable[[Body], bool]:
    """A CEL selector as a function of one device of ours. KeyError where it names a key that the device lacks."""
    text = expression.replace("&&", " and ")
    for pattern, replacement in _CEL:
        text = pattern.sub(replacement, text)
    assert _KNOWN.fullmatch(text), f"this test cannot read {expression!r}"

    def check(device: Body) -> bool:
        def over(name: str, least: str) -> int:
            have, want = amount(device["capacity"][name]["value"]), amount(least)
            assert have is not None
            assert want is not None
            return int(have >= want) - int(have < want)

        attributes = {key: next(iter(value.values())) for key, value in device["attributes"].items()}
        return bool(eval(text, {"attributes": attributes, "driver": DRIVER, "over": over}))

    return check


def classes() -> dict[str, tuple[Callable[[Body], bool], ...]]:
    bodies = documents(DEPLOY / "deviceclasses.yaml")
    return {body["metadata"]["name"]: tuple(_selectors(body["spec"])) for body in bodies}


def _selectors(body: Body) -> Iterator[Callable[[Body], bool]]:
    for selector in body.get("selectors", ()):
        yield selected(selector["cel"]["expression"])


def slices(rig: Rig) -> list[dict[str, Any]]:
    features = Features(partitionable=True, consumable=True, taints=True)
    return [
        {
            "metadata": {"name": f"{number}-{planned.name}"},
            "spec": {
                "driver": DRIVER,
                "nodeName": NODE,
                "pool": {"name": planned.name, "generation": 1, "resourceSliceCount": len(planned.specs)},
                **spec,
            },
        }
        for planned in pool.resource_slices(rig.inventory, {}, driver=DRIVER, features=features)
        for number, spec in enumerate(planned.specs)
    ]


def request(body: Body) -> Request:
    """A request of a ResourceClaim, for the stand-in scheduler."""
    if "firstAvailable" in body:
        options = tuple(_request(option["name"], option) for option in body["firstAvailable"])
        return Request(name=body["name"], alternatives=options)
    return _request(body["name"], body["exactly"])


def _request(name: str, body: Body) -> Request:
    checks = (*classes()[body["deviceClassName"]], *_selectors(body))
    return Request(
        name=name,
        driver=DRIVER,
        where=lambda device: all(check(device) for check in checks),
        count=None if body.get("allocationMode") == "All" else body.get("count", 1),
        admin=body.get("adminAccess", False),
    )


@pytest.mark.parametrize("node", ["h100x2", "a30:mig+l4", "a100-40g:mig"])
def test_every_device_is_in_its_classes_and_breaks_no_selector(tmp_path: Path, node: str) -> None:
    known = classes()
    expected = {
        "gpu": {"gpu.gpuslice.dev"},
        "mig": {"mig.gpuslice.dev", "slice.gpuslice.dev"},
        "monitor": {"monitor.gpuslice.dev"},
    }

    for device in (d for body in slices(Rig(tmp_path, node)) for d in body["spec"].get("devices", ())):
        found = {name for name, checks in known.items() if all(check(device) for check in checks)}
        assert found == expected[device["attributes"]["type"]["string"]]


def test_pods_written_for_nvidias_device_plugin_get_a_whole_card() -> None:
    mapped = {
        body["spec"]["extendedResourceName"]: body["metadata"]["name"]
        for body in documents(DEPLOY / "deviceclasses.yaml")
        if "extendedResourceName" in body["spec"]
    }

    assert mapped == {"nvidia.com/gpu": "gpu.gpuslice.dev"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_scheduled_and_prepared_on_the_simulated_node(tmp_path: Path, path: Path) -> None:
    rig = Rig(tmp_path)
    templates = [body for body in documents(path) if body["kind"] == "ResourceClaimTemplate"]
    named = {entry["resourceClaimTemplateName"] for entry in only("Pod", path)["spec"].get("resourceClaims", ())}

    assert named == {template["metadata"]["name"] for template in templates}
    for template in templates:
        requests = [request(body) for body in template["spec"]["spec"]["devices"]["requests"]]
        allocation = scheduler.allocate(slices(rig), [], requests, node=NODE)
        assert allocation is not None
        ref = ClaimRef("default", path.stem, ClaimUid(path.stem))
        body = {"metadata": {"uid": ref.uid}, "status": {"allocation": allocation}}
        assert rig.prepare(claims.parse(body, ref, DRIVER)).devices
