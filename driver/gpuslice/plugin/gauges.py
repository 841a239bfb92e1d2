"""Metrics of claims, cards and MPS daemons, computed at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial

from gpuslice.checkpoint import Checkpoint
from gpuslice.core import share
from gpuslice.errors import DeviceError
from gpuslice.mps.api import MpsDaemons
from gpuslice.telemetry import Telemetry


def register(
    telemetry: Telemetry,
    checkpoint: Checkpoint,
    mps: MpsDaemons,
    *,
    hung: Callable[[], Collection[object]],
    problem: Callable[[], str | None],
) -> None:
    """Add the gauges. `hung` lists the GPUs with a hung call. `problem` is the reason why pools are not published."""
    telemetry.gauge("gpuslice_published", "1 while the API shows what the node offers.", lambda: not problem())
    telemetry.gauge("gpuslice_prepared_claims", "Claims with a record.", lambda: len(checkpoint.records()))
    telemetry.gauge("gpuslice_hung_gpus", "GPUs with a call that does not return.", lambda: len(hung()))
    telemetry.gauges(
        "gpuslice_prepared_devices",
        "Devices that claims hold.",
        "type",
        {mode: partial(_held, checkpoint, mode) for mode in share.MODES},
    )
    telemetry.gauge(
        "gpuslice_mps_daemons_unwell", "MPS daemons in trouble; -1 without supervisor.", partial(_unwell, mps)
    )


def _held(checkpoint: Checkpoint, mode: str) -> int:
    records = checkpoint.records().values()
    return sum(share.mode(grant.sharing, grant.slot) == mode for record in records for grant in record.plan.grants)


def _unwell(mps: MpsDaemons) -> int:
    try:
        return sum(bool(daemon.problem) for daemon in mps.statuses())
    except DeviceError:
        return -1
