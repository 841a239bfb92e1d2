"""The cluster from outside: create it, find it, end it.

No file says which cluster runs. The cluster's processes hold a lock on the work folder. The kernel releases the lock when
the last of these processes has ended, for whatever reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from hack.lib.cluster import installed, machine, network
from hack.lib.cluster.binaries import Binaries, ensure_cni, ensure_helm, missing_for_install
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import CGROUP, REPOSITORY, Facts, Place, Ports, empty, work_folder
from hack.lib.cluster.lock import TAKEN, check_owner, locked, owned
from hack.lib.cluster.processes import TIMEOUT_S
from hack.lib.cluster.ready import Readiness

_WAIT_S = 30.0
_GLANCE_S = 0.05  # pause of a poll, because the thing sends no event
NONE = "there is no cluster; hack/cluster up starts one"
Say = Callable[[str], None]


def wanted(version: str, **choices: Any) -> Facts:
    """The facts of a new cluster, with new secrets and free ports. `choices` are further fields of `Facts`."""
    tokens = {"admin": secrets.token_hex(16), "kubelet": secrets.token_hex(16)}
    return Facts(version=version, tokens=tokens, ports=Ports.free(), **choices)


def up(facts: Facts, say: Say) -> None:
    """Start this cluster and return when it serves. After a failure or Ctrl-C nothing is left."""
    machine.check()
    machine.check_gpus(facts.gpus)
    if current() is not None:
        raise PlaygroundError(TAKEN)
    Binaries(facts.version).ensure()
    if facts.installed:
        ensure_helm()
        ensure_cni()
    place = Place(work_folder())
    with owned(place.root) as lock:
        try:
            _clear(place.root)
            place.logs.mkdir()
            facts.write(place.facts)
            network.ensure()
            if facts.installed:
                network.ensure_bridge()
                say("the driver's image")
                installed.make_image(place)
            _start(place, lock, say)
        except BaseException:
            _end(place)
            raise


def check(version: str) -> None:
    """PlaygroundError with the first reason that stops `up`, or that would make it build first."""
    machine.check()
    if current() is not None:
        raise PlaygroundError(TAKEN)
    missing = [*Binaries(version).missing(), *missing_for_install()]
    if missing:
        raise PlaygroundError(f"{missing[0]} is not built; run hack/cluster build (about ten minutes the first time)")


def down() -> bool:
    """End the cluster and remove its files. False if there is none."""
    place = Place(work_folder())
    if not place.root.exists():
        return False
    check_owner(place.root)
    _end(place)
    return True


def current() -> Facts | None:
    """The cluster that serves, or None."""
    place = Place(work_folder())
    if not place.root.exists() or not locked(place.root):
        return None
    with contextlib.suppress(FileNotFoundError):
        return Facts.read(place.facts)
    return None


def wait() -> None:
    """Return when the cluster has ended."""
    outer = _outer(Place(work_folder()))
    if outer:
        handle = os.pidfd_open(outer)
        try:
            select.select([handle], [], [])
        finally:
            os.close(handle)


def processes() -> dict[str, int]:
    """Process ids of the running parts, as this machine counts them."""
    place = Place(work_folder())
    here = _counted_inside(_first(place))
    return {name: here[pid] for name, pid in _noted(place).items() if pid in here}


def _noted(place: Place) -> dict[str, int]:
    """All parts with the process ids that process 1 knows; 0 of a part that has ended."""
    with contextlib.suppress(FileNotFoundError):
        noted: dict[str, int] = json.loads(place.pids.read_text())
        return noted
    return {}


# ---------------------------------------------------------------- one part


def stop(part: str, number: signal.Signals = signal.SIGKILL) -> None:
    """End a part and keep it down: by SIGKILL, as in a crash, or by SIGTERM, as in an update."""
    place, _ = _part(part)
    (place.stopped / part).touch()
    _kill(processes().get(part, 0), number)


def start(part: str) -> None:
    """Start a part again. Return when it serves."""
    place, facts = _part(part)
    (place.stopped / part).unlink(missing_ok=True)
    _wake(place)
    ready = Readiness(place, facts)
    _await(lambda: part in processes() and ready.of(part), f"{part} serves; see {place.logs / part}.log")


def reboot() -> None:
    """Restart the node, as far as processes can. Return when its kubelet and its driver serve."""
    facts = _served()
    if not facts.kubelet:
        raise PlaygroundError(
            "this cluster has only a control plane and no node to reboot; start one with hack/cluster up, without "
            "--control-plane"
        )
    place = Place(work_folder())
    place.reboot.touch()
    _wake(place)
    ready = Readiness(place, facts)
    parts = ("kubelet", "driver") if facts.processes else ("kubelet",)
    _await(lambda: not place.reboot.exists() and all(map(ready.of, parts)), f"the node is back; see {place.logs}")


def upgrade(version: str) -> None:
    """Change the release of the control plane and the kubelet, one part after the other, in Kubernetes' order.

    Containers and the driver run on. etcd and containerd keep their release.
    """
    facts, place = _served(), Place(work_folder())
    Binaries(version).ensure()
    written = place.facts.with_suffix(".new")
    replace(facts, version=version).write(written)
    written.rename(place.facts)
    parts = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", *(("kubelet",) if facts.kubelet else ()))
    for part in parts:
        # With clients that watch, an API server needs a minute after SIGTERM (seen with 1.35.4).
        stop(part, signal.SIGKILL if part == "kube-apiserver" else signal.SIGTERM)
        start(part)


def _part(name: str) -> tuple[Place, Facts]:
    facts, place = _served(), Place(work_folder())
    known = sorted(_noted(place))
    if name not in known:
        raise PlaygroundError(f"the cluster has no part {name!r}; it has {', '.join(known)}")
    return place, facts


def _served() -> Facts:
    facts = current()
    if facts is None:
        raise PlaygroundError(NONE)
    return facts


def _wake(place: Place) -> None:
    """Make process 1 check its children. It does so at each SIGCHLD."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(_first(place) or os.getpid(), signal.SIGCHLD)


def _await(done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + TIMEOUT_S
    while not done():
        if time.monotonic() > end:
            raise PlaygroundError(f"it took longer than {TIMEOUT_S:.0f} s until {what}")
        time.sleep(_GLANCE_S)


# ---------------------------------------------------------------- start and end


def _start(place: Place, lock: int, say: Say) -> None:
    """Run process 1 in its own namespaces until it reports that everything is ready."""
    apart = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]
    errors = place.root / "log" / "init.log"
    with errors.open("wb") as log:
        process = subprocess.Popen(
            [*apart, sys.executable, "-m", "hack.lib.cluster.init", str(place.root)],
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            pass_fds=[lock],
            start_new_session=True,  # only this process gets Ctrl-C, and ends the cluster in order
        )
    try:
        place.init.write_text(str(process.pid))
        reason = _listen(process, say)
    except BaseException:
        process.kill()  # and process 1 with it: --kill-child
        process.wait()
        raise
    if reason is not None:
        last = errors.read_text().strip()[-600:] or "it was killed"
        raise PlaygroundError(reason or f"the cluster ended while it started: {last}")


def _listen(process: subprocess.Popen[str], say: Say) -> str | None:
    """Print the lines of process 1. Returns None when everything is ready, otherwise the last reason that it printed."""
    assert process.stdout is not None
    failed: list[str] = []
    for line in process.stdout:
        if line == "ready\n":
            process.returncode = 0  # it stays, and nothing waits for it
            return None
        if failed or line.startswith("failed "):  # the lines after it belong to the reason
            failed.append(line)
        else:
            say(line.rstrip())
    process.wait()
    return "".join(failed).removeprefix("failed ").rstrip()


def _end(place: Place) -> None:
    first, outer = _first(place), _outer(place)
    for pid in (first, outer):
        _kill(pid)
    _remove_cgroups()
    network.remove(bridge=_has_bridge(place))
    shutil.rmtree(place.root, ignore_errors=True)
    if place.root.exists():
        raise PlaygroundError(
            f"{place.root} could not be removed; unmount what is mounted below it, and remove the folder"
        )


def _has_bridge(place: Place) -> bool:
    """Another cluster, below another TMPDIR, may have the bridge."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return Facts.read(place.facts).installed
    return False


def _kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """End a process and wait for it. Process 1 of a namespace ends after all other processes there."""
    with contextlib.suppress(ProcessLookupError):
        if not pid:
            return
        handle = os.pidfd_open(pid)
        try:
            signal.pidfd_send_signal(handle, number)
            if not select.select([handle], [], [], _WAIT_S)[0]:
                raise PlaygroundError(
                    f"process {pid} did not end within {_WAIT_S:.0f} s after {number.name}; look at the state of the "
                    "process with ps"
                )
        finally:
            os.close(handle)


def _outer(place: Place) -> int:
    """The `unshare` that waits for process 1; 0 if it is gone."""
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        pid = int(place.init.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if str(place.root).encode() in words:  # otherwise another process has this number now
            return pid
    return 0


def _first(place: Place) -> int:
    """Process 1 of the cluster; 0 if it is gone."""
    outer = _outer(place)
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        children = Path(f"/proc/{outer}/task/{outer}/children").read_text().split() if outer else []
        return int(children[0]) if children else 0
    return 0


def _counted_inside(first: int) -> dict[int, int]:
    """Process id inside the cluster → process id on this machine."""
    found: dict[int, int] = {}
    try:
        namespace = Path(f"/proc/{first}/ns/pid").stat().st_ino
    except FileNotFoundError:
        return found
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or may not be read
            if (folder / "ns" / "pid").stat().st_ino == namespace:
                line = next(s for s in (folder / "status").read_text().splitlines() if s.startswith("NSpid:"))
                found[int(line.split()[-1])] = int(folder.name)
    return found


def _remove_cgroups() -> None:
    """Remove the cgroups that containers leave, in each hierarchy. A cgroup with processes is not ours and stays."""
    top = Path("/sys/fs/cgroup")
    for tree in (top / CGROUP, *top.glob(f"*/{CGROUP}")):
        for folder, _, _ in os.walk(tree, topdown=False):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()


def _clear(root: Path) -> None:
    """Remove what is left of a cluster that ended with the machine."""
    _remove_cgroups()
    empty(root)
