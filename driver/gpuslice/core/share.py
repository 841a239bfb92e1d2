"""The size of one share of a shared device, and whether all shares together fit the device.

The figures are the capacity that the scheduler charged (`consumedCapacity`, KEP-5075). It charges nothing for a fixed part
of a static plan; such a share is 1/N of everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import assert_never

from gpuslice.core.model import MIB, Exclusive, GpuUuid, MigSlot, Monitor, Mps, Sharing, TimeSlicing
from gpuslice.core.record import Grant, Record, StartMps


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """`percent` is a ceiling on SMs, 0: no ceiling. `turns` is the number of time slices (of N) that the share takes."""

    memory_mib: int
    percent: int = 0
    clients: int = 0
    turns: int = 0


def of(grant: Grant) -> Share | None:
    """The share of a grant. None for an exclusive device. A part of a MiB counts as a whole MiB, because MPS limits MiB."""
    charged = grant.allocation.consumed
    match grant.sharing:
        case Exclusive() | Monitor():
            return None
        case TimeSlicing(shares, memory_mib):
            return Share(memory_mib=-(-_memory(grant, memory_mib // shares) // MIB), turns=charged.get("shares", 1))
        case Mps(shares, memory_mib, clients, part):
            return Share(
                memory_mib=-(-_memory(grant, memory_mib // shares) // MIB),
                percent=charged.get("smPercent", 0 if part is None else 100 // shares),
                clients=charged.get("clients", max(1, clients // shares)),
            )
        case _:
            assert_never(grant.sharing)


def _memory(grant: Grant, part_mib: int) -> int:
    """The memory of a share in bytes: what the scheduler charged, or else `part_mib`."""
    return grant.allocation.consumed.get("memory", part_mib * MIB)


_ALL_SMS = 100  # percent
MODES = ("gpu", "mig", "mps", "timeslice", "monitor")


def mode(sharing: Sharing, slot: MigSlot | None) -> str:
    """The mode of a card or a partition (`slot`), one of `MODES`: the published `type` of the device."""
    match sharing:
        case Exclusive():
            return "gpu" if slot is None else "mig"
        case Mps():
            return "mps"
        case TimeSlicing():
            return "timeslice"
        case Monitor():
            return "monitor"
        case _:
            assert_never(sharing)


def describe(grant: Grant) -> str:
    """The share as text: "10240 MiB, 25 % of the SMs". "" for an exclusive device."""
    mine = of(grant)
    if mine is None:
        return ""
    parts = [f"{mine.memory_mib} MiB"]
    parts += [f"{mine.percent} % of the SMs"] if mine.percent else []
    parts += [f"{mine.turns} of {grant.sharing.shares} turns"] if isinstance(grant.sharing, TimeSlicing) else []
    return ", ".join(parts)


def usage(grants: Sequence[Grant]) -> str:
    """The memory of all shares of one slice, short enough for a map: "mps 20480 of 81152 MiB"."""
    used = sum(mine.memory_mib for mine in map(of, grants) if mine is not None)
    for grant in grants:
        match grant.sharing:
            case TimeSlicing(memory_mib=whole):
                return f"time-slice {used} of {whole} MiB"
            case Mps(memory_mib=whole):
                return f"mps {used} of {whole} MiB"
            case Exclusive() | Monitor():
                continue
            case _:
                assert_never(grant.sharing)
    return ""


def enforcement(sharing: Sharing) -> str:
    """The means that keeps a claim within its memory: the published `memoryEnforcement` of the device."""
    match sharing:
        case Exclusive():
            return "hardware"
        case Mps(enforced=True):
            return "mps"
        case Mps() | TimeSlicing() | Monitor():
            return "none"
        case _:
            assert_never(sharing)


def coexists(one: Grant, two: Grant) -> bool:
    """Whether two grants may exist together: shares of the same device, or fixed parts of the same slice."""
    if (one.gpu, one.slot) != (two.gpu, two.slot):
        return False
    match one.sharing, two.sharing:
        case (TimeSlicing(part=first), TimeSlicing(part=second)) | (Mps(part=first), Mps(part=second)):
            return first is None or second is None or first != second
        case _:
            return False


def excess(wanted: Grant, others: Sequence[Grant]) -> str:
    """The resource that the slice lacks for `wanted` together with the `others`. "" if all of them fit."""
    mine = of(wanted)
    if mine is None:
        return ""
    shares = [share for share in map(of, others) if share is not None]
    for name, limit in _limits(wanted):
        total = getattr(mine, name) + sum(getattr(share, name) for share in shares)
        if name == "memory_mib":  # a sum of bytes, as in the scheduler
            total = -(-sum(_bytes(grant) for grant in (wanted, *others)) // MIB)
        if total > limit:
            return f"{total} of {limit} {_DESCRIPTIONS[name]}"
    return ""


def _bytes(grant: Grant) -> int:
    match grant.sharing:
        case Exclusive() | Monitor():
            return 0
        case TimeSlicing(shares, memory_mib) | Mps(shares, memory_mib):
            return _memory(grant, memory_mib // shares)
        case _:
            assert_never(grant.sharing)


_DESCRIPTIONS = {
    "memory_mib": "MiB of memory",
    "percent": "percent of the SMs",
    "clients": "MPS clients",
    "turns": "shares",
}


def _limits(grant: Grant) -> Iterable[tuple[str, int]]:
    match grant.sharing:
        case Exclusive() | Monitor():
            return ()
        case TimeSlicing(shares, memory_mib):
            return (("memory_mib", memory_mib), ("turns", shares))
        case Mps(_, memory_mib, clients):
            return (("memory_mib", memory_mib), ("percent", 100), ("clients", clients))
        case _:
            assert_never(grant.sharing)


def daemon_key(gpu: GpuUuid, slot: MigSlot | None) -> str:
    """Folder name of the MPS daemon of a card or a partition. It is short, because the length of socket paths is limited."""
    card = gpu.removeprefix("GPU-").partition("-")[0]
    return card if slot is None else f"{card}-{slot.profile}-{slot.placement.start}"


def unwanted(keys: Iterable[str], gpu: GpuUuid, records: Iterable[Record]) -> tuple[str, ...]:
    """The keys that name a daemon of this GPU without any record, finished or unfinished."""
    wanted = {
        daemon_key(step.gpu, step.slot)
        for record in records
        for step in record.plan.steps
        if isinstance(step, StartMps)
    }
    return tuple(key for key in keys if is_on(key, gpu) and key not in wanted)


def is_on(key: str, gpu: GpuUuid) -> bool:
    """Whether this key names a daemon of the card, or of a partition of it."""
    return key.partition("-")[0] == daemon_key(gpu, None)


def ceilings(grants: Iterable[Grant]) -> tuple[int | None, int | None]:
    """Memory in MiB and percent of SMs of the largest of these shares, because one MPS daemon has the same values for all
    its clients.

    None means no ceiling: there is no share, or a share without a ceiling on compute. A ceiling of 100 % counts as none,
    because NVIDIA's daemon answers 100 for both.
    """
    shares = [share for share in map(of, grants) if share is not None]
    if not shares:
        return None, None
    most = max(share.percent or _ALL_SMS for share in shares)
    return max(share.memory_mib for share in shares), most if most < _ALL_SMS else None
