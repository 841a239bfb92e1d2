"""What a policy document says, as nouns. `reading` makes them of the document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from gpuslice.core.model import Gpu, MigProfile, Setting

KEYS = ("modes", "profiles", "suffixes", "reserve", "mps", "timeslice", "sharedPartitions", "static", "keep")
SHARES = 4  # of a shared device, where the policy says nothing: a claim that says nothing gets a quarter of it


class Mode(StrEnum):
    """How a card may be used. A card has one mode at a time, because the counters exclude all others."""

    GPU = "gpu"
    MIG = "mig"
    MPS = "mps"
    TIMESLICE = "timeslice"


SHARED = (Mode.MPS, Mode.TIMESLICE)  # many claims on one device, in the order in which they are offered
ProfileRef = str | int  # a name ("1g.10gb"), or the GPU-instance profile id, which no driver update renames


@dataclass(frozen=True, slots=True)
class Parts:
    """A whole card in `count` fixed and equal parts, for clusters that know no shared devices. `mode` is one of `SHARED`."""

    mode: Mode
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Which cards an entry speaks for: all named facts must agree, each with any of its values. () is "any"."""

    index: tuple[int, ...] = ()
    uuid: tuple[str, ...] = ()
    product: tuple[str, ...] = ()  # "*" stands for any text; upper and lower case are the same

    def __contains__(self, gpu: Gpu) -> bool:
        return (
            (not self.index or gpu.index in self.index)
            and (not self.uuid or gpu.uuid in self.uuid)
            and (not self.product or any(_glob(glob, gpu.product) for glob in self.product))
        )

    def covers(self, other: Match) -> bool:
        """Whether every card that `other` matches is matched here too."""
        return (
            (not self.index or (bool(other.index) and set(other.index) <= set(self.index)))
            and (not self.uuid or (bool(other.uuid) and set(other.uuid) <= set(self.uuid)))
            and (not self.product or all(map(self._names, other.product or ("*",))))
        )

    def _names(self, glob: str) -> bool:
        """A star of the other glob is an ordinary character here, which only a star of ours can match: that covers."""
        return any(_glob(mine, glob) for mine in self.product)

    def alternatives(self) -> Iterator[Match]:
        """The same cards, as matches that name one value of each fact: what several others cover together is one by one."""
        for index in self.index or (None,):
            for uuid in self.uuid or (None,):
                for product in self.product or (None,):
                    yield Match(
                        index=() if index is None else (index,),
                        uuid=() if uuid is None else (uuid,),
                        product=() if product is None else (product,),
                    )

    def certain(self) -> bool:
        """Whether the author knew which product this is, so that a profile which it lacks is a mistake."""
        return bool(self.uuid) or (len(self.product) == 1 and "*" not in self.product[0])


def _glob(glob: str, text: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in glob.casefold().split("*"))
    return re.fullmatch(pattern, text.casefold()) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What one section of the policy says; None where it says nothing."""

    modes: tuple[Mode, ...] | None = None
    profiles: tuple[ProfileRef, ...] | None = None
    suffixes: tuple[str, ...] | None = None
    reserve_bytes: int | None = None
    mps_shares: int | None = None
    mps_clients: int | None = None
    timeslice_shares: int | None = None
    timeslice_interval: str | None = None
    shared_partitions: tuple[Mode, ...] | None = None
    static: tuple[tuple[ProfileRef, int], ...] | Parts | None = None
    keep: tuple[Setting, ...] | None = None

    def merged_over(self, base: Section) -> Section:
        """This section where it says something, else the base. `profiles` and `suffixes` are one question."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.profiles is not None or self.suffixes is not None:
            base = replace(base, profiles=None, suffixes=None)
        return replace(base, **given)

    def said(self) -> list[str]:
        """The document's keys of what this section says, of those that errors about a card name."""
        fields_of = {
            "reserve": self.reserve_bytes,
            "mps": self.mps_shares or self.mps_clients,
            "timeslice": self.timeslice_shares,
            "static": self.static,
        }
        return [key for key, value in fields_of.items() if value is not None]

    def wants(self, profile: MigProfile) -> bool:
        if self.profiles is not None:
            return profile.id in self.profiles or profile.name in self.profiles
        return not profile.suffix or profile.suffix in (self.suffixes or ())


@dataclass(frozen=True, slots=True)
class Rule:
    path: str
    match: Match
    section: Section


ALL_MODES = tuple(Mode)
