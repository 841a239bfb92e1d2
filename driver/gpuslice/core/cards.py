"""The cards of a node: those that NVML lists now, those that were there before, and those that cannot be told apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from gpuslice.core.model import Gpu


def known(
    listed: Iterable[Gpu], before: Iterable[Gpu], *, keep_missing: bool
) -> tuple[tuple[Gpu, ...], tuple[str, ...]]:
    """The node's cards in bus order, and one sentence for each change.

    With `keep_missing`, a missing card stays as it was last seen, and so does its pool: the card may be lost, and claims may
    hold it. Without `keep_missing`, the card counts as removed from the machine.
    """
    was = {gpu.bus_id: gpu for gpu in before}
    distinct, sentences = _distinct(tuple(listed), was)
    here = {gpu.bus_id: _with_profiles(gpu, was.get(gpu.bus_id)) for gpu in distinct}
    missing = [gpu for bus_id, gpu in was.items() if bus_id not in here]
    sentences += [_missing(gpu, kept=keep_missing) for gpu in missing]
    gpus = {**({gpu.bus_id: gpu for gpu in missing} if keep_missing else {}), **here}
    return tuple(gpus[bus_id] for bus_id in sorted(gpus)), tuple(sentences)


def new(listed: Iterable[Gpu], served: Iterable[Gpu]) -> tuple[Gpu, ...]:
    """Listed cards that this process does not serve."""
    served_now = {(gpu.uuid, gpu.bus_id) for gpu in served}
    known_now, _ = known(listed, served, keep_missing=True)
    return tuple(gpu for gpu in known_now if (gpu.uuid, gpu.bus_id) not in served_now)


def _distinct(listed: tuple[Gpu, ...], was: dict[str, Gpu]) -> tuple[list[Gpu], list[str]]:
    """The cards without those that share a UUID or a place, because a call for one would reach the other. A known card
    stays."""
    uuids = Counter(gpu.uuid for gpu in listed)
    places = Counter(gpu.bus_id for gpu in listed)
    clear, sentences = [], []
    for gpu in listed:
        doubled = uuids[gpu.uuid] > 1 or places[gpu.bus_id] > 1
        seen = gpu.bus_id in was and was[gpu.bus_id].uuid == gpu.uuid
        if gpu.uuid and (not doubled or (seen and places[gpu.bus_id] == 1)):
            clear.append(gpu)
        else:
            sentences.append(
                f"GPU {gpu.index} ({gpu.bus_id}) is not offered, because another card has the UUID {gpu.uuid!r} or its place;"
                " update the NVIDIA driver, or remove one of these cards"
            )
    return clear, sentences


def _with_profiles(gpu: Gpu, before: Gpu | None) -> Gpu:
    """Drivers of about 535 list no profiles while MIG mode is off (NVML field 199). Then the last known list counts."""
    if gpu.profiles or before is None or before.uuid != gpu.uuid:
        return gpu
    return replace(gpu, profiles=before.profiles)


def _missing(gpu: Gpu, *, kept: bool) -> str:
    was_here = f"GPU {gpu.index} ({gpu.product}, {gpu.bus_id}) was here before and is unreadable now"
    if kept:
        return f"{was_here}; its pool stays, with taints, until the card is back or the node restarts"
    return f"{was_here}, after a restart of the node, so its pool is removed; it is offered again when NVML lists it"


def none_of(gpus: Iterable[Gpu]) -> Iterator[str]:
    """One sentence if there is no card at all."""
    if not any(True for _ in gpus):
        yield "no GPU can be read on this node, so nothing is offered; the driver tries again every minute"
