"""The interface between the engine and a drafter."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from layerskip_recipes.generation.steps import Step, StepContext, choose_token, next_logits


class RoundStart(NamedTuple):
    """The state of the text when a round begins."""

    last: torch.Tensor  # [b], the last token of each row
    start: torch.Tensor  # [b], its KV-cache slot
    last_slot: int  # the largest of these slots
    keys: torch.Tensor | None  # [b, 2], the keys of the noise; None if greedy
    seen: torch.Tensor | None  # [b, v] bool, the tokens so far; None without a repetition penalty
    finished: Sequence[bool]  # [b]
    room: int  # the most tokens that any row may still get

    def draft_length(self, context: StepContext, longest: int) -> int:
        """How many tokens to draft: no more than fit, but always `longest` with graphs, which have one shape."""
        return longest if context.graphs is not None else min(longest, self.room - 1)

    def slots(self, context: StepContext, drafted: int = 0) -> torch.Tensor:
        """0 .. end-1, the slots that attention sees with so many drafted tokens."""
        return context.cache.slots[: self.last_slot + drafted + 1]


@dataclass(frozen=True)
class DraftStrategy:
    """A kind of draft; `DiscountedUCB` chooses between them."""

    name: str  # "plain" (no draft), "chain" or "lookup"
    match: int = 0  # of a look-up: the match length 0, 1 or 2, see `TextIndex.find`


PLAIN = DraftStrategy("plain")


@dataclass
class DraftedTokens:
    """The tokens drafted for one round; without any the round is a step of the full model."""

    strategy: DraftStrategy
    tokens: torch.Tensor  # [b, 1 + n], the last token of the text first
    hidden: torch.Tensor | None = None  # [b, n, d], x_E of all but the last; None: verification runs all layers

    @property
    def length(self) -> int:
        """n, the drafted tokens per row."""
        return self.tokens.shape[1] - 1


class Drafter(ABC):
    """Proposes and verifies a draft each round. A proposal never changes the output, which is the full model's."""

    behind: int = 0  # how many of the last tokens the draft's own layers have not read

    @abstractmethod
    def propose(self, now: RoundStart) -> DraftedTokens:
        """The draft of the next round."""

    @abstractmethod
    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        """[b, 2 + n]: the number of accepted tokens, the full model's next token, the drafted tokens."""

    def begin(self, final: torch.Tensor) -> None:  # noqa: B027 - only some drafters need it
        """After the prefill; final [b, d] is x_L of each row's last token in the cache."""

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:  # noqa: B027 - only some drafters need it
        """A batch row continues another text, which is in the cache; final [d] is x_L of its last token."""

    def learn(self, strategy: DraftStrategy, tokens: float, seconds: float) -> None:  # noqa: B027 - only some drafters need it
        """After a round that no limit cut: mean tokens per running row, and seconds (0 if it compiled something)."""

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:  # noqa: B027 - only some drafters need it
        """Append tokens [b][any number] to the rows' texts."""


class PlainDrafter(Drafter):
    """Never drafts: one token per step of the model's first `exit_layer` layers."""

    def __init__(self, context: StepContext, exit_layer: int) -> None:
        self.context, self.depth = context, exit_layer

    def propose(self, now: RoundStart) -> DraftedTokens:
        return DraftedTokens(PLAIN, now.last[:, None])

    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        logits = Step(self.context, next_logits, self.depth, choice=False)(now.slots(self.context), now.last, now.start)
        return choose_next(self.context, logits, now)


def choose_next(context: StepContext, logits: torch.Tensor, now: RoundStart) -> torch.Tensor:
    """The result of `Drafter.verify` for a step's logits [b, v]: [b, 2]."""
    step = Step(context, choose_token, layers=False)
    run = step.run if context.sampler.greedy else step
    return F.pad(run(None, logits, now.keys, now.start + 1, now.seen)[:, None], (1, 0))
