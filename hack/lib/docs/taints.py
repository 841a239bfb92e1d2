"""Taints of devices, with the keys and values of the source."""

from __future__ import annotations

import ast

from gpuslice.config import DRIVER_NAME
from gpuslice.core.model import PoolName, Taint
from gpuslice.core.pools import shape
from gpuslice.core.pools.pool import PoolSlices

from hack.lib.docs import source
from hack.lib.docs.text import code, paired, table

TAINTS = {
    ("gpu", "lost"): (
        "every device of the card but monitor",
        "the card does not answer NVML, because it fell off the bus. Reset the card, or restart the node",
    ),
    ("gpu", "hung"): ("every device of the card", "an NVML call has not returned for 15 s"),
    ("mig-mode", "on"): (
        "gpu, and mps and timeslice of the card",
        "MIG mode is on, and only a reset of the card switches it (A100, A30)",
    ),
    ("mig-mode", "off"): ("partitions", "MIG mode is off, and only a reset of the card switches it (A100, A30)"),
    ("mig-mode", "unsupported"): ("partitions", "the card refused to switch MIG mode on when a claim needed it"),
    ("mig-mode", "pending"): ("every device but monitor", "a change of MIG mode waits for a reset of the card"),
    ("foreign-partition", "profile-…-at-…"): (
        "gpu, mps and timeslice of the card, and partitions that overlap",
        "a partition that the driver did not make is on the card. The value names its profile id and its first memory slice",
    ),
    ("other-pool", "held"): (
        "every device but monitor",
        "claims hold the card from a pool of another name: the node was renamed, or the card was moved. Delete their pods",
    ),
    ("device-node", "none"): (
        "every device of the card but monitor",
        "NVML names no device minor of the card, so a container cannot get its device node",
    ),
    ("time-slice", "unsupported"): (
        "timeslice of the card",
        "the policy sets an interval, and the card has none to set (Pascal and older), or refused to set it when a claim "
        "needed it",
    ),
    ("compute-mode", "unsupported"): (
        "mps of the card",
        "the card has no compute mode, or refused to set it when a claim needed it, so nothing would keep other programs out "
        "of an MPS share",
    ),
    ("mps", "fault"): ("devices of this MPS daemon", "the MPS daemon has a problem"),
    ("mps", "supervisor-away"): ("every device of type mps", "no MPS supervisor answers on the node"),
    (shape.TAINT, "pending"): (
        "every device of the card",
        "the policy or the Kubernetes release changed the offer of the card. The change waits until no claim holds the card",
    ),
}


def found() -> list[tuple[str, str]]:
    """(key, value) of every taint that the driver can publish."""
    pairs = []
    for path, call in source.calls("Taint"):
        keys, values = (source.texts(argument) for argument in call.args[:2])
        if not keys or not values:
            raise ValueError(
                f"{path}:{call.lineno} makes a taint whose key or value is not a text: {ast.unparse(call)}"
            )
        pairs += [(key, value) for key in keys for value in values]
    return list(dict.fromkeys([*pairs, *_of_a_cordoned_pool()]))


def effects() -> set[str]:
    return {Taint("", "").effect}


def _of_a_cordoned_pool() -> list[tuple[str, str]]:
    cordoned = shape.cordoned(PoolSlices(PoolName("n/p"), ({"devices": [{"name": "gpu"}]},)), DRIVER_NAME)
    devices = cordoned.specs[0]["devices"]
    assert isinstance(devices, list)
    return [(taint["key"].rpartition("/")[2], taint["value"]) for taint in devices[0]["taints"]]


def taints() -> str:
    said = {f"{key}={value}": words for (key, value), words in TAINTS.items()}
    rows = []
    for pair, (devices, meaning) in paired("taints", (f"{key}={value}" for key, value in found()), said):
        key, _, value = pair.partition("=")
        rows.append([code(f"{DRIVER_NAME}/{key}"), code(value), devices, meaning])
    return table(["key", "value", "on", "meaning"], sorted(rows))
