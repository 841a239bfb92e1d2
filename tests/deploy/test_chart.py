"""deploy/chart without a cluster: its results for many values, and deploy/*.yaml as its result for the default values.

hack/manifests starts Helm, which renders the chart.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpuslice
import kubernetes_validate
import pytest
import yaml
from gpuslice import config
from gpuslice.config import Config
from gpuslice.core.policy.rules import Policy

from hack.lib.cluster.binaries import helm
from hack.lib.cluster.versions import HELMS
from hack.lib.manifests import manifests as manifest_files

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
AGAIN = "deploy/*.yaml is made from deploy/chart: change it there, and run hack/manifests"
DRIVER, SUPERVISOR = "gpuslice", "gpuslice-mps-supervisor"

POLICY = "apiVersion: gpuslice.dev/v1alpha1\nkind: Policy  # ours\ndefault:\n  modes: [mig]  # nothing else\n"
EVERYTHING: dict[str, Any] = {
    "image": {"repository": "example/gpuslice", "tag": "1", "pullPolicy": "Always", "pullSecrets": [{"name": "login"}]},
    "nvidiaDriverRoot": "/run/nvidia/driver",
    "kubeletRootDir": "/var/lib/k0s/kubelet",
    "cdiRoot": "/etc/cdi",
    "policy": POLICY,
    "logLevel": "debug",
    "http": {"port": 8080},
    "resources": {"limits": {"memory": "256Mi"}},
    "supervisor": {"resources": {"requests": {"cpu": 1, "memory": "1Gi"}}},
    "deviceClasses": {"extendedResourceName": "example.com/card"},
    "nodeSelector": {"pool": "cards"},
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "tolerations": [{"operator": "Exists"}],
    "priorityClassName": "ours",
    "simulate": "a100-40gx2:mig+l4",
}
NOTHING: dict[str, Any] = {
    "resources": {"requests": None},
    "supervisor": {"enabled": False},
    "deviceClasses": {"enabled": False},
    "affinity": None,
    "tolerations": [],
    "priorityClassName": "",
}


def manifests(out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    if not all(helm(major).exists() for major in HELMS):  # here, so that all tests share one line of the summary
        pytest.skip("deploy/chart is not rendered: no Helm (hack/cluster build --only helm)")
    return run_module("hack.lib.manifests", "--out", str(out), *flags)


def run_module(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", name, *arguments]
    more = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, cwd=ROOT, env=more, capture_output=True, text=True, timeout=30)


@functools.cache
def _rendered(values: str, *flags: str) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        out, file = Path(folder), Path(folder) / "values"
        file.write_text(values, encoding="utf-8")
        made = manifests(out, "--values", str(file), *flags)
        assert made.returncode == 0, made.stderr
        return {path.name: path.read_text(encoding="utf-8") for path in manifest_files(out)}


def rendered(values: dict[str, Any], *flags: str) -> list[dict[str, Any]]:
    """Every body that the chart makes of these values."""
    return [body for text in _rendered(json.dumps(values), *flags).values() for body in yaml.safe_load_all(text)]


def pod(daemonset: str, values: dict[str, Any]) -> dict[str, Any]:
    """Template of its pods."""
    (found,) = (
        body for body in rendered(values) if body["kind"] == "DaemonSet" and body["metadata"]["name"] == daemonset
    )
    template: dict[str, Any] = found["spec"]["template"]
    return template


def as_read(spec: dict[str, Any]) -> Config:
    """The settings of the process in this pod, read by the driver's own code."""
    environment = {entry["name"]: entry["value"] for entry in spec["containers"][0]["env"] if "value" in entry}
    return config.read(argparse.Namespace(), environment)


def mounts(spec: dict[str, Any]) -> dict[Path, Path]:
    """Folder of the node by its path in the container."""
    paths = {volume["name"]: volume["hostPath"]["path"] for volume in spec["volumes"] if "hostPath" in volume}
    return {
        Path(entry["mountPath"]): Path(paths[entry["name"]])
        for entry in spec["containers"][0]["volumeMounts"]
        if entry["name"] in paths
    }


# ---------------------------------------------------------------- one source


def test_neither_the_chart_nor_the_manifests_were_changed_without_the_other() -> None:
    lines = (CHART / "manifests.sha256").read_text(encoding="utf-8").splitlines()
    noted = {name: digest for digest, name in (line.split("  ") for line in lines)}
    files = [path for path in CHART.rglob("*") if path.is_file() and path.suffix != ".sha256"]

    found = {
        str(path.relative_to(DEPLOY)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (*files, *manifest_files(DEPLOY))
    }

    assert found == noted, AGAIN


@pytest.mark.parametrize("major", HELMS)
def test_the_manifests_are_what_the_chart_renders(tmp_path: Path, major: str) -> None:
    made = manifests(tmp_path, "--helm", major)

    assert made.returncode == 0, made.stderr
    kept = {path.relative_to(DEPLOY): path.read_text(encoding="utf-8") for path in manifest_files(DEPLOY)}
    del kept[Path("namespace.yaml")]  # there before Helm is
    found = {path.relative_to(tmp_path): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.yaml")}
    assert found == kept, AGAIN


def test_the_manifests_of_deploy_are_never_made_with_other_values(tmp_path: Path) -> None:
    made = manifests(DEPLOY, "--namespace", "another")

    assert made.returncode == 2
    assert "name another folder with --out" in made.stderr


def test_the_chart_is_of_the_version_of_the_driver() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))

    assert chart["version"] == chart["appVersion"] == gpuslice.__version__


def test_without_helm_the_remedy_is_named(tmp_path: Path) -> None:
    made = run_module("hack.lib.manifests", "--out", str(tmp_path), XDG_CACHE_HOME=str(tmp_path))

    assert made.returncode == 1
    assert made.stderr == (
        f"hack/manifests: Helm is not built: there is no {tmp_path}/gpuslice/cluster/helm-{HELMS['3']}/helm; run hack/cluster "
        "build --only helm\n"
    )


def test_without_go_helm_is_not_built_and_the_remedy_is_named(tmp_path: Path) -> None:
    made = run_module("hack.lib.cluster", "build", "--only", "helm", XDG_CACHE_HOME=str(tmp_path), PATH=str(tmp_path))

    assert made.returncode == 1
    assert made.stderr == (
        f"hack/cluster: building Helm {HELMS['3']} needs Go 1.26 or later, but there is no go on PATH; install Go "
        "(go.dev/dl) or add it to PATH\n"
    )


# ---------------------------------------------------------------- values.yaml


def leaves(schema: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """Paths of the values, as the schema knows them."""
    for name, found in schema["properties"].items():
        if "properties" in found and name != "affinity":
            yield from leaves(found, *above, name)
        elif name != "global":
            yield *above, name


SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
LEAVES = sorted(leaves(SCHEMA))


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_every_value_has_a_default_and_a_comment_and_is_used(path: tuple[str, ...]) -> None:
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    templates = "".join(file.read_text(encoding="utf-8") for file in (CHART / "templates").iterdir())
    section = text[text.index(f"\n{path[0]}:") :] if len(path) > 1 else text
    indent = "  " * (len(path) - 1)

    functools.reduce(lambda body, key: body[key], path, yaml.safe_load(text))  # KeyError: has none
    assert re.search(rf"^({indent}#.*\n{indent}{path[-1]}:|{indent}{path[-1]}:.*#)", section, re.MULTILINE)
    assert f".Values.{'.'.join(path)}" in templates


def test_the_defaults_hold_no_value_that_the_schema_does_not_know() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    sections = {path[0] for path in LEAVES if len(path) > 1}

    found = {(key, inner) for key in sections for inner in values[key]} | {(key,) for key in values.keys() - sections}

    assert found == set(LEAVES)


def test_the_defaults_are_those_of_the_driver() -> None:
    values, defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8")), Config()

    assert values["nvidiaDriverRoot"] == str(defaults.nvidia_driver_root)
    assert Path(values["kubeletRootDir"], "plugins") == defaults.kubelet_plugins_directory_path
    assert values["cdiRoot"] == str(defaults.cdi_root)
    assert SCHEMA["properties"]["logLevel"]["enum"] == list(config.LEVELS)
    assert values["logLevel"] == defaults.log_level


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"simulated": "h100"}, "'simulated' not allowed"),
        ({"image": {"name": "gpuslice"}}, "'/image'"),
        ({"image": {"tag": 1.2}}, "'/image/tag'"),
        ({"http": {"port": "9510"}}, "'/http/port'"),
        ({"supervisor": {"enabled": "no"}}, "'/supervisor/enabled'"),
        ({"kubeletRootDir": "/var/lib/kubelet/"}, "'/kubeletRootDir'"),
        ({"cdiRoot": "var/run/cdi"}, "'/cdiRoot'"),
        ({"logLevel": "verbose"}, "'/logLevel'"),
        ({"resources": {"request": {}}}, "'/resources'"),
        ({"deviceClasses": {"migProfiles": ["1g.10gb+me"]}}, "'/deviceClasses/migProfiles/0'"),
        ({"simulate": "cards.yaml"}, "'/simulate'"),
        ({"policy": "gpus: ["}, "policy is not a YAML document"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_by_its_name(tmp_path: Path, wrong: dict[str, Any], named: str) -> None:
    (tmp_path / "values").write_text(json.dumps(wrong), encoding="utf-8")

    made = manifests(tmp_path, "--values", str(tmp_path / "values"))

    assert made.returncode == 1
    assert named in made.stderr
    assert not list(tmp_path.glob("*.yaml"))


# ---------------------------------------------------------------- what becomes of them


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
