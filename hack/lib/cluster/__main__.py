"""`hack/cluster`: a real Kubernetes of one node on this machine, with our driver on it if asked for. docs/cluster.md"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from hack.lib.cluster import cluster
from hack.lib.cluster.binaries import Binaries
from hack.lib.cluster.errors import PlaygroundError
from hack.lib.cluster.layout import LOOPBACK, REAL, Facts, Place, work_folder
from hack.lib.cluster.versions import VERSIONS

_ABOUT = """\
A real Kubernetes of one node on this machine: etcd, API server, scheduler, controller manager, kubelet, containerd.
Built from Go modules the first time (ten minutes), up in a few seconds afterwards. Needs root, and no network then.

  hack/cluster up --gpus h100x8     with our driver on it, and eight simulated cards
  hack/cluster up                   without
  hack/cluster kubectl get pods     any kubectl command, as the administrator
  hack/cluster status               what runs
  hack/cluster stop kubelet         end a part, and `start` it again later; `reboot` restarts the whole node
  hack/cluster down                 end it and remove every trace
"""

_TRY = """\
Try:
  hack/cluster kubectl get resourceslices                            what the node offers
  hack/cluster kubectl apply -f deploy/examples/mig-profile.yaml     a pod with a MIG partition (all examples work)
  hack/cluster kubectl get pods,resourceclaims
  hack/cluster kubectl logs mig-profile                              what the driver put into its container
  {devices}
      a map of the cards, and who holds what
  tail -f {logs}/driver.log
  kill -9 $(hack/cluster status --pid driver)                        it is started again; the claims are still there"""


def main() -> int:
    if sys.argv[1:2] == ["kubectl"]:
        return _kubectl(sys.argv[2:])
    parsed = parser().parse_args()
    if parsed.command == "up":
        return _up(_facts(parsed), parsed.foreground)
    if parsed.command == "build":
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
    if parsed.command == "stop":
        cluster.stop(parsed.part, signal.SIGTERM if parsed.gently else signal.SIGKILL)
        return 0
    if parsed.command == "start":
        cluster.start(parsed.part)
        return 0
    _say("gone" if cluster.down() else "there is no cluster")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hack/cluster",
        description=_ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    up = commands.add_parser("up", help="start it", allow_abbrev=False)
    node = up.add_mutually_exclusive_group()
    node.add_argument(
        "--gpus",
        default="",
        metavar="CARDS",
        help=f"cards to simulate (docs/simulator.md), or {REAL!r}: those of this machine; with none, no driver",
    )
    node.add_argument("--control-plane", action="store_true", help="no kubelet: nodes are the objects that you make")
    up.add_argument("--driver-root", default="/", metavar="FOLDER", help="where NVIDIA's driver is, for real cards")
    up.add_argument("--cdi-hook", default="", metavar="FILE", help="NVIDIA's nvidia-cdi-hook, for real cards")
    up.add_argument("--policy", default="", metavar="FILE", help="what the cards may offer (docs/policy.md)")
    up.add_argument(
        "--program", action="append", default=[], metavar="FILE", help="a program that containers have too; repeatable"
    )
    up.add_argument("--foreground", action="store_true", help="stay until Ctrl-C, and end it then")
    build = commands.add_parser("build", help="only build what it needs", allow_abbrev=False)
    check = commands.add_parser("check", help="say what `up` is missing; exit code 1 if anything", allow_abbrev=False)
    for one in (up, build, check):
        one.add_argument(
            "--version", choices=VERSIONS, default=VERSIONS[0], help=f"of Kubernetes; default {VERSIONS[0]}"
        )
    status = commands.add_parser("status", help="what runs; exit code 1 if nothing does", allow_abbrev=False)
    status.add_argument("--json", action="store_true", help="for programs")
    status.add_argument("--pid", metavar="PART", help="only the process id of this part")
    stop = commands.add_parser("stop", help="end a part, and keep it away", allow_abbrev=False)
    stop.add_argument("--gently", action="store_true", help="with SIGTERM, as an update does it; else as a crash would")
    start = commands.add_parser("start", help="let a part run again, and wait for it", allow_abbrev=False)
    for one in (stop, start):
        one.add_argument("part", metavar="PART", help="as status names it")
    commands.add_parser(
        "reboot", help="restart the node: processes, mounts and /run go, its disk stays", allow_abbrev=False
    )
    commands.add_parser("kubectl", help="any kubectl command, as the administrator", add_help=False)
    commands.add_parser("down", help="end it and remove every trace", allow_abbrev=False)
    return parser


def _facts(parsed: argparse.Namespace) -> Facts:
    return cluster.wanted(
        parsed.version,
        gpus=parsed.gpus,
        kubelet=not parsed.control_plane,
        driver_root=parsed.driver_root,
        cdi_hook=parsed.cdi_hook,
        policy=str(Path(parsed.policy).absolute()) if parsed.policy else "",
        programs=tuple(str(Path(program).absolute()) for program in parsed.program),
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
        print(_TRY.format(devices=_devices(place, facts), logs=place.logs))
    if not foreground:
        print("  hack/cluster down", flush=True)
        return 0
    print("\nCtrl-C ends it.", flush=True)
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
        known = {"version": facts.version, "gpus": facts.gpus, "folder": str(place.root)} if facts else {}
        served = {"scheduler": f"https://{LOOPBACK}:{facts.ports.scheduler}"} if facts else {}
        print(json.dumps({**known, **served, "processes": processes}))
    elif part is not None:
        if part not in processes:
            raise PlaygroundError(f"no part {part!r} runs; these do: {', '.join(sorted(processes)) or 'none'}")
        print(processes[part])
    elif facts is None:
        _say(cluster.NONE)
    else:
        print(f"Kubernetes {facts.version}, {facts.gpus or 'no'} cards, in {place.root}")
        for name, pid in processes.items():
            print(f"  {name:24} {pid:>8} {_resident_mb(pid):>6} MB")
    return 0 if facts else 1


def _resident_mb(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE") // (1 << 20)


def _kubectl(arguments: list[str]) -> int:
    facts = cluster.current()
    if facts is None:
        raise PlaygroundError(cluster.NONE)
    kube = str(Binaries(facts.version).kube)
    os.environ["KUBECONFIG"] = str(Place(work_folder()).admin)
    os.execv(kube, [kube, "kubectl", *arguments])


def _say(text: str) -> None:
    print(f"hack/cluster: {text}", file=sys.stderr, flush=True)


def _stop(*_: object) -> None:
    """Told to end in another way than Ctrl-C, it ends in the same."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    try:
        sys.exit(main())
    except PlaygroundError as e:
        _say(str(e))
        sys.exit(1)
    except KeyboardInterrupt:
        _say("stopped; nothing of it stays" if sys.argv[1:2] == ["up"] else "stopped")
        sys.exit(130)
