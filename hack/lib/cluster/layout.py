"""Where everything of the running cluster lies: one folder, and ports of the loopback address."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

NODE = "node1"
REAL = "real"  # the cards of this machine, in place of simulated ones
LOOPBACK = "127.0.0.1"
CGROUP = "k8s.io"  # where containerd puts the containers of a kubelet that makes no cgroups itself
REPOSITORY = Path(__file__).parents[3]


def work_folder() -> Path:
    return Path(tempfile.gettempdir()) / "gpuslice-cluster"


def empty(folder: Path) -> None:
    """Remove everything in a folder that is there."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@dataclass(frozen=True, slots=True)
class Place:
    """The work folder's tree. Names are short: many are sockets, whose paths have 107 bytes."""

    root: Path

    @property
    def facts(self) -> Path:
        """What was started, for `status`, `kubectl` and `down`."""
        return self.root / "cluster.json"

    @property
    def init(self) -> Path:
        """Holds the process id of what waits for process 1."""
        return self.root / "init"

    @property
    def pids(self) -> Path:
        """Process ids of the parts, as they are counted inside."""
        return self.root / "pids.json"

    @property
    def stopped(self) -> Path:
        """Folder with one file for each part that was stopped by command."""
        return self.root / "held"

    @property
    def reboot(self) -> Path:
        """Exists from the request for a reboot until the reboot is done."""
        return self.root / "reboot"

    @property
    def boot_id(self) -> Path:
        """What the cluster's processes find as /proc/sys/kernel/random/boot_id."""
        return self.node / "boot_id"

    @property
    def simulated(self) -> Path:
        """The state of the simulated cards, where the driver keeps it by default."""
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
        """The certificate that the API server makes and signs itself."""
        return self.api / "apiserver.crt"

    @property
    def key(self) -> Path:
        """Signs service-account tokens."""
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
    def mps(self) -> Path:
        return self.root / "mps"

    @property
    def node(self) -> Path:
        """What takes the place of files and folders of this machine, for the cluster's processes only."""
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
        """Ports nobody listens on now. All are held until all are known, so that they differ."""
        with ExitStack() as held:
            sockets = [held.enter_context(socket.socket()) for _ in cls.__dataclass_fields__]
            for one in sockets:
                one.bind((LOOPBACK, 0))
            return cls(*(one.getsockname()[1] for one in sockets))


@dataclass(frozen=True, slots=True)
class Facts:
    """One running cluster, as it was asked for."""

    version: str
    gpus: str  # "" for none: no driver is started; REAL, or what `--simulate` takes
    tokens: dict[str, str]
    ports: Ports
    kubelet: bool = True  # False: the control plane alone, whose nodes are objects and nothing else
    driver_root: str = "/"  # of NVIDIA's driver, where the cards are real
    cdi_hook: str = ""  # NVIDIA's nvidia-cdi-hook, where it is not in its usual place
    policy: str = ""  # a file
    programs: tuple[str, ...] = ()  # of this machine, that containers have too

    def write(self, path: Path) -> None:
        path.touch(mode=0o600)
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Facts:
        values = json.loads(path.read_text())
        programs = tuple(values["programs"])
        return cls(**{**values, "ports": Ports(**values["ports"]), "programs": programs})
