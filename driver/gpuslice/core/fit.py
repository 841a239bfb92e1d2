"""A policy, reduced to what one card can do. Anything that does not fit is left out with a sentence; the rest is offered.

One policy serves a fleet, and a node may have a card that its author did not know. So nothing here is an error: a problem of
one card must not take away the other cards of its node.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from gpuslice.core import layout
from gpuslice.core.layout import ProfilePlacement
from gpuslice.core.model import MIB, Gpu, MigProfile
from gpuslice.core.policy.rules import GpuPolicy, Misfit
from gpuslice.core.policy.schema import Mode, Parts

_LEAST_MIB = 2  # of a share, because the API requires a capacity of at least the smallest request plus one step


def fitted(gpu: Gpu, policy: GpuPolicy, *, static: bool) -> tuple[GpuPolicy, tuple[Misfit, ...]]:
    """The policy as this card can follow it, and what it cannot."""
    notes: list[Misfit] = []
    policy = _with_reserve(gpu, policy, notes)
    policy = _with_shares(gpu, policy, notes)
    if static and policy.static and (reason := _refusal(gpu, policy)):
        sentence = f"policy: {reason}; the card is offered whole where the API server knows no partitions"
        notes.append(Misfit(policy.path("static"), gpu.uuid, sentence))
        policy = replace(policy, static=())
    return policy, tuple(notes)


def sellable_mib(gpu: Gpu, reserve_bytes: int) -> int:
    return max(0, gpu.memory_bytes - reserve_bytes) // MIB


def shares_of(memory_mib: int, wanted: int) -> int:
    """The number of shares that this memory allows, at most `wanted`. A card without its own memory has no limit."""
    return wanted if memory_mib == 0 else min(wanted, max(1, memory_mib // _LEAST_MIB))


def static_layout(gpu: Gpu, wanted: Sequence[tuple[MigProfile, int]]) -> Sequence[ProfilePlacement] | None:
    """A place for each of the wanted partitions, or None if they do not fit on the card together."""
    if any(count > profile.max_instances for profile, count in wanted):
        return None
    return layout.arrange(layout.totals(gpu.profiles), [profile for profile, count in wanted for _ in range(count)])


def _with_reserve(gpu: Gpu, policy: GpuPolicy, notes: list[Misfit]) -> GpuPolicy:
    if policy.reserve_bytes < gpu.memory_bytes:
        return policy
    own = gpu.reserved_bytes if gpu.reserved_bytes < gpu.memory_bytes else 0
    if policy.reserve_bytes:
        path = policy.path("reserve")
        sentence = (
            f"policy: {path} is {policy.reserve_bytes // MIB} MiB, but GPU {gpu.index} ({gpu.product}) has only"
            f" {gpu.memory_bytes // MIB} MiB; write a smaller reserve; until then {own // MIB} MiB are reserved"
        )
        notes.append(Misfit(path, gpu.uuid, sentence))
    return replace(policy, reserve_bytes=own)


def _with_shares(gpu: Gpu, policy: GpuPolicy, notes: list[Misfit]) -> GpuPolicy:
    memory_mib = sellable_mib(gpu, policy.reserve_bytes)
    if memory_mib == 0 and Mode.MPS in policy.modes:
        sentence = (
            f"GPU {gpu.index} ({gpu.product}) has no memory of its own that MPS could divide, so it offers no MPS; share"
            " it by time"
        )
        notes.append(Misfit("", gpu.uuid, sentence))
        policy = replace(policy, modes=policy.modes - {Mode.MPS})
    for mode, wanted in ((Mode.MPS, policy.mps_shares), (Mode.TIMESLICE, policy.timeslice_shares)):
        if mode in policy.modes and (most := shares_of(memory_mib, wanted)) < wanted:
            path = policy.path(mode)
            sentence = (
                f"policy: {path}: {wanted} shares of GPU {gpu.index} ({gpu.product}) would have less than {_LEAST_MIB} MiB"
                f" each of {memory_mib} MiB; make fewer shares or reserve less; until then it has {most} shares"
            )
            notes.append(Misfit(path, gpu.uuid, sentence))
    notes += _least_too_large(gpu, policy, memory_mib)
    return policy


def _least_too_large(gpu: Gpu, policy: GpuPolicy, memory_mib: int) -> Iterator[Misfit]:
    if "leastShare" not in policy.paths:
        return
    for mode, wanted in ((Mode.MPS, policy.mps_shares), (Mode.TIMESLICE, policy.timeslice_shares)):
        part_mib = memory_mib // shares_of(memory_mib, wanted)
        if mode in policy.modes and part_mib < policy.least_share_mib:
            path = policy.path("leastShare")
            sentence = (
                f"policy: {path} is {policy.least_share_mib} MiB, but one of {wanted} shares of GPU {gpu.index}"
                f" ({gpu.product}) by {mode} is {part_mib} MiB; make fewer shares, or write a smaller leastShare; until then"
                f" the least is {part_mib} MiB"
            )
            yield Misfit(path, gpu.uuid, sentence)


def _refusal(gpu: Gpu, policy: GpuPolicy) -> str:
    """Why the card cannot be divided as `static` says; "" if it can."""
    card, path = f"GPU {gpu.index} ({gpu.product})", policy.path("static")
    if not isinstance(policy.static, Parts):
        if static_layout(gpu, policy.static) is not None:
            return ""
        text = ", ".join(f"{count} x {profile.name}" for profile, count in policy.static)
        return f"{path}, the static layout of {card}, {text}, does not fit on the card; use fewer or smaller partitions"
    parts, memory_mib = policy.static, sellable_mib(gpu, policy.reserve_bytes)
    if parts.mode not in policy.modes:
        return f"{path}.{parts.mode} cuts {card} into parts, but the card does not offer {parts.mode}; use another mode"
    if parts.mode is Mode.MPS and parts.count > policy.mps_clients:
        return (
            f"{path}.{parts.mode} cuts {card} into {parts.count} parts, but the card has only {policy.mps_clients}"
            " MPS clients, and each part needs one; make fewer parts"
        )
    if shares_of(memory_mib, parts.count) < parts.count:
        return (
            f"{path}.{parts.mode}: {parts.count} parts of {card} would have less than {_LEAST_MIB} MiB each of"
            f" {memory_mib} MiB; make fewer parts"
        )
    return ""
