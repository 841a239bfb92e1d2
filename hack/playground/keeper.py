"""Process 1 of the cluster's own namespaces: it lays out the node, starts every part and starts again what ends.

The cluster has a process and a mount namespace of its own. So one SIGKILL of this process ends containers, shims and all,
their mounts go with them, and what the kubelet and containerd write outside of their folders never reaches the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import image
import parts
import software
from binaries import Binaries
from errors import PlaygroundError
from layout import NODE, REPOSITORY, Facts, Place

_PATIENCE_S = 120.0
_GLANCE_S = 0.05  # between two looks at something that sends no event
_PAUSE_S = 1.0  # before what has ended is started again


class Processes:
    """The parts that run, by name. Those that end are started again once `keep` is called."""

    def __init__(self, place: Place, programs: Path) -> None:
        """`programs` has containerd's, which look for each other on PATH."""
        self._place = place
        path = f"{programs}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        # Nothing of the developer's own cluster may leak into ours.
        self._environment = {**{k: v for k, v in os.environ.items() if k != "KUBECONFIG"}, "PATH": path}
        self._commands: dict[str, parts.Command] = {}
        self._pids: dict[str, int] = {}
        self._ended: dict[str, int] = {}
        self._wake, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def spawn(self, name: str, command: parts.Command) -> None:
        self._commands[name] = command
        with self.log(name).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=REPOSITORY, env=self._environment
            )
        self._pids[name] = process.pid
        process.returncode = 0  # it is ours to wait for, not its object's
        self._note()

    def until(self, name: str, ready: Callable[[], bool], what: str) -> None:
        """Return when `ready`. PlaygroundError where any part ends before, or `name` takes too long."""
        end = time.monotonic() + _PATIENCE_S
        while not ready():
            self._reap()
            for part, status in self._ended.items():
                raise PlaygroundError(f"{part} ended (status {status}) before {what}; {self.last_words(part)}")
            if time.monotonic() > end:
                raise PlaygroundError(f"{what} took longer than {_PATIENCE_S:.0f} s; {self.last_words(name)}")
            self._rest(_GLANCE_S)

    def keep(self) -> None:
        """Start again whatever ends, for ever."""
        due: dict[str, float] = {}
        while True:
            self._reap()
            now = time.monotonic()
            due.update(dict.fromkeys(self._ended.keys() - due.keys(), now + _PAUSE_S))
            for name in [name for name, at in due.items() if at <= now]:
                del due[name], self._ended[name]
                self.spawn(name, self._commands[name])
            self._rest(min(due.values()) - now if due else None)

    def log(self, name: str) -> Path:
        return self._place.logs / f"{name}.log"

    def last_words(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()[-5:]
        return "its last words:\n" + "\n".join(f"  {line[:400]}" for line in lines)

    def _rest(self, seconds: float | None) -> None:
        """Until a child ends, or so long."""
        select.select([self._wake], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _reap(self) -> None:
        names = {pid: name for name, pid in self._pids.items()}
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] in names:
                    name = names[found[0]]
                    self._ended[name] = os.waitstatus_to_exitcode(found[1])
                    del self._pids[name]
                    self._note()

    def _note(self) -> None:
        written = self._place.pids.with_suffix(".new")
        written.write_text(json.dumps(self._pids))
        written.rename(self._place.pids)


class Keeper:
    def __init__(self, place: Place, facts: Facts) -> None:
        self._place, self._facts = place, facts
        self._binaries = Binaries(facts.version)
        self._commands = parts.commands(place, facts, self._binaries)
        self.processes = Processes(place, self._binaries.runtime)

    def start(self) -> None:
        for name in ("etcd", "containerd", "kube-apiserver"):
            self._spawn(name)
        _tell("the container image")
        self.processes.until("containerd", self._place.socket.exists, "containerd's socket was there")
        self._import_image()
        _tell("the API server")
        self.processes.until("kube-apiserver", self._api_is_ready, "the API server was ready")
        for name in ("kube-controller-manager", "kube-scheduler", "kubelet"):
            self._spawn(name)
        _tell("the node")
        kubectl = software.Kubectl(self._binaries.kube, self._place.admin)
        self.processes.until("kubelet", self._node_is_ready, "the node was ready")
        kubectl("wait", "--for=create", "serviceaccount/default", f"--timeout={_PATIENCE_S:.0f}s")
        if self._facts.gpus:
            self._start_driver(kubectl)

    def _start_driver(self, kubectl: software.Kubectl) -> None:
        _tell("the driver")
        software.install(kubectl)
        token = software.node_token(kubectl)
        self._place.driver.touch(mode=0o600)
        self._place.driver.write_text(parts.kubeconfig(self._place, self._facts, token))
        self.processes.spawn("mps-supervisor", parts.supervisor(self._place, self._facts))
        self.processes.spawn("driver", parts.driver(self._place, self._facts))
        self.processes.until("driver", self._driver_is_ready, "the driver was ready")

    def _spawn(self, name: str) -> None:
        self.processes.spawn(name, self._commands[name])

    def _import_image(self) -> None:
        busybox = software.busybox()
        applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
        archive = self._place.root / "image.tar"
        image.write(archive, busybox, applets)
        ctr = [str(self._binaries.runtime / "ctr"), "--address", str(self._place.socket), "--namespace", "k8s.io"]
        software.call([*ctr, "images", "import", str(archive)])
        archive.unlink()

    def _api_is_ready(self) -> bool:
        return self._place.certificate.exists() and self._ask_api("/readyz") is not None

    def _node_is_ready(self) -> bool:
        node = json.loads(self._ask_api(f"/api/v1/nodes/{NODE}") or "{}")
        conditions = node.get("status", {}).get("conditions", ())
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def _driver_is_ready(self) -> bool:
        return _ask(urllib.request.Request(f"http://{parts.LOOPBACK}:{self._facts.ports.driver}/readyz")) is not None

    def _ask_api(self, path: str) -> bytes | None:
        url = f"https://{parts.LOOPBACK}:{self._facts.ports.api}{path}"
        who = {"Authorization": f"Bearer {self._facts.tokens['admin']}"}
        trust = ssl.create_default_context(cafile=str(self._place.certificate))
        return _ask(urllib.request.Request(url, headers=who), trust)


def _ask(request: urllib.request.Request, trust: ssl.SSLContext | None = None) -> bytes | None:
    """What a server of ours answers, past any proxy; None where it does not, or refuses."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust))
    try:
        with direct.open(request, timeout=5) as response:
            return bytes(response.read())
    except OSError:
        return None


def _tell(text: str) -> None:
    print(text, flush=True)


def lay_out(place: Place) -> None:
    """Make this namespace's /run, /var/log and the like the cluster's own."""
    for folder in (place.logs, place.node, place.api, place.plugins, place.registry, place.cdi, place.mps):
        folder.mkdir(parents=True, exist_ok=True)
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
    _mount("--make-shared", str(place.kubelet))


def _mount(*arguments: str) -> None:
    software.call(["mount", *arguments])


def main() -> None:
    place = Place(Path(sys.argv[1]))
    facts = Facts.read(place.facts)
    try:
        lay_out(place)
        parts.write_files(place, facts, str(software.busybox()))
        software.call(["openssl", "genrsa", "-out", str(place.key), "2048"])
        keeper = Keeper(place, facts)
        keeper.start()
    except PlaygroundError as e:
        _tell(f"failed {e}")
        sys.exit(1)
    _tell("ready")
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # nobody reads the pipe from now on
        os.dup2(nothing, number)
    keeper.processes.keep()


if __name__ == "__main__":
    main()
