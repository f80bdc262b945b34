"""Rounds without a draft: one token per step of the model or of its first layers."""

import torch
import torch.nn.functional as F

from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftedTokens, Drafter, RoundStart
from layerskip_recipes.generation.steps import Step, StepContext, choose_token, next_logits


class PlainDrafter(Drafter):
    def __init__(self, context: StepContext, exit_layer: int) -> None:
        self.context, self.depth = context, exit_layer

    def propose(self, now: RoundStart) -> DraftedTokens:
        return no_draft(self.context, now)

    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        noise = self.context.noise()
        logits = Step(self.context, next_logits, self.depth, choice=False)(draft.slots, now.last, now.start)
        return choose(self.context, logits, noise, now.seen)


def no_draft(context: StepContext, now: RoundStart) -> DraftedTokens:
    return DraftedTokens(PLAIN, context.cache.slots[: now.last_slot + 1], now.last[:, None])


def choose(
    context: StepContext, logits: torch.Tensor, noise: torch.Tensor | None, seen: torch.Tensor | None
) -> torch.Tensor:
    """The result of `Drafter.verify` for a step's logits [b, v]: [b, 2]."""
    step = Step(context, choose_token, layers=False)
    chosen = step.run(None, logits, noise, seen) if context.sampler.greedy else step(None, logits, noise, seen)
    return F.pad(chosen[:, None], (1, 0))
