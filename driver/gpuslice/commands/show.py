"""The commands that change nothing: `devices`, `claims`, `policy check`."""

from __future__ import annotations

import argparse

from gpuslice import config, hardware, node, report
from gpuslice.commands import bodies, output
from gpuslice.commands.parser import WIDTH
from gpuslice.core.inventory import Inventory
from gpuslice.errors import ConfigError


def devices(parsed: argparse.Namespace) -> int:
    with node.snapshot(config.read(parsed)) as seen:
        text = report.node(seen.inventory, seen.live, seen.records.values(), seen.taints, _columns(parsed.output))
        output.show(parsed.output, text, bodies.devices(seen))
        output.warn(seen.notes)
    return 0


def claims(parsed: argparse.Namespace) -> int:
    records, notes = node.records(config.read(parsed))
    output.show(parsed.output, report.claims(records, _columns(parsed.output)), bodies.claims(records, notes))
    output.warn(notes)
    return 0


def check(parsed: argparse.Namespace) -> int:
    settings = config.read(parsed)
    policy = node.read_policy(settings.policy)
    with hardware.visit(settings, anew=True) as (nvml, _):
        gpus, lost = node.listed(nvml)
    dynamic, static = (Inventory.of(gpus, policy, "this-node", static=static) for static in (False, True))
    misfits = (*dynamic.notes, *static.notes)
    for sentence in node.sentences(policy.suiting_none(misfits, gpus), settings.policy):
        raise ConfigError(sentence)
    warnings = (*lost, *policy.unused(gpus), *node.sentences(misfits, settings.policy))
    text = report.offered(dynamic, static, policy, WIDTH)
    found = f"{len(warnings)} warning{'s' if len(warnings) != 1 else ''}" if warnings else "no warnings"
    output.show(None, f"{text}\n\n{settings.policy} is a valid policy, with {found}", {})
    output.warn(warnings)
    return 0


def _columns(form: str | None) -> int | None:
    return None if form == output.WIDE else WIDTH
