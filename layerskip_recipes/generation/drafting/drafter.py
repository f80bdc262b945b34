"""The interface between the engine and whatever drafts."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from layerskip_recipes.generation.steps import StepContext


class RoundStart(NamedTuple):
    """What a drafter may know of the text when a round begins."""

    last: torch.Tensor  # [b], the last token of each row
    start: torch.Tensor  # [b], its slot
    last_slot: int  # the largest of these slots
    seen: torch.Tensor | None  # [b, v] bool, the tokens so far, where the sampler penalises them
    finished: Sequence[bool]  # [b], rows whose text is complete
    room: int  # the most tokens that a row may still get

    def depth(self, context: StepContext, longest: int) -> int:
        """How many tokens to draft: no more than can be kept; but graphs are made for one depth only."""
        return longest if context.graphs is not None else min(longest, self.room - 1)


@dataclass(frozen=True)
class DraftStrategy:
    """A kind of draft, the unit between which `DiscountedUCB` chooses.

    Args:
        name: "plain" (no draft), "chain" or "lookup".
        match: of a look-up how long a text was found again: 0, 1 or 2, see `TextIndex.find`.
    """

    name: str
    match: int = 0


PLAIN = DraftStrategy("plain")


@dataclass
class DraftedTokens:
    """The tokens proposed for one round; without any the round is a step of the full model.

    Args:
        strategy: that proposed them.
        slots: 0 .. end-1, what attention sees in this round.
        tokens: [b, 1 + n], the last token of the text first.
        hidden: [b, n, d], x_E of all but the last one; None: verification starts from the tokens.
        q: [b, n, v'], the distributions that tokens were drawn from; None when greedy or looked up.
    """

    strategy: DraftStrategy
    slots: torch.Tensor
    tokens: torch.Tensor
    hidden: torch.Tensor | None = None
    q: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """n, the drafted tokens of a row."""
        return self.tokens.shape[1] - 1


class Drafter(ABC):
    """Proposes a draft each round, and verifies it. Whatever it proposes, the output is that of the full model.

    Attributes:
        behind: the last tokens of the cache that the draft's own layers have not read.
    """

    behind: int = 0

    @abstractmethod
    def propose(self, now: RoundStart) -> DraftedTokens:
        """The draft of the next round."""

    @abstractmethod
    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        """[b, 2 + n]: how many drafted tokens stand, the full model's next token, the drafted tokens."""

    def begin(self, final: torch.Tensor) -> None:  # noqa: B027 - only some drafters need it
        """The text is in the cache; final [b, d] is x_L of each row's last token there."""

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:  # noqa: B027 - only some drafters need it
        """A row goes on from another text, which is in the cache; final [d] is x_L of its last token."""

    def learn(self, strategy: DraftStrategy, tokens: float, seconds: float) -> None:  # noqa: B027 - only some drafters need it
        """A round that no limit cut gave each running row so many tokens, on the mean, in so many seconds; 0 if
        something was compiled meanwhile, as that does not repeat."""

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:  # noqa: B027 - only some drafters need it
        """The text of each row goes on by these tokens, [b][any number]."""
