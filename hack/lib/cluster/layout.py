"""Where the files of the running cluster are: one folder. Its ports are on the loopback address."""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

NODE = "node1"
REAL = "real"  # the cards of this machine, instead of simulated cards
LOOPBACK = "127.0.0.1"
GATEWAY = "198.51.100.1"  # of the pods, on a bridge of this machine: TEST-NET-2 (RFC 5737), which no machine has
PODS = "198.51.100.0/24"
CGROUP = "k8s.io"  # where containerd puts containers if the kubelet makes no cgroups
REPOSITORY = Path(__file__).parents[3]


def work_folder() -> Path:
    return Path(tempfile.gettempdir()) / "gpuslice-cluster"


def empty(folder: Path) -> None:
    """Remove everything in a folder, if it exists."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@dataclass(frozen=True, slots=True)
class Place:
    """The work folder's tree. The names are short, because many are sockets, and a socket's path has at most 107 bytes."""

    root: Path

    @property
    def facts(self) -> Path:
        """The facts of the running cluster, for `status`, `kubectl` and `down`."""
        return self.root / "cluster.json"

    @property
    def init(self) -> Path:
        """The process id of the process that waits for process 1."""
        return self.root / "init"

    @property
    def pids(self) -> Path:
        """Process ids of the parts, as the cluster's own namespace counts them."""
        return self.root / "pids.json"

    @property
    def stopped(self) -> Path:
        """Folder with one file for each part that a command stopped."""
        return self.root / "held"

    @property
    def reboot(self) -> Path:
        """Exists from the request for a reboot until the reboot is done."""
        return self.root / "reboot"

    @property
    def boot_id(self) -> Path:
        """The cluster's processes read this file as /proc/sys/kernel/random/boot_id."""
        return self.node / "boot_id"

    @property
    def simulated(self) -> Path:
        """The state of the simulated cards, at the driver's default path below this root."""
        return self.plugins / "gpuslice.dev" / "simulated"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    @property
    def admin(self) -> Path:
        return self.root / "admin.conf"

    @property
    def driver(self) -> Path:
        return self.root / "driver.conf"

    @property
    def api(self) -> Path:
        return self.root / "api"

    @property
    def certificate(self) -> Path:
        """The certificate that the API server makes and signs by itself."""
        return self.api / "apiserver.crt"

    @property
    def key(self) -> Path:
        """The key that signs service-account tokens."""
        return self.root / "sa.key"

    @property
    def kubelet(self) -> Path:
        return self.root / "kubelet"

    @property
    def plugins(self) -> Path:
        return self.kubelet / "plugins"

    @property
    def registry(self) -> Path:
        return self.kubelet / "plugins_registry"

    @property
    def containerd(self) -> Path:
        return self.root / "containerd"

    @property
    def socket(self) -> Path:
        return self.root / "containerd.sock"

    @property
    def cdi(self) -> Path:
        return self.root / "cdi"

    @property
    def cni(self) -> Path:
        return self.root / "cni"

    @property
    def helm(self) -> Path:
        """Helm's own folders."""
        return self.root / "helm"

    @property
    def image(self) -> Path:
        """The archive of the driver's image, as `hack/image` makes it, until containerd has it."""
        return self.root / "image" / "gpuslice.tar"

    @property
    def mps(self) -> Path:
        return self.root / "mps"

    @property
    def node(self) -> Path:
        """Files and folders that replace those of this machine, for the cluster's processes only."""
        return self.root / "node"


@dataclass(frozen=True, slots=True)
class Ports:
    etcd: int
    peer: int
    api: int
    controllers: int
    scheduler: int
    kubelet: int
    driver: int

    @classmethod
    def free(cls) -> Ports:
        """Ports that are free now. All are held until all are known, so that no two are equal."""
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in cls.__dataclass_fields__]
            for one in sockets:
                one.bind((LOOPBACK, 0))
            return cls(*(one.getsockname()[1] for one in sockets))


@dataclass(frozen=True, slots=True)
class Facts:
    """One running cluster, as it was requested."""

    version: str
    gpus: str  # "" for none, so no driver starts; REAL; or a value of `--simulate`
    tokens: dict[str, str]
    ports: Ports
    kubelet: bool = True  # False: only the control plane; its nodes are objects without machines
    driver_root: str = "/"  # root of NVIDIA's driver, for real cards
    cdi_hook: str = ""  # NVIDIA's nvidia-cdi-hook, if it is not in its usual place
    policy: str = ""  # policy file
    programs: tuple[str, ...] = ()  # programs of this machine that containers get too
    installed: bool = False  # the driver runs in pods, from our image and our chart; otherwise as two processes

    @property
    def processes(self) -> bool:
        """Whether driver and supervisor are parts of the cluster, as processes."""
        return bool(self.gpus) and not self.installed

    @property
    def address(self) -> str:
        """Where the API server listens. Pods cannot reach the loopback address."""
        return GATEWAY if self.installed else LOOPBACK

    def environment(self) -> dict[str, str]:
        """The environment for a client of the cluster: no cluster of the developer, and no proxy before ours."""
        ours = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"}
        direct = [os.environ.get(name, "") for name in ("NO_PROXY", "no_proxy")]
        return ours | {"NO_PROXY": ",".join([*filter(None, direct), GATEWAY, LOOPBACK])}

    def write(self, path: Path) -> None:
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Facts:
        values = json.loads(path.read_text())
        programs = tuple(values["programs"])
        return cls(**{**values, "ports": Ports(**values["ports"]), "programs": programs})
