"""deploy/ without a cluster: schemas of every supported version, names that must agree, and examples that really work."""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from gpuslice import config
from gpuslice.core import claims
from gpuslice.core.inventory import Inventory
from gpuslice.core.model import INTERVALS, Claim, ClaimRef, ClaimUid
from gpuslice.core.policy.rules import Policy
from gpuslice.core.pools import pool
from gpuslice.core.pools.pool import Features
from gpuslice.mps import control
from gpuslice.standin import scheduler
from gpuslice.standin.scheduler import Request

from tests.kit.builders import a_policy
from tests.kit.cel import selected
from tests.kit.rig import NODE, Rig
from tests.plugin.test_mps_shares import a_supervisor

Body = Mapping[str, Any]
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
FILES = sorted((*DEPLOY.glob("*.yaml"), *(DEPLOY / "examples").glob("*.yaml")))
EXAMPLES = sorted(path for path in (DEPLOY / "examples").glob("*.yaml"))
DRIVER = config.DRIVER_NAME


def documents(*paths: Path) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def only(kind: str, name: str = "") -> dict[str, Any]:
    """The one body of this kind, and of this name where there are more."""
    (found,) = (body for body in documents(*FILES) if body["kind"] == kind and name in ("", body["metadata"]["name"]))
    return found


def pod(daemonset: str = "gpuslice") -> dict[str, Any]:
    spec: dict[str, Any] = only("DaemonSet", daemonset)["spec"]["template"]["spec"]
    return spec


def mounts(spec: Body) -> dict[str, dict[str, Any]]:
    """What the only container of a pod mounts, by the path in it, with the path of the node (none of its own volumes)."""
    (container,) = spec["containers"]
    paths = {volume["name"]: volume.get("hostPath", {}).get("path") for volume in spec["volumes"]}
    return {entry["mountPath"]: {**entry, "host": paths[entry["name"]]} for entry in container["volumeMounts"]}


def names_in_environment(spec: Body) -> set[str]:
    return {entry["name"] for entry in spec["containers"][0]["env"]}


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
    account = only("ServiceAccount")["metadata"]
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
    account = only("ServiceAccount")["metadata"]

    conditions = [condition["expression"] for condition in policy["spec"]["matchConditions"]]

    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert conditions == [f'request.userInfo.username == "{user}"']
    assert only("ValidatingAdmissionPolicyBinding")["spec"]["policyName"] == policy["metadata"]["name"]
    assert f"== '{DRIVER}'" in policy["spec"]["validations"][-1]["expression"]


def test_the_role_has_exactly_the_rights_that_the_driver_uses() -> None:
    calls = re.findall(r'\bCall\(\s*"(\w+)", "(\w+)"', (ROOT / "driver/gpuslice/kube.py").read_text(encoding="utf-8"))
    used = {(verb, resource) for verb, resource in calls if resource != "version"}  # for everybody: system:discovery
    granted = {(v, r) for rule in only("ClusterRole")["rules"] for v in rule["verbs"] for r in rule["resources"]}

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
    assert fields == {"NODE_NAME": "spec.nodeName", "POD_UID": "metadata.uid"}
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


def test_the_supervisor_has_no_rights_at_the_api_server() -> None:
    spec = pod(SUPERVISOR)

    assert spec["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in spec
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


# ---------------------------------------------------------------- classes and examples


@functools.cache
def classes() -> dict[str, tuple[Callable[[Body], bool], ...]]:
    bodies = documents(DEPLOY / "deviceclasses.yaml")
    return {body["metadata"]["name"]: tuple(_selectors(body["spec"])) for body in bodies}


def is_in(class_: str, device: Body) -> bool:
    return all(check(device) for check in classes()[class_])


def _selectors(body: Body) -> Iterator[Callable[[Body], bool]]:
    for selector in body.get("selectors", ()):
        yield selected(selector["cel"]["expression"])


ALL = Features(partitionable=True, consumable=True, taints=True)  # Kubernetes 1.36 and later


def slices(inventory: Inventory, features: Features = ALL) -> list[dict[str, Any]]:
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
        for planned in pool.resource_slices(inventory, {}, driver=DRIVER, features=features)
        for number, spec in enumerate(planned.specs)
    ]


def devices(inventory: Inventory, features: Features = ALL) -> Iterator[dict[str, Any]]:
    for body in slices(inventory, features):
        yield from body["spec"].get("devices", ())


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
        capacity=body.get("capacity", {}).get("requests", {}),
        admin=body.get("adminAccess", False),
    )


CLASSES = {
    "gpu": {"gpu.gpuslice.dev"},
    "mig": {"mig.gpuslice.dev", "slice.gpuslice.dev"},
    "mps": {"mps.gpuslice.dev", "slice.gpuslice.dev"},
    "timeslice": {"timeslice.gpuslice.dev", "slice.gpuslice.dev"},
    "monitor": {"monitor.gpuslice.dev"},
}
PROFILES = {name for name in classes() if name.startswith("mig-")}  # one for each, for `limits` only


def assert_in_its_classes(found: Iterable[Body]) -> set[str]:
    """The types of these devices."""
    types = set()
    for device in found:
        type_ = device["attributes"]["type"]["string"]
        assert {name for name in classes().keys() - PROFILES if is_in(name, device)} == CLASSES[type_]
        profile = device["attributes"]["profile"]["string"] if type_ == "mig" else ""
        assert {name for name in PROFILES if is_in(name, device)} == {f"mig-{profile}.{DRIVER}"} & PROFILES
        types.add(type_)
    return types


@pytest.mark.parametrize("node", ["h100x2", "a30:mig+l4", "a100-40g:mig"])
def test_every_device_is_in_its_classes_and_breaks_no_selector(tmp_path: Path, node: str) -> None:
    assert assert_in_its_classes(devices(Rig(tmp_path, node).inventory)) == CLASSES.keys()


def test_shared_partitions_are_in_the_classes_of_shares_and_not_in_that_of_partitions(tmp_path: Path) -> None:
    policy = a_policy(modes=["mig"], sharedPartitions=["mps", "timeslice"])
    inventory = Inventory.of(Rig(tmp_path).gpus, policy, NODE)

    assert assert_in_its_classes(devices(inventory)) == {"mig", "mps", "timeslice", "monitor"}


@pytest.mark.parametrize("mode", ["mps", "timeslice"])
def test_fixed_parts_of_a_card_are_in_the_classes_of_shares(tmp_path: Path, mode: str) -> None:
    older = Features(partitionable=False, consumable=False, taints=False)
    inventory = Inventory.of(Rig(tmp_path).gpus, a_policy(static={mode: 4}), NODE, static=True)

    assert assert_in_its_classes(devices(inventory, older)) == {mode, "monitor"}


def test_pods_written_for_nvidias_device_plugin_get_what_its_names_say() -> None:
    mapped = {
        body["spec"]["extendedResourceName"]: body["metadata"]["name"]
        for body in documents(DEPLOY / "deviceclasses.yaml")
        if "extendedResourceName" in body["spec"]
    }

    profiles = {name.removesuffix(f".{DRIVER}") for name in PROFILES}
    assert "mig-1g.10gb" in profiles
    assert mapped == {
        "nvidia.com/gpu": f"gpu.{DRIVER}",
        **{f"nvidia.com/{name}": f"{name}.{DRIVER}" for name in profiles},
    }


def test_every_class_of_a_profile_finds_partitions_of_an_h100(tmp_path: Path) -> None:
    partitions = list(devices(Rig(tmp_path, "h100").inventory))

    assert {name for name in PROFILES if not any(is_in(name, device) for device in partitions)} == set()


@dataclass(frozen=True, slots=True)
class Example:
    """The claims of an example as the control plane makes them, and who of its pods names them."""

    path: Path

    def bodies(self, *kinds: str) -> list[dict[str, Any]]:
        return [body for body in documents(self.path) if body["kind"] in kinds]

    def claims(self) -> Iterator[dict[str, Any]]:
        """`devices` of every claim: of those made from a template, one for each pod that names it."""
        for pods, spec in self.pods():
            for entry in spec.get("resourceClaims", ()):
                if "resourceClaimTemplateName" in entry:
                    template = self._named("ResourceClaimTemplate", entry["resourceClaimTemplateName"])
                    yield from pods * [template["spec"]["spec"]["devices"]]
        for claim in self.bodies("ResourceClaim"):
            yield claim["spec"]["devices"]

    def pods(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Every pod spec, with the number of pods that it makes."""
        for body in self.bodies("Pod"):
            yield 1, body["spec"]
        for body in self.bodies("Deployment", "DaemonSet"):  # of which a node has one
            yield body["spec"].get("replicas", 1), body["spec"]["template"]["spec"]

    def _named(self, kind: str, name: str) -> dict[str, Any]:
        (found,) = (body for body in self.bodies(kind) if body["metadata"]["name"] == name)
        return found


class Node:
    """A simulated node beside the stand-in scheduler, and the claims that it has placed there."""

    def __init__(self, folder: Path) -> None:
        self.rig = Rig(folder)
        self._slices = slices(self.rig.inventory)
        self._claims: list[dict[str, Any]] = []

    def allocate(self, body: Body) -> Claim:
        """One more claim with these `devices`, as the driver reads it."""
        requests = [request(entry) for entry in body["requests"]]
        configs = [{"source": "FromClaim", **entry} for entry in body.get("config", ())]
        allocation = scheduler.allocate(self._slices, self._claims, requests, node=NODE, configs=configs)
        assert allocation is not None
        uid = ClaimUid(f"claim-{len(self._claims)}")
        self._claims.append({"metadata": {"uid": uid}, "status": {"allocation": allocation}})
        return claims.parse(self._claims[-1], ClaimRef("default", str(uid), uid), DRIVER)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_scheduled_and_prepared_on_the_simulated_node(short: Path, path: Path) -> None:
    node, supervisor = Node(short), a_supervisor(short)
    supervisor.open()
    try:
        for body in Example(path).claims():
            assert node.rig.prepare(node.allocate(body)).devices
    finally:
        supervisor.close()
        node.rig.nvml.close()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_pods_of_an_example_use_each_claim_of_it_and_nothing_else(path: Path) -> None:
    example = Example(path)
    named = {
        (key, name)
        for _, spec in example.pods()
        for entry in spec.get("resourceClaims", ())
        for key, name in entry.items()
        if key != "name"
    }
    keys = {"ResourceClaimTemplate": "resourceClaimTemplateName", "ResourceClaim": "resourceClaimName"}

    assert named == {(keys[body["kind"]], body["metadata"]["name"]) for body in example.bodies(*keys)}
    for _, spec in example.pods():
        used = {claim["name"] for c in spec["containers"] for claim in c["resources"].get("claims", ())}
        assert used == {entry["name"] for entry in spec.get("resourceClaims", ())}


# ---------------------------------------------------------------- what the examples say of themselves


def example(name: str) -> list[dict[str, Any]]:
    return list(Example(DEPLOY / f"examples/{name}.yaml").claims())


def test_the_shares_that_are_asked_for_are_what_the_claims_are_charged(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (mps,), (turns,) = (node.allocate(*example(name)).allocations for name in ("mps-share", "time-slice-share"))

    assert (mps.device.device, mps.consumed["memory"], mps.consumed["smPercent"]) == ("mps", 9 << 30, 25)
    assert (turns.device.device, turns.consumed["memory"], turns.consumed["shares"]) == ("timeslice", 9 << 30, 1)


def test_nine_gibibytes_of_anything_are_a_partition_or_a_share_of_that_size(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (partition,) = node.allocate(*example("any-share-by-memory")).allocations

    assert partition.device.device.startswith("mig-1g-")
    assert partition.consumed == {}

    shared = Node(tmp_path / "shared")
    shared.allocate(*example("mps-share"))  # on the first card
    (share,) = shared.allocate(*example("any-share-by-memory")).allocations

    assert share.device.device == "mps"
    assert share.consumed["memory"] == 9 << 30


def test_four_claims_with_a_quarter_of_the_multiprocessors_each_fill_a_card(tmp_path: Path) -> None:
    node = Node(tmp_path)
    pools = [node.allocate(*example("mps-share")).allocations[0].device.pool for _ in range(5)]

    assert len(set(pools[:4])) == 1
    assert pools[4] != pools[0]


def test_seven_replicas_are_on_one_card(tmp_path: Path) -> None:
    node = Node(tmp_path)
    found = [node.allocate(body).allocations[0].device for body in example("seven-on-one-card")]

    assert len(set(found)) == 7
    assert len({device.pool for device in found}) == 1


def test_the_interval_is_set_on_the_card_of_the_claim(tmp_path: Path) -> None:
    node = Node(tmp_path)
    node.rig.prepare(node.allocate(*example("interval")))

    levels = [node.rig.nvml.time_slice(gpu.uuid) for gpu in node.rig.gpus]
    assert levels == [INTERVALS.index("long"), INTERVALS.index("default")]
