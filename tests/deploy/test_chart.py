"""deploy/chart without a cluster: its values, and deploy/*.yaml as its result for the default values."""

import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpuslice
import pytest
import yaml
from gpuslice import config
from gpuslice.config import Config
from gpuslice.core.policy.rules import Policy
from gpuslice.errors import ConfigError

from hack.lib.cluster.versions import HELMS
from hack.lib.manifests import manifests as manifest_files
from tests.kit.chart import AGAIN, CHART, DEPLOY, DRIVER, SUPERVISOR, manifests, pod, rendered, run_module

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
    # A section may be missing after `helm upgrade --reuse-values`, and then it stands in parentheses.
    assert f".Values.{'.'.join(path)}" in templates or f"(.Values.{path[0]}).{'.'.join(path[1:])}" in templates


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
        # Of Helm's schema: a name, and what is there instead of what.
        ({"simulated": "h100"}, "at '': additional properties 'simulated' not allowed"),
        ({"image": {"name": "gpuslice"}}, "at '/image': additional properties 'name' not allowed"),
        ({"image": {"tag": 1.2}}, "at '/image/tag': got number, want string"),
        ({"http": {"port": "9510"}}, "at '/http/port': got string, want integer"),
        ({"supervisor": {"enabled": "no"}}, "at '/supervisor/enabled': got string, want boolean"),
        ({"logLevel": "verbose"}, "at '/logLevel': value must be one of 'debug', 'info', 'warning', 'error'"),
        ({"resources": {"request": {}}}, "at '/resources': additional properties 'request' not allowed"),
        ({"policy": {"kind": "Policy"}}, "at '/policy': got object, want string"),
        ({"hostNetwork": "yes"}, "at '/hostNetwork': got string, want boolean"),
        # Of the chart: what is wrong with the value, and the remedy.
        ({"image": None}, "image is null, so its values are missing; leave it out"),
        ({"http": None}, "http is null, so its values are missing; leave it out"),
        ({"supervisor": None}, "supervisor is null, so its values are missing; leave it out"),
        ({"deviceClasses": None}, "deviceClasses is null, so its values are missing; leave it out"),
        ({"http": {"port": None}}, "http.port is null and must be a port"),
        ({"image": {"repository": None}}, "image.repository is empty and must be a registry and a name"),
        ({"image": {"repository": "a.b/gpuslice:1"}}, 'which has a tag in it; write "1" as image.tag'),
        (
            {"image": {"repository": "a.b:5000/g@sha256:12"}},
            "has a digest in it; write the part after the @ as image.d",
        ),
        (
            {"image": {"repository": "https://a.b/gpuslice"}},
            "such as registry.example.com/team/gpuslice, without https",
        ),
        ({"image": {"tag": "1@sha256:12"}}, "must be a tag alone, such as 0.1.0; write a digest as image.digest"),
        ({"image": {"digest": "12"}}, 'image.digest is "12" and must be sha256: and 64 hexadecimal digits'),
        (
            {"kubeletRootDir": "/var/lib/kubelet/"},
            'kubeletRootDir is "/var/lib/kubelet/" and must be the whole path of a',
        ),
        ({"kubeletRootDir": "/"}, 'kubeletRootDir is "/" and must be the whole path of a folder'),
        ({"cdiRoot": "var/run/cdi"}, 'cdiRoot is "var/run/cdi" and must be the whole path of a folder on the nodes'),
        ({"nvidiaDriverRoot": "~"}, 'nvidiaDriverRoot is "~" and must be the whole path of a folder on the nodes'),
        (
            {"apiServer": {"host": "10.0.0.1:6443/"}},
            "must be an IP address or a DNS name; write the port as apiServer.port",
        ),
        (
            {"deviceClasses": {"migProfiles": ["1g.10gb+me"]}},
            'migProfiles has "1g.10gb+me", but such a name has no suff',
        ),
        (
            {"deviceClasses": {"extendedResourceName": "gpu"}},
            'is "gpu" and must have a domain, such as example.com/gpu',
        ),
        ({"simulate": "cards.yaml"}, 'simulate is "cards.yaml" and must be the cards themselves, such as h100x2'),
        ({"extraEnv": [{"name": "LOG_LEVEL"}]}, "extraEnv has LOG_LEVEL, which is set already; set the value logLevel"),
        ({"extraEnv": 2 * [{"name": "A"}]}, "extraEnv has A, which is set already; keep one of the two"),
        (
            {"supervisor": {"extraEnv": [{"name": "MPS_ROOT"}]}},
            "supervisor.extraEnv has MPS_ROOT, which is set already",
        ),
        ({"priorityQuota": True, "priorityClassName": ""}, "priorityQuota needs priorityClassName"),
        (
            {"policy": "gpus: ["},
            "policy: the document must be YAML with the keys apiVersion, kind, default, gpus, but: ",
        ),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("major", HELMS)
def test_a_wrong_value_is_refused_by_a_sentence(tmp_path: Path, wrong: dict[str, Any], named: str, major: str) -> None:
    (tmp_path / "values").write_text(json.dumps(wrong), encoding="utf-8")

    made = manifests(tmp_path, "--values", str(tmp_path / "values"), "--helm", major)

    assert made.returncode == 1
    assert named in made.stderr
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("name", [*yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))])
def test_a_value_that_is_null_is_as_if_left_out_or_refused_by_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "values").write_text(json.dumps({name: None}), encoding="utf-8")

    made = manifests(tmp_path, "--values", str(tmp_path / "values"))

    if made.returncode:
        assert f"{name} is " in made.stderr
    elif name not in ("affinity", "tolerations", "resources", "priorityClassName", "logLevel"):  # null is "none" there
        assert rendered({name: None}) == rendered({})


@pytest.mark.parametrize("name", ["supervisor", "deviceClasses", "preflight"])
def test_enabled_is_true_if_it_is_null(name: str) -> None:
    assert rendered({name: {"enabled": None}}) == rendered({})


@pytest.mark.parametrize("name", ["true", "1", "system-node-critical"])
def test_the_name_of_a_priority_class_stays_a_text(name: str) -> None:
    assert pod(DRIVER, {"priorityClassName": name})["spec"]["priorityClassName"] == name
    assert pod(SUPERVISOR, {"priorityClassName": name})["spec"]["priorityClassName"] == name


OTHER_FORMATS = [
    {"version": "v1", "mig-configs": {"all-1g.10gb": []}},
    [{"devices": "all", "mig-enabled": True, "mig-devices": {"1g.10gb": 7}}],
    {"version": "v1", "sharing": {"timeSlicing": {"resources": []}}},
    {"version": "v1", "flags": {"migStrategy": "mixed"}},
    {"apiVersion": "v1", "kind": "ConfigMap", "data": {"any": "version: v1\nsharing: {timeSlicing: {}}\n"}},
    {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "version: v1\nmig-configs: {}\n"}},
    {"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": "b"}},
    {"apiVersion": "v1", "kind": "ConfigMap", "data": {"policy.yaml": "kind: Policy\n"}},
    {"dev": "version: v1\nsharing: {}\n", "prod": "version: v1\nsharing: {}\n"},
    {"apiVersion": "nvidia.com/v1", "kind": "ClusterPolicy", "spec": {}},
    {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "SliceConfig"},
]
NO_POLICIES = [
    {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "defaults": {}},
    {"apiVersion": "gpuslice.dev/v1", "kind": "Policy"},
    {"kind": "Policy"},
    {"apiVersion": "gpuslice.dev/v1alpha1"},
    {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Pod"},
]


@pytest.mark.parametrize("body", [*OTHER_FORMATS, *NO_POLICIES], ids=lambda body: json.dumps(body)[:60])
def test_a_file_that_is_no_policy_is_refused_at_install_in_the_words_of_the_driver(
    tmp_path: Path, body: object
) -> None:
    text = yaml.safe_dump(body, sort_keys=False)
    (tmp_path / "values").write_text(json.dumps({"policy": text}), encoding="utf-8")
    with pytest.raises(ConfigError) as refused:
        Policy.parse(yaml.safe_load(text))

    made = manifests(tmp_path, "--values", str(tmp_path / "values"))

    assert made.returncode == 1
    assert f": {refused.value}\n" in made.stderr


def test_namespace_default_is_refused_with_the_remedy(tmp_path: Path) -> None:
    made = manifests(tmp_path, "--namespace", "default")

    assert made.returncode == 1
    assert (
        "privileged, and namespace default should not allow that; make a namespace with kubectl apply -f deploy/"
        in (made.stderr)
    )
