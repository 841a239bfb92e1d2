"""Process 1 of the cluster's own namespaces: it prepares the node, starts every part, and restarts parts that end.

The cluster has its own process namespace and mount namespace. So one SIGKILL of this process ends all containers and
shims and removes their mounts. Files that kubelet and containerd write outside their folders never reach the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from hack.lib.cluster import image, installed, parts, reboot, software
from hack.lib.cluster.binaries import Binaries
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import NODE, REAL, Facts, Place
from hack.lib.cluster.processes import TIMEOUT_S, Processes
from hack.lib.cluster.ready import Readiness

_CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")


class Init:
    def __init__(self, place: Place, facts: Facts) -> None:
        self._place, self._facts = place, facts
        self._binaries = Binaries(facts.version)
        self._commands = parts.commands(place, facts, self._binaries)
        self._ready = Readiness(place, facts)
        self.processes = Processes(place, self._binaries.runtime, facts.environment())

    def start(self) -> None:
        if not self._facts.kubelet:
            self._start_control_plane()
            return
        for name in ("etcd", "containerd", "kube-apiserver"):
            self._spawn(name)
        _tell("the container image")
        self.processes.until("containerd", self._place.socket.exists, "containerd's socket was there")
        self._import_image()
        _tell("the API server")
        self.processes.until("kube-apiserver", self._ready.api, "the API server was ready")
        for name in ("kube-controller-manager", "kube-scheduler", "kubelet"):
            self._spawn(name)
        _tell("the node")
        kubectl = software.Kubectl(self._binaries.kube, self._place.admin)
        self.processes.until("kubelet", self._ready.node, "the node was ready")
        kubectl("wait", "--for=create", "serviceaccount/default", f"--timeout={TIMEOUT_S:.0f}s")
        if self._facts.installed:
            _tell("the driver, by helm install")
            installed.install(self._place, self._facts, kubectl)
        elif self._facts.gpus:
            self._start_driver(kubectl)

    def _start_control_plane(self) -> None:
        """All parts except those of a node."""
        for name in ("etcd", "kube-apiserver"):
            self._spawn(name)
        _tell("the API server")
        self.processes.until("kube-apiserver", self._ready.api, "the API server was ready")
        for name in ("kube-controller-manager", "kube-scheduler"):
            self._spawn(name)
        kubectl = software.Kubectl(self._binaries.kube, self._place.admin)
        kubectl("wait", "--for=create", "serviceaccount/default", f"--timeout={TIMEOUT_S:.0f}s")

    def keep(self) -> None:
        """Run for ever. Restart parts that end, and the whole node when a reboot is requested."""
        while True:
            if self._place.reboot.exists():
                self._reboot()
            self._follow_version()
            self.processes.restart_ended()

    def _follow_version(self) -> None:
        """After an upgrade, start parts again from the programs of the new release."""
        facts = Facts.read(self._place.facts)
        if facts.version != self._facts.version:
            self._facts, self._binaries = facts, Binaries(facts.version)
            self._commands = parts.commands(self._place, facts, self._binaries)
            self.processes.replace(self._commands)

    def _reboot(self) -> None:
        self.processes.end_all_but(_CONTROL_PLANE)
        reboot.forget(self._place, self._facts)
        for name in ("containerd", "kubelet", *(("mps-supervisor", "driver") if self._facts.processes else ())):
            self.processes.start(name)
        self._place.reboot.unlink()

    def _start_driver(self, kubectl: software.Kubectl) -> None:
        _tell("the driver")
        software.install(kubectl)
        token = software.node_token(kubectl)
        self._place.driver.touch(mode=0o600)
        self._place.driver.write_text(parts.kubeconfig(self._place, self._facts, token))
        self.processes.spawn("mps-supervisor", parts.supervisor(self._place, self._facts))
        self.processes.spawn("driver", parts.driver(self._place, self._facts))
        self.processes.until("driver", self._ready.driver, "the driver was ready")

    def _spawn(self, name: str) -> None:
        self.processes.spawn(name, self._commands[name])

    def _import_image(self) -> None:
        busybox = software.busybox()
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        archive = self._place.root / "image.tar"
        image.write(archive, busybox, applets, self._facts.programs, simulated=self._facts.gpus != REAL)
        ctr = [str(self._binaries.runtime / "ctr"), "--address", str(self._place.socket), "--namespace", "k8s.io"]
        for one in (archive, *([self._place.image] if self._facts.installed else [])):
            software.call([*ctr, "images", "import", str(one)])
            one.unlink()


def _tell(text: str) -> None:
    print(text, flush=True)


def lay_out(place: Place) -> None:
    """Give this namespace its own /run, /var/log and similar folders.

    All mounts are shared in it, as systemd makes them on a node: containers with mount propagation need that. Nothing
    reaches the machine, because its mounts have no peer here.
    """
    _mount("--make-rshared", "/")
    for folder in (
        place.logs,
        place.node,
        place.api,
        place.plugins,
        place.registry,
        place.cdi,
        place.mps,
        place.stopped,
    ):
        folder.mkdir(parents=True, exist_ok=True)
    reboot.new_boot(place)
    _mount("--bind", str(place.boot_id), "/proc/sys/kernel/random/boot_id")
    hosts = place.node / "hosts"
    hosts.write_text(f"127.0.0.1 localhost {NODE}\n")
    _mount("--bind", str(hosts), "/etc/hosts")
    _mount("-t", "tmpfs", "-o", "mode=755", "run", "/run")
    _mount("--bind", str(place.logs), "/var/log")
    upper, work = place.node / "lib", place.node / "lib.work"
    upper.mkdir()
    work.mkdir()
    _mount("-t", "overlay", "-o", f"lowerdir=/var/lib,upperdir={upper},workdir={work}", "overlay", "/var/lib")
    for name, value in parts.SYSCTLS.items():
        ours = place.node / name.replace("/", ".")
        ours.write_text(value)
        if Path("/proc/sys", name).exists():
            _mount("--bind", str(ours), f"/proc/sys/{name}")
    _mount("--bind", str(place.kubelet), str(place.kubelet))


def _mount(*arguments: str) -> None:
    software.call(["mount", *arguments])


def main() -> None:
    place = Place(Path(sys.argv[1]))
    facts = Facts.read(place.facts)
    try:
        lay_out(place)
        parts.write_files(place, facts, str(software.busybox()))
        software.call(["openssl", "genrsa", "-out", str(place.key), "2048"])
        init = Init(place, facts)
        init.start()
    except PlaygroundError as e:
        _tell(f"failed {e}")
        sys.exit(1)
    _tell("ready")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # from now on nothing reads the pipe
        os.dup2(nothing, number)
    init.keep()


if __name__ == "__main__":
    main()
