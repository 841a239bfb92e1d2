"""The parts of a policy document as classes. `reading` creates their objects from the document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from enum import StrEnum

from gpuslice.core.model import Gpu, MigProfile, Setting

KEYS = (
    *(
        "modes",
        "profiles",
        "suffixes",
        "reserve",
        "mps",
        "timeslice",
        "leastShare",
        "sharedPartitions",
        "static",
        "keep",
    ),
)
SHARES = 4  # default number of shares: a claim without a capacity request gets a quarter of the device
LEAST_SHARE_MIB = 256  # default: a CUDA context alone needs more, so no program could use less


class Mode(StrEnum):
    """How claims may use a card. A card has one mode at a time, because the counters exclude all others."""

    GPU = "gpu"
    MIG = "mig"
    MPS = "mps"
    TIMESLICE = "timeslice"


SHARED = (Mode.MPS, Mode.TIMESLICE)  # modes with many claims on one device, in the order of the offer
ProfileRef = str | int  # a name ("1g.10gb"), or the GPU-instance profile id, which no driver update changes


@dataclass(frozen=True, slots=True)
class Parts:
    """A whole card in `count` fixed and equal parts, for clusters that know no shared devices. `mode` is one of `SHARED`."""

    mode: Mode
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """The cards of an entry. A card must match all named facts, and of each fact one value. () matches every card."""

    index: tuple[int, ...] = ()
    uuid: tuple[str, ...] = ()
    product: tuple[str, ...] = ()  # "*" matches any text; upper and lower case are equal

    def __contains__(self, gpu: Gpu) -> bool:
        return (
            (not self.index or gpu.index in self.index)
            and (not self.uuid or gpu.uuid in self.uuid)
            and (not self.product or any(_glob(glob, gpu.product) for glob in self.product))
        )

    def covers(self, other: Match) -> bool:
        """Whether this match includes every card that `other` matches."""
        return (
            (not self.index or (bool(other.index) and set(other.index) <= set(self.index)))
            and (not self.uuid or (bool(other.uuid) and set(other.uuid) <= set(self.uuid)))
            and (not self.product or all(map(self._names, other.product or ("*",))))
        )

    def _names(self, glob: str) -> bool:
        """Whether a glob of ours covers the other glob. Its star is treated as a character that only our star can match."""
        return any(_glob(mine, glob) for mine in self.product)

    def alternatives(self) -> Iterator[Match]:
        """The same cards as several matches with one value of each fact. Several other matches may cover them one by one."""
        for index in self.index or (None,):
            for uuid in self.uuid or (None,):
                for product in self.product or (None,):
                    yield Match(
                        index=() if index is None else (index,),
                        uuid=() if uuid is None else (uuid,),
                        product=() if product is None else (product,),
                    )

    def certain(self) -> bool:
        """Whether the match names an exact card or product. Then a profile that the product does not have is a mistake."""
        return bool(self.uuid) or (len(self.product) == 1 and "*" not in self.product[0])


def _glob(glob: str, text: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in glob.casefold().split("*"))
    return re.fullmatch(pattern, text.casefold()) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """The settings of one section of the policy. None for each setting that the section does not have."""

    modes: tuple[Mode, ...] | None = None
    profiles: tuple[ProfileRef, ...] | None = None
    suffixes: tuple[str, ...] | None = None
    reserve_bytes: int | None = None
    mps_shares: int | None = None
    mps_clients: int | None = None
    timeslice_shares: int | None = None
    timeslice_interval: str | None = None
    least_share_bytes: int | None = None
    shared_partitions: tuple[Mode, ...] | None = None
    static: tuple[tuple[ProfileRef, int], ...] | Parts | None = None
    keep: tuple[Setting, ...] | None = None

    def merged_over(self, base: Section) -> Section:
        """The settings of this section, else of the base. `profiles` and `suffixes` count as one setting."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if self.profiles is not None or self.suffixes is not None:
            base = replace(base, profiles=None, suffixes=None)
        return replace(base, **given)

    def said(self) -> list[str]:
        """The keys of this section, as the document spells them. Only the keys that errors about a card can name."""
        fields_of = {
            "reserve": self.reserve_bytes,
            "mps": self.mps_shares or self.mps_clients,
            "timeslice": self.timeslice_shares,
            "leastShare": self.least_share_bytes,
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
