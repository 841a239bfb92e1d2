"""`hack/scale`: how fast the real scheduler places pods on nodes with our slices, compared with whole GPUs only.

The two sets of slices take turns, round by round, so that a slow moment of this machine affects both. See
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from gpuslice.core.policy.rules import Policy
from gpuslice.errors import DriverError
from gpuslice.node import read_policy

from hack.lib.api import ApiServer, RequestError
from hack.lib.scale import figures, phases
from hack.lib.scale.control import Scheduler, control_plane
from hack.lib.scale.errors import ScaleError
from hack.lib.scale.fleet import CARDS, REPOSITORY, NodePlan, cards, create_classes, create_nodes, plan, publish
from hack.lib.scale.measure import KINDS, WHOLE, Figure, RequestKind, measure
from hack.lib.scale.report import BASELINE, OURS, Found, report, table
from hack.lib.signals import interrupt_on

_NODES = 100
_WARM = 8  # pods that do not count: meanwhile the scheduler compiles selectors and sees the slices
_PROFILE_S = 3
_WHOLE_ONLY = {"apiVersion": "gpuslice.dev/v1alpha1", "kind": "Policy", "default": {"modes": ["gpu"]}}


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything was measured, even if a target was missed. 1 with a sentence if the measurement failed."""
    options = options_of(arguments)
    try:
        if options.fleet:
            body = phases.measure(
                nodes=options.nodes or phases.NODES,
                claims=options.claims,
                outage_s=options.outage,
                limit_s=options.limit,
                tree=options.tree.absolute(),
                say=_say,
            )
            print(json.dumps(body, indent=1) if options.json else figures.table(body))
            return 0
        options.nodes = options.nodes or _NODES
        gpus = cards()
        plans = {
            BASELINE: plan(gpus, Policy.parse(_WHOLE_ONLY)),
            OURS: plan(gpus, read_policy(options.policy)),
        }
        with control_plane() as (api, scheduler):
            found = _measure(api, scheduler, plans, options)
    except (ScaleError, RequestError, DriverError) as e:
        _say(str(e))
        return 1
    body = report(found, {"nodes": options.nodes, "cards": CARDS, "pods": options.pods, "rounds": options.rounds})
    print(json.dumps(body, indent=1) if options.json else table(body))
    return 0


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hack/scale",
        description=(
            "Measure how many pods a second the real scheduler places on nodes with slices of gpuslice, or with --fleet what "
            "a fleet of drivers costs the API server. No kubelets run."
        ),
    )
    parser.add_argument(
        "--nodes", type=_positive, help="number of nodes, each with eight simulated H100 (100; with --fleet 200)"
    )
    parser.add_argument("--pods", type=_positive, default=200, help="number of pods of each kind in a round (200)")
    parser.add_argument("--rounds", type=_positive, default=3, help="number of rounds for each set of slices (3)")
    parser.add_argument(
        "--only",
        action="append",
        choices=[kind.key for kind in KINDS],
        help="measure only this kind of request; repeatable",
    )
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help="policy file: what the driver may offer (docs/policy.md)"
    )
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="FOLDER",
        help="write CPU profiles of the scheduler to this folder, for go tool pprof -top",
    )
    fleet = parser.add_argument_group("what a fleet costs the API server")
    fleet.add_argument(
        "--fleet",
        action="store_true",
        help="run the driver's publisher for each node: start, an outage, a change of shapes while claims hold some pools",
    )
    fleet.add_argument(
        "--claims", type=_positive, default=1000, help="number of allocated claims of others in the cluster (1000)"
    )
    fleet.add_argument(
        "--outage", type=_positive, default=60, metavar="SECONDS", help="how long the API server is away (60)"
    )
    fleet.add_argument(
        "--limit",
        type=_positive,
        default=int(phases.LIMIT_S),
        metavar="SECONDS",
        help=f"the longest time of a phase; the report ends with one that takes longer ({phases.LIMIT_S:.0f})",
    )
    fleet.add_argument(
        "--tree", type=Path, default=REPOSITORY, metavar="FOLDER", help="checkout whose driver runs; default: this one"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _measure(api: ApiServer, scheduler: Scheduler, plans: Mapping[str, NodePlan], options: argparse.Namespace) -> Found:
    create_classes(api)
    nodes = create_nodes(api, options.nodes)
    kinds = [kind for kind in KINDS if not options.only or kind.key in options.only]
    found: Found = {}
    for number in range(options.rounds):
        names = list(plans)
        for name in names if number % 2 == 0 else reversed(names):
            _say(f"round {number + 1} of {options.rounds}: {name}")
            publish(api, nodes, plans[name])
            asked = [WHOLE] if name == BASELINE else kinds
            measure(api, scheduler, asked[0], min(_WARM, options.pods))
            for kind in asked:
                path = options.profile and options.profile / f"{name.replace(' ', '-')}-{kind.key}.pb.gz"
                figure = _figure(api, scheduler, kind, options.pods, path)
                found.setdefault((name, kind), []).append(figure)
    return found


def _figure(api: ApiServer, scheduler: Scheduler, kind: RequestKind, pods: int, profile: Path | None) -> Figure:
    """One measurement. A profile makes it a little slower."""
    if profile is None:
        return measure(api, scheduler, kind, pods)
    profile.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1, "profile") as thread:
        taken: list[Future[bytes]] = []
        figure = measure(
            api, scheduler, kind, pods, lambda: taken.append(thread.submit(scheduler.profile, api, _PROFILE_S))
        )
        profile.write_bytes(taken[0].result())
    return figure


def _say(text: str) -> None:
    print(f"hack/scale: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    interrupt_on(signal.SIGTERM, signal.SIGHUP)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        _say("stopped; the control plane is removed")
        sys.exit(130)
