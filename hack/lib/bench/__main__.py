"""`hack/bench`: measure, and show a table or JSON. docs/performance.md explains the figures."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence

from hack.lib.bench import alone, cluster, installed
from hack.lib.bench.subject import BenchError
from hack.lib.bench.table import table
from hack.lib.signals import interrupt_on


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything was measured, even if a target was missed. 1 with a sentence if the measurement failed."""
    options = options_of(arguments)
    interrupt_on(signal.SIGTERM)
    try:
        _check(options)
        kind = cluster if options.cluster else installed if options.installed else alone
        report = kind.run(options)
    except BenchError as e:
        print(f"hack/bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hack/bench: stopped; all temporary files are removed", file=sys.stderr)
        return 130
    print(json.dumps(report.values(), indent=1) if options.json else table(report))
    return 0


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="hack/bench",
        description="Measure the time and the memory that the driver itself uses, on simulated cards (docs/performance.md).",
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="a short run for a first look")
    parser.add_argument("--json", action="store_true", help="print JSON")
    names = [*alone.MEASURES, *cluster.MEASURES]
    parser.add_argument("--only", action="append", choices=names, help="measure only this; repeatable")
    parser.add_argument(
        "--rounds", type=_positive, help=f"number of rounds of each measure ({alone.FULL.rounds}, quick 1)"
    )
    beside = parser.add_argument_group("with stand-ins for API server and kubelet")
    beside.add_argument("--vs", metavar="REV", help="measure this git revision as well, in turns with this tree")
    beside.add_argument(
        "--calls",
        type=_positive,
        help=f"timed calls per round ({alone.FULL.calls}, quick {alone.QUICK.calls})",
    )
    beside.add_argument(
        "--claims",
        type=_positive,
        help=f"claims in the memory measure ({alone.FULL.claims}, quick {alone.QUICK.claims})",
    )
    real = parser.add_argument_group("on a real Kubernetes (requirements: docs/cluster.md)")
    real.add_argument("--cluster", action="store_true", help="start one with hack/cluster, measure there, and end it")
    real.add_argument(
        "--installed", action="store_true", help="the same with the driver in pods: its start there, and its memory"
    )
    real.add_argument(
        "--cluster-version", metavar="1.37.1", help="release of Kubernetes; default: the newest that hack/cluster knows"
    )
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _check(options: argparse.Namespace) -> None:
    """BenchError for an option that has no effect in this kind of run."""
    chosen = [name for name in ("cluster", "installed") if getattr(options, name)]
    if len(chosen) == 2:
        raise BenchError("--cluster and --installed are two kinds of run; remove one of the two")
    given = [name for name in ("vs", "calls", "claims") if getattr(options, name)] if chosen else []
    if given:
        raise BenchError(
            f"--{given[0]} is only for runs with stand-ins and has no effect with --{chosen[0]}; remove one of the two"
        )
    if options.cluster_version and not chosen:
        raise BenchError("--cluster-version names the Kubernetes to start, so it needs --cluster; add --cluster")
    if options.installed and (options.only or options.rounds):
        raise BenchError("--installed always measures all that it can, once; remove --only and --rounds")
    known = cluster.MEASURES if options.cluster else alone.MEASURES
    for name in options.only or ():
        if name not in known:
            raise BenchError(f"--only {name} belongs to the other kind of run; this kind has {', '.join(known)}")


if __name__ == "__main__":
    sys.exit(main())
