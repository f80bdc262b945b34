"""The interface of drafters."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import torch

from layerskip_recipes.generation.steps import StepContext


def longest_draft(num_speculations: int, max_new_tokens: int) -> int:
    """The most tokens that a draft of an output can have: the prefill gives its first token, and the round that ends
    it one token of the model's own."""
    return min(num_speculations, max_new_tokens - 2)


class RoundStart(NamedTuple):
    """The state of the text when a round begins."""

    last: torch.Tensor  # [b], the last token of each row
    start: torch.Tensor  # [b], its KV-cache slot
    last_slot: int  # the largest of these slots
    keys: torch.Tensor | None  # [b, 2], the keys of the noise; None if greedy
    seen: torch.Tensor | None  # [b, v] bool, the tokens so far; None without a repetition penalty
    finished: Sequence[bool]  # [b]
    room: int  # the most tokens that any row may still get

    def num_to_draft(self, context: StepContext, num_speculations: int) -> int:
        """How many tokens to draft: no more than fit, but always `num_speculations` with graphs (one shape)."""
        return num_speculations if context.backend.fixed_shapes else min(num_speculations, self.room - 1)

    def slots(self, context: StepContext, num_drafted: int = 0) -> torch.Tensor:
        """0 .. end-1, the slots that attention sees with so many drafted tokens."""
        return context.cache.slots[: self.last_slot + num_drafted + 1]


@dataclass(frozen=True)
class RoundKind:
    """`DraftRule` picks the kind of each round. Two drafters never offer equal ones."""

    name: str  # "plain" (no draft), "chain", "lookup" or another drafter's; unique
    # Of a look-up: 0, 1 or 2 for less than 1, less than 3, or more tokens that are expected to be right.
    expected: int = 0
    # Tokens per round that the rule expects before the first one; inf: it tries the draft soon.
    untried: float = field(default=inf, compare=False)


PLAIN = RoundKind("plain")


@dataclass
class DraftedTokens:
    """The tokens drafted for one round; without any the round is a step of the full model."""

    round_kind: RoundKind
    tokens: torch.Tensor  # [b, 1 + n], the last token of the text first
    hidden: torch.Tensor | None = None  # [b, n, d], x_E of all but the last; None: verification runs all layers
    outcome: torch.Tensor | None = None  # the result of `Verifier.verify`, if it is known already
    draft_steps: int = 0  # passes of the layers and the head that draft

    @property
    def num_drafted(self) -> int:
        """n, per row."""
        return self.tokens.shape[1] - 1


class Drafter(ABC):
    """Proposes drafts. A draft never changes the output, which is the full model's."""

    @abstractmethod
    def offer(self, round_start: RoundStart) -> RoundKind | None:
        """What kind of draft it has for this round; None: no draft. Called in each round, whatever the rule picks."""

    @abstractmethod
    def propose(self, round_start: RoundStart) -> DraftedTokens:
        """The draft that it offered: the text's last token and n tokens for each row, which are any tokens of the model
        for a finished row. n is `round_start.num_to_draft(context, num_speculations)`, or less on a CPU, and not 0."""

    def replace(self, row: int, text: Sequence[int]) -> None:  # noqa: B027 - only some drafters need it
        """A batch row continues another text, which is in the cache and, behind predictions, the end of `text`."""

    @abstractmethod
    def extend(self, tokens: Sequence[Sequence[int]]) -> float | None:
        """Append a round's final tokens [b][any number] to the rows' texts; those of finished rows are empty.

        Returns the mean tokens per running row, the model's own one included, that this round's offer gave, or would
        have given; None: unknown. Forgets the offer.
        """
