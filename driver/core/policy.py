"""What each GPU of a node may offer: the operator's policy, applied to a card at hand.

`default` speaks for every card, each entry of `gpus` for the cards that it matches, and overrides the default key by
key. The **first** entry that matches a card counts, so that the order is read from top to bottom; an entry to which
an earlier one leaves nothing is an error. So is any setting without an effect, for it shows that its author means
another thing than the driver does.
What only a node can tell (an entry for cards that this node does not have) is no error, for one policy serves a fleet:
`Policy.unused` says it in sentences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from driver.core import terms
from driver.core.model import Gpu, MigProfile
from driver.core.terms import ALL_MODES, Mode, Rule, Terms
from driver.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuPolicy:
    """What one card may offer."""

    modes: frozenset[Mode]
    profiles: tuple[MigProfile, ...]  # empty while `mig` is not among the modes
    reserve_bytes: int  # memory of the whole card that is not sold
    static: tuple[tuple[MigProfile, int], ...] = ()  # MIG layout for clusters without partitionable devices


@dataclass(frozen=True, slots=True)
class Policy:
    base: Terms = field(default_factory=Terms)
    rules: tuple[Rule, ...] = ()

    @staticmethod
    def default() -> Policy:
        """Every mode, every profile without a suffix, what NVML says is reserved."""
        return Policy()

    @staticmethod
    def parse(body: Mapping[str, object]) -> Policy:
        """An already loaded document. ConfigError names the path, the limit and the remedy."""
        return Policy(*terms.read(body))

    def of(self, gpu: Gpu) -> GpuPolicy:
        """What this card may offer. ConfigError where the policy asks of it what it certainly cannot do."""
        rule = self._rule(gpu)
        said = rule.terms.over(self.base) if rule else self.base
        modes = frozenset(said.modes or ALL_MODES)
        if rule is not None and rule.match.certain():
            for missing in _missing(rule.terms, [gpu]):
                raise ConfigError(f"policy: {rule.path} {missing}; {_has(gpu)}")
        mig = Mode.MIG in modes
        return GpuPolicy(
            modes=modes,
            profiles=tuple(profile for profile in gpu.profiles if mig and said.wants(profile)),
            reserve_bytes=gpu.reserved_bytes if said.reserve_bytes is None else said.reserve_bytes,
            static=_static(said, gpu) if mig else (),
        )

    def unused(self, gpus: Iterable[Gpu]) -> tuple[str, ...]:
        """What this policy says that has no effect on these cards, one sentence each."""
        return tuple(self._unused(tuple(gpus)))

    def _rule(self, gpu: Gpu) -> Rule | None:
        return next((rule for rule in self.rules if gpu in rule.match), None)

    def _unused(self, gpus: tuple[Gpu, ...]) -> Iterator[str]:
        for rule in self.rules:
            here = [gpu for gpu in gpus if self._rule(gpu) == rule]
            if not here:
                yield f"policy: {rule.path} matches no GPU of this node; {_cards(gpus)}"
            for missing in _missing(rule.terms, here):
                yield f"policy: {rule.path} {missing}"
        for missing in _missing(self.base, gpus):
            yield f"policy: default {missing}"
        for gpu in gpus:
            mine = self.of(gpu)
            if Mode.GPU not in mine.modes and not mine.profiles:
                yield f"policy: GPU {gpu.index} ({gpu.product}) offers nothing: mode mig only, and no profile to offer"


def _missing(said: Terms, gpus: Sequence[Gpu]) -> Iterator[str]:
    """References of these terms that none of the cards can follow. No card, no complaint."""
    profiles = [profile for gpu in gpus for profile in gpu.profiles]
    if not gpus:
        return
    for ref in said.profiles or ():
        if not any(ref in (profile.id, profile.name) for profile in profiles):
            yield f"names profile {ref}, which its GPUs do not have"
    for suffix in said.suffixes or ():
        if not any(profile.suffix == suffix for profile in profiles):
            yield f"asks for suffix {suffix}, which no profile of its GPUs has"
    for ref, _ in said.static or ():
        if not any(ref in (profile.id, profile.name) for profile in profiles):
            yield f"has profile {ref} in its static layout, which its GPUs do not have"


def _static(said: Terms, gpu: Gpu) -> tuple[tuple[MigProfile, int], ...]:
    """The static layout with this card's profiles; none on a card that has no MIG. ConfigError for an unknown one."""
    if not gpu.profiles:
        return ()
    layout = []
    for ref, count in said.static or ():
        profile = next((profile for profile in gpu.profiles if ref in (profile.id, profile.name)), None)
        if profile is None:
            raise ConfigError(
                f"policy: the static layout of GPU {gpu.index} ({gpu.product}) names profile {ref}, which it does not"
                f" have; {_has(gpu)}, or give this product an entry of its own"
            )
        layout.append((profile, count))
    return tuple(layout)


def _has(gpu: Gpu) -> str:
    names = ", ".join(f"{profile.name} ({profile.id})" for profile in gpu.profiles)
    return f"{gpu.product} has {names or 'no MIG profiles'}"


def _cards(gpus: Iterable[Gpu]) -> str:
    return "it has " + (", ".join(sorted({gpu.product for gpu in gpus})) or "no GPU")
