"""The parts of the cluster: their command lines and their files. Comments explain the flags that need an explanation."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from hack.lib.cluster import cni
from hack.lib.cluster.binaries import Binaries
from hack.lib.cluster.layout import LOOPBACK, NODE, REAL, Facts, Place

Command = list[str]

# The kubelet sets these for the whole machine. It must find them set already, in files of the cluster.
SYSCTLS = {
    "vm/overcommit_memory": "1",
    "vm/panic_on_oom": "0",
    "kernel/panic": "10",
    "kernel/panic_on_oops": "1",
    "kernel/keys/root_maxkeys": "1000000",
    "kernel/keys/root_maxbytes": "25000000",
}
PAUSE = "gpuslice.dev/pause:1"


# ---------------------------------------------------------------- command lines


def commands(place: Place, facts: Facts, binaries: Binaries) -> dict[str, Command]:
    """Every part of the control plane and of the node, by name."""
    kube = str(binaries.kube)
    return {
        "etcd": [kube, "etcd", *_etcd(place, facts)],
        "containerd": [str(binaries.runtime / "containerd"), "--config", str(place.root / "containerd.toml")],
        "kube-apiserver": [kube, "kube-apiserver", *_api_server(place, facts)],
        "kube-controller-manager": [kube, "kube-controller-manager", *_controllers(place, facts)],
        "kube-scheduler": [kube, "kube-scheduler", *_scheduler(place, facts)],
        "kubelet": [kube, "kubelet", *_kubelet(place)],
    }


def driver(place: Place, facts: Facts) -> Command:
    return [
        *(sys.executable, "-m", "gpuslice", "run", *_cards(facts), "--node-name", NODE),
        *(("--policy", facts.policy) if facts.policy else ()),
        *("--kubeconfig", str(place.driver)),
        *("--kubelet-plugins-directory-path", str(place.plugins)),
        *("--kubelet-registrar-directory-path", str(place.registry)),
        *("--cdi-root", str(place.cdi), "--mps-root", str(place.mps)),
        *("--http-endpoint", f"{LOOPBACK}:{facts.ports.driver}"),
    ]


def supervisor(place: Place, facts: Facts) -> Command:
    return [
        *(sys.executable, "-m", "gpuslice", "mps-supervisor", *_cards(facts, supervisor=True)),
        *("--mps-root", str(place.mps), "--kubelet-plugins-directory-path", str(place.plugins)),
    ]


def _cards(facts: Facts, *, supervisor: bool = False) -> Command:
    """The flags for the cards that the driver's processes serve."""
    if facts.gpus != REAL:
        return ["--simulate", facts.gpus]
    seen = ["--driver-root-ctr-path", facts.driver_root]
    if supervisor:
        return seen
    hook = ["--nvidia-cdi-hook-path", facts.cdi_hook] if facts.cdi_hook else []
    return [*seen, "--nvidia-driver-root", facts.driver_root, *hook]


def _etcd(place: Place, facts: Facts) -> Command:
    client, peer = (f"http://{LOOPBACK}:{port}" for port in (facts.ports.etcd, facts.ports.peer))
    return [
        f"--data-dir={place.root / 'etcd'}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",  # no data has to survive a crash of the machine
        "--log-level=warn",
    ]


def _api_server(place: Place, facts: Facts) -> Command:
    return [
        f"--etcd-servers=http://{LOOPBACK}:{facts.ports.etcd}",
        f"--bind-address={facts.address}",
        f"--secure-port={facts.ports.api}",
        f"--cert-dir={place.api}",
        "--endpoint-reconciler-type=none",  # the API server refuses a loopback address as an endpoint
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={place.key}",
        f"--service-account-signing-key-file={place.key}",
        f"--token-auth-file={place.root / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--service-cluster-ip-range=10.0.0.0/24",
        "--allow-privileged",
        "--kubelet-preferred-address-types=Hostname",  # NODE is in the node's /etc/hosts, so logs and exec work
    ]


def _client(place: Place) -> Command:
    return [f"--kubeconfig={place.admin}", "--leader-elect=false", f"--bind-address={LOOPBACK}"]


# For measurements, so that the API server is the limit. The default (50 a second) limits the scheduler to 14 pods a second.
_UNHURRIED = ["--kube-api-qps=2000", "--kube-api-burst=2000"]


def _controllers(place: Place, facts: Facts) -> Command:
    # Without a kubelet, nodes send no heartbeat. So the controller must not judge nodes by missing heartbeats.
    judges = "--controllers=*,-node-lifecycle-controller,-taint-eviction-controller,-device-taint-eviction-controller"
    return [
        *_client(place),
        f"--secure-port={facts.ports.controllers}",
        f"--service-account-private-key-file={place.key}",
        f"--root-ca-file={place.certificate}",
        *([] if facts.kubelet else [judges, *_UNHURRIED]),
    ]


def _scheduler(place: Place, facts: Facts) -> Command:
    asked = f"={place.admin}"  # the API server decides who may read the profile (/debug/pprof)
    return [
        *_client(place),
        f"--secure-port={facts.ports.scheduler}",
        f"--authentication-kubeconfig{asked}",
        f"--authorization-kubeconfig{asked}",
        *([] if facts.kubelet else _UNHURRIED),
    ]


def _kubelet(place: Place) -> Command:
    return [
        f"--config={place.root / 'kubelet.json'}",
        f"--kubeconfig={place.root / 'kubelet.conf'}",
        f"--root-dir={place.kubelet}",
        f"--cert-dir={place.kubelet / 'pki'}",
        f"--hostname-override={NODE}",
    ]


# ---------------------------------------------------------------- files


def write_files(place: Place, facts: Facts, busybox: str) -> None:
    """Write every configuration file that needs no running part."""
    tokens = facts.tokens
    _secret(
        place,
        "tokens.csv",
        f'{tokens["admin"]},admin,admin,"system:masters"\n'
        f'{tokens["kubelet"]},system:node:{NODE},kubelet,"system:nodes"\n',
    )
    _secret(place, "admin.conf", kubeconfig(place, facts, tokens["admin"]))
    _secret(place, "kubelet.conf", kubeconfig(place, facts, tokens["kubelet"]))
    (place.root / "kubelet.json").write_text(json.dumps(_kubelet_config(place, facts)))
    (place.root / "containerd.toml").write_text(_containerd(place, facts))
    cni.write(place, facts, busybox)


def _secret(place: Place, name: str, text: str) -> None:
    path = place.root / name
    path.touch(mode=0o600)
    path.write_text(text)


def kubeconfig(place: Place, facts: Facts, token: str) -> str:
    server = {"server": f"https://{facts.address}:{facts.ports.api}", "certificate-authority": str(place.certificate)}
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "gpuslice", "cluster": server}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "gpuslice", "context": {"cluster": "gpuslice", "user": "user"}}],
            "current-context": "gpuslice",
        }
    )


def _kubelet_config(place: Place, facts: Facts) -> Mapping[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": LOOPBACK,
        "port": facts.ports.kubelet,
        "healthzPort": 0,
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "containerRuntimeEndpoint": f"unix://{place.socket}",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupsPerQOS": False,
        "enforceNodeAllocatable": [],
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "localStorageCapacityIsolation": False,
        "resolvConf": "",
        "clusterDNS": ["10.0.0.10"],  # no server is there, but without an address each pod has a warning
        "syncFrequency": "1s",
        # A full disk of a developer's machine must not evict a pod, and must not remove images that cannot be pulled again.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "podLogsDir": str(place.logs / "pods"),
        "volumePluginDir": str(place.kubelet / "volume-plugins"),
    }


def _containerd(place: Place, facts: Facts) -> str:
    return f"""\
version = 3
root = '{place.containerd / "root"}'
state = '{place.containerd / "state"}'
[grpc]
  address = '{place.socket}'
[ttrpc]
  address = '{place.socket}.ttrpc'
[plugins.'io.containerd.nri.v1.nri']
  disable = true
[plugins.'io.containerd.internal.v1.opt']
  path = '{place.containerd / "opt"}'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{PAUSE}'
[plugins.'io.containerd.cri.v1.runtime']
  enable_cdi = true
  cdi_spec_dirs = ['{place.cdi}']
  # Where we may not lower our own score, every sandbox would fail: "can't get final child's PID from pipe".
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins.'io.containerd.cri.v1.runtime'.cni]
    bin_dirs = ['{cni.programs(place, facts)}']
    conf_dir = '{place.cni / "conf"}'
    use_internal_loopback = true
"""
