"""`hack/cluster`: a real Kubernetes of one node on this machine, on request with our driver. See docs/cluster.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hack.lib.cluster import cluster, installed
from hack.lib.cluster.binaries import Binaries, ensure_cni, ensure_helm, helm
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import LOOPBACK, REAL, Facts, Place, work_folder
from hack.lib.cluster.versions import VERSIONS
from hack.lib.signals import interrupt_on

_ABOUT = """\
Run a real Kubernetes of one node on this machine: etcd, API server, scheduler, controller manager, kubelet, containerd.
The first start builds them from Go modules (ten minutes). Later starts take a few seconds and need no network. The command
needs root.

  hack/cluster up --gpus h100x8     start Kubernetes with the driver and eight simulated cards
  hack/cluster up --gpus h100x8 --install
                                    the same, with the driver in pods, from our image and by our chart
  hack/cluster up                   start Kubernetes without the driver
  hack/cluster kubectl get pods     run any kubectl command as the administrator
  hack/cluster status               list the parts that run
  hack/cluster stop kubelet         end one part; `start` runs it again, and `reboot` restarts the whole node
  hack/cluster down                 end the cluster and remove all of its files
"""

_TRY = """\
Try:
  hack/cluster kubectl get resourceslices                            what the node offers
  hack/cluster kubectl apply -f deploy/examples/mig-profile.yaml     a pod with a MIG partition (all examples work)
  hack/cluster kubectl get pods,resourceclaims
  hack/cluster kubectl logs mig-profile                              what the driver added to its container
"""
_TRY_PROCESS = """\
  {devices}
      a map of the cards, and which claims hold them
  tail -f {logs}/driver.log
  kill -9 $(hack/cluster status --pid driver)                        the driver starts again, and the claims are still there"""
_TRY_INSTALLED = f"""\
  hack/cluster kubectl exec -n {installed.NAMESPACE} ds/gpuslice -- python3 -m gpuslice devices
      a map of the cards, and which claims hold them
  hack/cluster kubectl logs -f -n {installed.NAMESPACE} ds/gpuslice
  hack/cluster helm list -n {installed.NAMESPACE}"""


def main() -> int:
    if sys.argv[1:2] == ["kubectl"]:
        return _kubectl(sys.argv[2:])
    if sys.argv[1:2] == ["helm"]:
        return _helm(sys.argv[2:])
    parsed = parser().parse_args()
    if parsed.command == "up":
        return _up(_facts(parsed), parsed.foreground)
    if parsed.command == "build":
        ensure_helm()
        if not parsed.only:
            ensure_cni()
            Binaries(parsed.version).ensure()
        return 0
    if parsed.command == "check":
        cluster.check(parsed.version)
        return 0
    if parsed.command == "status":
        return _status(parsed.json, parsed.pid)
    if parsed.command == "reboot":
        cluster.reboot()
        return 0
    if parsed.command == "upgrade":
        cluster.upgrade(parsed.version)
        return 0
    if parsed.command == "stop":
        cluster.stop(parsed.part, signal.SIGTERM if parsed.gently else signal.SIGKILL)
        return 0
    if parsed.command == "start":
        cluster.start(parsed.part)
        return 0
    _say("the cluster is removed" if cluster.down() else "there is no cluster")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hack/cluster",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, allow_abbrev=False)

    _add_flags_of_up(up := command("up", "start the cluster"))
    build = command("build", "build Helm and the programs of the cluster, and start nothing")
    build.add_argument("--only", choices=("helm",), help="build only this program, which takes two minutes")
    check = command("check", "list what `up` needs and cannot find; exit code 1 if something is missing")
    upgrade = command("upgrade", "run another release of Kubernetes; pods and the driver run on")
    for one in (up, build, check, upgrade):
        one.add_argument(
            "--version", choices=VERSIONS, default=VERSIONS[0], help=f"release of Kubernetes; default {VERSIONS[0]}"
        )
    _add_flags_of_parts(command)
    command("reboot", "restart the node: its processes, mounts and /run are lost, its disk stays")
    for name, program in (("kubectl", "kubectl"), ("helm", "Helm")):
        commands.add_parser(name, help=f"run any {program} command as the administrator", add_help=False)
    command("down", "end the cluster and remove all of its files")
    return parser


def _add_flags_of_up(up: argparse.ArgumentParser) -> None:
    node = up.add_mutually_exclusive_group()
    node.add_argument(
        "--gpus",
        default="",
        metavar="CARDS",
        help=f"cards to simulate (docs/simulator.md), or {REAL!r} for the cards of this machine; without it, no driver runs",
    )
    node.add_argument("--control-plane", action="store_true", help="start no kubelet; make the Node objects yourself")
    way = up.add_mutually_exclusive_group()
    way.add_argument(
        "--process", action="store_true", help="run the driver as a process beside the kubelet; the default"
    )
    way.add_argument(
        "--install", action="store_true", help="make the driver's image, and install it in pods by the chart"
    )
    up.add_argument("--driver-root", default="/", metavar="FOLDER", help="for real cards: root of the NVIDIA driver")
    up.add_argument("--cdi-hook", default="", metavar="FILE", help="for real cards: path of nvidia-cdi-hook")
    up.add_argument(
        "--policy", default="", metavar="FILE", help="policy file: what the cards may offer (docs/policy.md)"
    )
    up.add_argument(
        "--program", action="append", default=[], metavar="FILE", help="a program to add to the containers; repeatable"
    )
    up.add_argument("--foreground", action="store_true", help="stay until Ctrl-C, and then end the cluster")


def _add_flags_of_parts(command: Callable[[str, str], argparse.ArgumentParser]) -> None:
    status = command("status", "list the parts that run; exit code 1 if there is no cluster")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.add_argument("--pid", metavar="PART", help="print only the process id of this part")
    stop = command("stop", "end a part of the cluster, which then stays down")
    stop.add_argument(
        "--gently",
        action="store_true",
        help="end it by SIGTERM, as an update does; without this flag by SIGKILL, as a crash does",
    )
    start = command("start", "start a part again, and wait until it is ready")
    for one in (stop, start):
        one.add_argument("part", metavar="PART", help="name of the part, as `status` prints it")


def _facts(parsed: argparse.Namespace) -> Facts:
    if parsed.install and not parsed.gpus:
        raise PlaygroundError("--install needs cards for the driver; add --gpus h100x8, for example")
    return cluster.wanted(
        parsed.version,
        gpus=parsed.gpus,
        kubelet=not parsed.control_plane,
        driver_root=parsed.driver_root,
        cdi_hook=parsed.cdi_hook,
        policy=str(Path(parsed.policy).absolute()) if parsed.policy else "",
        programs=tuple(str(Path(program).absolute()) for program in parsed.program),
        installed=parsed.install,
    )


def _up(facts: Facts, foreground: bool) -> int:
    begun = time.monotonic()
    cluster.up(facts, _say)
    simulated = "real cards" if facts.gpus == REAL else f"{facts.gpus} simulated"
    cards = f" with {simulated}" if facts.gpus else ""
    _say(f"Kubernetes {facts.version}{cards} is up, {time.monotonic() - begun:.1f} s")
    place = Place(work_folder())
    print(f"\n  export KUBECONFIG={place.admin}")
    if facts.gpus:
        rest = _TRY_INSTALLED if facts.installed else _TRY_PROCESS
        print(_TRY + rest.format(devices=_devices(place, facts), logs=place.logs))
    if not foreground:
        print("  hack/cluster down", flush=True)
        return 0
    print("\nPress Ctrl-C to end the cluster.", flush=True)
    try:
        cluster.wait()
    finally:
        cluster.down()
    return 0


def _devices(place: Place, facts: Facts) -> str:
    if facts.gpus == REAL:
        root = facts.driver_root
        cards = f"--driver-root-ctr-path {root} --nvidia-driver-root {root}"
    else:
        cards = f"--simulate {facts.gpus}"
    return f".venv/bin/gpuslice devices {cards} --kubelet-plugins-directory-path {place.plugins}"


def _status(as_json: bool, part: str | None) -> int:
    facts = cluster.current()
    processes = cluster.processes() if facts else {}
    place = Place(work_folder())
    if as_json:
        known = _known(facts, place) if facts else {}
        print(json.dumps({**known, "processes": processes}))
    elif part is not None:
        if part not in processes:
            raise PlaygroundError(f"no part {part!r} runs; these parts run: {', '.join(sorted(processes)) or 'none'}")
        print(processes[part])
    elif facts is None:
        _say(cluster.NONE)
    else:
        print(f"Kubernetes {facts.version}, {facts.gpus or 'no'} cards, in {place.root}")
        for name, pid in processes.items():
            print(f"  {name:24} {pid:>8} {_resident_mb(pid):>6} MB")
    return 0 if facts else 1


def _known(facts: Facts, place: Place) -> dict[str, object]:
    scheduler = f"https://{LOOPBACK}:{facts.ports.scheduler}"
    about = {"version": facts.version, "gpus": facts.gpus, "installed": facts.installed}
    return {**about, "folder": str(place.root), "scheduler": scheduler}


def _resident_mb(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // (1 << 20)


def _kubectl(arguments: list[str]) -> int:
    facts = _current()
    kube = str(Binaries(facts.version).kube)
    environment = facts.environment() | {"KUBECONFIG": str(Place(work_folder()).admin)}
    os.execve(kube, [kube, "kubectl", *arguments], environment)


def _helm(arguments: list[str]) -> int:
    facts = _current()
    ensure_helm()
    program = str(helm())
    os.execve(program, [program, *arguments], installed.environment(Place(work_folder()), facts))


def _current() -> Facts:
    facts = cluster.current()
    if facts is None:
        raise PlaygroundError(cluster.NONE)
    return facts


def _say(text: str) -> None:
    print(f"hack/cluster: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    interrupt_on(signal.SIGTERM, signal.SIGHUP)
    try:
        sys.exit(main())
    except PlaygroundError as e:
        _say(str(e))
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped; the cluster is removed" if sys.argv[1:2] == ["up"] else "stopped")
        sys.exit(130)
