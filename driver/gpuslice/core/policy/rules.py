"""The possible offer of each GPU of a node: the operator's policy, applied to a real card.

`default` applies to every card. Each entry of `gpus` applies to the cards that it matches, and overrides the default key
by key. Only the **first** entry that matches a card applies, so the order reads from top to bottom. An entry is an error
if earlier entries match all its cards. A setting without effect is an error too, because the author expects an effect.
An entry for cards that this node does not have is no error, because one policy serves many nodes: `Policy.unused` names
such entries, one sentence each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpuslice.core.model import MIB, Gpu, GpuUuid, MigProfile, Setting
from gpuslice.core.policy import reading
from gpuslice.core.policy.schema import (
    ALL_MODES,
    LEAST_SHARE_MIB,
    SHARED,
    SHARES,
    Mode,
    Parts,
    ProfileRef,
    Rule,
    Section,
)

_VOLTA = (7, 0)  # the first compute capability whose MPS has an address space and limits for each client


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPolicy:
    """The possible offer of one card."""

    modes: frozenset[Mode]
    profiles: tuple[MigProfile, ...]  # empty while `mig` is not among the modes
    reserve_bytes: int  # memory of the whole card that is not offered
    mps_shares: int
    mps_clients: int  # CUDA contexts that one MPS daemon serves on the whole card
    timeslice_shares: int
    least_share_mib: int  # a share is charged at least this much memory
    interval: str  # one of `INTERVALS`, for the whole card
    shared_partitions: frozenset[Mode] = (
        frozenset()
    )  # modes in which claims share partitions; empty without the mode `mig`
    static: tuple[tuple[MigProfile, int], ...] | Parts = ()  # for clusters without partitionable devices
    keep: frozenset[Setting] = frozenset()  # settings that the driver does not change on this card
    paths: Mapping[str, str] = field(default_factory=dict, compare=False)  # of the document's keys, for errors

    def path(self, key: str) -> str:
        """Path of the key in the document: "gpus[1].reserve". If the document does not have the key, the key alone."""
        return self.paths.get(key, key)


@dataclass(frozen=True, slots=True)
class Misfit:
    """A setting that one card cannot follow. `path`: its place in the document; "" or only a key if it is not in the
    document."""

    path: str
    gpu: GpuUuid
    sentence: str

    def __str__(self) -> str:
        return self.sentence


@dataclass(frozen=True, slots=True)
class Policy:
    base: Section = field(default_factory=Section)
    rules: tuple[Rule, ...] = ()

    @staticmethod
    def default() -> Policy:
        """Every mode, every profile without a suffix, the reserved memory that NVML reports, no shared partitions."""
        return Policy()

    @staticmethod
    def parse(body: object) -> Policy:
        """Parse a loaded document. ConfigError names the path, the limit and the remedy."""
        return Policy(*reading.read(body))

    def of(self, gpu: Gpu) -> GpuPolicy:
        """The offer of this card. Settings that the card cannot follow are left out, and `misfits` names them."""
        rule, section = self._rule(gpu), self._section(gpu)
        modes = frozenset(section.modes or ALL_MODES) - (frozenset() if _has_mps(gpu) else {Mode.MPS})
        mig = Mode.MIG in modes
        clients = min(section.mps_clients or client_limit(gpu), client_limit(gpu))
        return GpuPolicy(
            modes=modes,
            profiles=tuple(profile for profile in gpu.profiles if mig and section.wants(profile)),
            reserve_bytes=gpu.reserved_bytes if section.reserve_bytes is None else section.reserve_bytes,
            mps_shares=min(section.mps_shares or SHARES, clients),
            mps_clients=clients,
            timeslice_shares=section.timeslice_shares or SHARES,
            least_share_mib=_least_share_mib(section),
            interval=section.timeslice_interval or "default",
            shared_partitions=frozenset(section.shared_partitions or ()) if mig else frozenset(),
            static=_static(section, gpu, modes),
            keep=frozenset(section.keep or ()),
            paths=self._paths(rule),
        )

    def misfits(self, gpu: Gpu) -> tuple[Misfit, ...]:
        """The named settings of the policy that this card cannot follow."""
        return tuple(self._misfits(gpu))

    def suiting_none(self, misfits: Iterable[Misfit], gpus: Iterable[Gpu]) -> tuple[Misfit, ...]:
        """The misfits of settings that fit none of the cards to which they apply."""
        misfits, gpus = tuple(misfits), tuple(gpus)
        counts = {gpu.uuid: {self.path(gpu), *self.of(gpu).paths.values()} for gpu in gpus}
        missed = {(misfit.path, misfit.gpu) for misfit in misfits}
        suited = {path for uuid, paths in counts.items() for path in paths if (path, uuid) not in missed}
        return tuple(misfit for misfit in misfits if misfit.path in counts[misfit.gpu] - suited)

    def unused(self, gpus: Iterable[Gpu]) -> tuple[str, ...]:
        """One sentence for each setting of this policy that has no effect on these cards."""
        return tuple(self._unused(tuple(gpus)))

    def path(self, gpu: Gpu) -> str:
        """The section of the document for this card: "gpus[1]", which inherits from "default", or "default" alone."""
        rule = self._rule(gpu)
        return "default" if rule is None else rule.path

    def _rule(self, gpu: Gpu) -> Rule | None:
        return next((rule for rule in self.rules if gpu in rule.match), None)

    def _section(self, gpu: Gpu) -> Section:
        rule = self._rule(gpu)
        return self.base if rule is None else rule.section.merged_over(self.base)

    def _paths(self, rule: Rule | None) -> Mapping[str, str]:
        own = {} if rule is None else {key: f"{rule.path}.{key}" for key in rule.section.said()}
        return {key: f"default.{key}" for key in self.base.said()} | own

    def _misfits(self, gpu: Gpu) -> Iterator[Misfit]:
        rule, section = self._rule(gpu), self._section(gpu)
        if rule is not None and rule.match.certain():
            for missing in _missing(rule.section, [gpu]):
                end = "" if missing.endswith("?") else ";"
                yield Misfit(rule.path, gpu.uuid, f"policy: {rule.path} {missing}{end} {_has(gpu)}")
        path = self._paths(rule).get("static", "static")
        for ref in _static_strangers(section, gpu):
            yield Misfit(
                path,
                gpu.uuid,
                f"policy: {path}, the static layout of GPU {gpu.index} ({gpu.product}), names profile {ref}, which it does"
                f" not have; {_has(gpu)}, or give this product an entry of its own",
            )

    def _missed(self, rule: Rule, gpus: Sequence[Gpu]) -> str:
        """Why the entry applies to none of these cards."""
        first = dict.fromkeys(self.path(gpu) for gpu in gpus if gpu in rule.match)
        if first:
            return f"applies to no GPU of this node, because {' and '.join(first)} matches those GPUs first"
        return f"matches no GPU of this node, so it has no effect here; {_cards(gpus)}"

    def _unused(self, gpus: tuple[Gpu, ...]) -> Iterator[str]:
        for rule in self.rules:
            here = [gpu for gpu in gpus if self._rule(gpu) == rule]
            if not here:
                yield f"policy: {rule.path} {self._missed(rule, gpus)}"
            for missing in () if rule.match.certain() else _missing(rule.section, here):  # otherwise `misfits` names it
                yield f"policy: {rule.path} {missing}"
        for missing in _missing(self.base, gpus):
            yield f"policy: default {missing}"
        for gpu in gpus:
            mine, section = self.of(gpu), self._section(gpu)
            if not mine.modes.intersection((Mode.GPU, *SHARED)) and not mine.profiles:
                allowed = ", ".join(section.modes or ALL_MODES)
                yield (
                    f"policy: GPU {gpu.index} ({gpu.product}) offers nothing, because it supports none of the modes "
                    f"{allowed}"
                )
            yield from _excess(section, gpu)


def _near(ref: ProfileRef, profiles: Iterable[MigProfile]) -> str:
    """The value that the author probably means."""
    import difflib

    found = difflib.get_close_matches(str(ref), dict.fromkeys(profile.name for profile in profiles), 1)
    return f"; did you mean {found[0]}?" if found else ""


def _missing(section: Section, gpus: Sequence[Gpu]) -> Iterator[str]:
    """One clause for each profile, suffix or mode of this section that no card has. Empty if there are no cards."""
    profiles = [profile for gpu in gpus for profile in gpu.profiles]
    if not gpus:
        return
    for ref in section.profiles or ():
        if not any(ref in (profile.id, profile.name) for profile in profiles):
            yield f"names profile {ref}, which its GPUs do not have{_near(ref, profiles)}"
    for suffix in section.suffixes or ():
        if not any(profile.suffix == suffix for profile in profiles):
            yield f"asks for suffix {suffix}, which no profile of its GPUs has"
    if Mode.MPS in (section.modes or ()) and not any(map(_has_mps, gpus)):
        yield "asks for mode mps, for which its GPUs are too old; it needs compute capability 7.0"
    for ref, _ in () if isinstance(section.static, Parts) else section.static or ():
        if not any(ref in (profile.id, profile.name) for profile in profiles):
            yield f"has profile {ref} in its static layout, which its GPUs do not have{_near(ref, profiles)}"


def _excess(section: Section, gpu: Gpu) -> Iterator[str]:
    """Limits of this card's NVIDIA driver that are lower than this section's values. Another driver may have higher ones."""
    most = client_limit(gpu)
    for count, what in ((section.mps_clients, "clients"), (section.mps_shares, "shares")):
        if count is not None and count > most and _has_mps(gpu):
            yield f"policy: mps.{what} is {count}, but GPU {gpu.index} serves at most {most} with CUDA {gpu.cuda_version}"


def client_limit(gpu: Gpu) -> int:
    """CUDA contexts that one MPS daemon serves on a whole card (NVIDIA's MPS documentation, as of CUDA 13.1).

    The limit of cards before Volta (16) is not here, because such a card offers no MPS.
    """
    return 60 if _numbers(gpu.cuda_version) >= (13, 1) else 48


def _least_share_mib(section: Section) -> int:
    return LEAST_SHARE_MIB if section.least_share_bytes is None else max(1, section.least_share_bytes // MIB)


def _has_mps(gpu: Gpu) -> bool:
    return _numbers(gpu.compute_capability) >= _VOLTA


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def _static(section: Section, gpu: Gpu, modes: frozenset[Mode]) -> tuple[tuple[MigProfile, int], ...] | Parts:
    """The parts into which this card is divided. Empty if the card cannot be divided, or must not."""
    if isinstance(section.static, Parts):
        return section.static if section.static.mode in modes else ()
    if not gpu.profiles or Mode.MIG not in modes or any(_static_strangers(section, gpu)):
        return ()
    return tuple(
        (profile, count)
        for ref, count in section.static or ()
        for profile in gpu.profiles
        if ref in (profile.id, profile.name)
    )


def _static_strangers(section: Section, gpu: Gpu) -> Iterator[ProfileRef]:
    """Profiles of the static layout that this card lacks. Empty if the card cannot be partitioned at all."""
    if isinstance(section.static, Parts) or not gpu.profiles or Mode.MIG not in (section.modes or ALL_MODES):
        return
    for ref, _ in section.static or ():
        if not any(ref in (profile.id, profile.name) for profile in gpu.profiles):
            yield ref


def _has(gpu: Gpu) -> str:
    names = ", ".join(f"{profile.name} ({profile.id})" for profile in gpu.profiles)
    return f"{gpu.product} has {names or 'no MIG profiles'}"


def _cards(gpus: Iterable[Gpu]) -> str:
    return "the node has " + (", ".join(sorted({gpu.product for gpu in gpus})) or "no GPU")
