"""The driver on a real Kubernetes: scheduler, kubelet and containers are there, only the cards are simulated."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence

from hack.lib.bench import onkube
from hack.lib.bench.churn import churn, rest
from hack.lib.bench.machine import MachineLoad, namespace_cpu_s
from hack.lib.bench.pods import pods, successors
from hack.lib.bench.rows import CLUSTER_ROWS
from hack.lib.bench.stage import ClusterStage, Extent
from hack.lib.bench.subject import here, with_byte_code
from hack.lib.bench.table import Figures, Report, figures

MEASURES: Mapping[str, Callable[[ClusterStage, Extent], Figures]] = {
    "pods": pods,
    "successors": successors,
    "churn": churn,
    "rest": rest,
}
FULL = Extent(rounds=1, pods=20, waves=5, successors=10, churn=200, rest_s=60.0)
QUICK = Extent(rounds=1, pods=4, waves=1, successors=3, churn=40, rest_s=20.0)


def run(options: argparse.Namespace) -> Report:
    """Measure what the options name, on a cluster for this run only. BenchError if a measurement fails."""
    extent = QUICK if options.quick else FULL
    extent = dataclasses.replace(extent, rounds=options.rounds or extent.rounds)
    machine, subject = MachineLoad(), here()
    notes = with_byte_code([subject])
    print("starting a Kubernetes", file=sys.stderr)
    with onkube.cluster(options.cluster_version) as kube:
        stage = ClusterStage(kube)
        found = _measure(stage, options.only or list(MEASURES), extent)
        machine.exclude(namespace_cpu_s(kube.pid("driver")))
        facts = machine.facts()
    return Report(
        what=f"driver on Kubernetes {kube.version}, simulated cards",
        machine=facts,
        size=dataclasses.asdict(extent),
        extent=(
            f"{extent.rounds} round(s), {extent.pods} pods of a mode one by one, {extent.waves} times eight at once, "
            f"{extent.successors} successors of a kind, {extent.churn} pods of churn, {extent.rest_s:.0f} s of rest"
        ),
        notes=[*notes, *stage.notes.values()],
        figures=figures(CLUSTER_ROWS, {subject.name: found}),
    )


def _measure(stage: ClusterStage, names: Sequence[str], extent: Extent) -> list[Figures]:
    found: list[Figures] = [{} for _ in range(extent.rounds)]
    for number, one in enumerate(found):
        for name in names:
            print(f"{name}: round {number + 1} of {extent.rounds}", file=sys.stderr)
            one |= MEASURES[name](stage, extent)
    return found
