"""The parts of the story: which card does what, and amounts that fit the cards. Pure, so it is known before the start.

The scheduler takes the first device that fits, in the order of the cards. So claims partition the first card with MIG,
and the story needs one more card to share. One claim holds all other cards of the node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpuslice.nvml.sim.models import Product
from gpuslice.nvml.sim.spec import NodeSpec


@dataclass(frozen=True, slots=True)
class PlayingCard:
    """A card of the node, and what claims can do with it. Without a reset, an Ampere card keeps its MIG mode."""

    product: Product
    mig: bool

    @property
    def cuttable(self) -> bool:
        return bool(self.product.profiles) and (self.mig or self.product.resetless)

    @property
    def whole(self) -> bool:
        """Whether claims can get the whole card, or shares of it."""
        return not self.mig or self.product.resetless


@dataclass(frozen=True, slots=True)
class Cast:
    cards: tuple[PlayingCard, ...]  # in the order of their index

    @classmethod
    def of(cls, spec: NodeSpec) -> Cast:
        return cls(tuple(PlayingCard(m, c.mig) for m, c in zip(spec.models(), spec.cards, strict=True)))

    @property
    def cut(self) -> int | None:
        """The card that claims partition. None if there is none."""
        return next((index for index, card in enumerate(self.cards) if card.cuttable), None)

    @property
    def wholes(self) -> tuple[int, ...]:
        """The cards that claims can get whole while another card is partitioned."""
        return tuple(index for index, card in enumerate(self.cards) if card.whole and index != self.cut)

    @property
    def shared(self) -> int | None:
        """The card that claims share: if possible not `cut`, and if possible a card with MIG."""
        alone = self.cut if self.cut is not None and self.cards[self.cut].whole else None
        return min(self.wholes, key=lambda index: (not self.cards[index].cuttable, index), default=alone)

    @property
    def two(self) -> bool:
        """Whether partitions and shares are on two cards."""
        return self.cut is not None and bool(self.wholes)

    @property
    def extras(self) -> tuple[int, ...]:
        """The cards that the story does not use. One claim holds them."""
        return tuple(index for index in self.wholes if index != self.shared)

    @property
    def share_cut(self) -> bool:
        """Whether the shared card can be partitioned too."""
        return self.shared is not None and self.cards[self.shared].cuttable

    @property
    def stuck(self) -> bool:
        """Whether the node has cards with MIG, but MIG mode is off on all of them and needs a reset."""
        return self.cut is None and any(card.product.profiles for card in self.cards)

    def gib(self, share: float, card: int | None = None) -> str:
        """This part of a card's memory in whole Gi. Without `card`: of the shared card."""
        at = card if card is not None else self.shared
        return f"{max(1, round(self.cards[at or 0].product.memory_mib / 1024 * share))}Gi"


def numbers(indices: Sequence[int]) -> str:
    """ "GPU 2", "GPU 2 and 3", "GPU 2 to 15": cards in the words of a sentence."""
    *first, last = indices
    if not first:
        return f"GPU {last}"
    if len(indices) > 2 and last - first[0] == len(indices) - 1:
        return f"GPU {first[0]} to {last}"
    return f"GPU {', '.join(map(str, first))} and {last}"
