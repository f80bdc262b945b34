"""What the engine does in a round: a plain step, or the draft that the rule picks and its verification."""

from collections.abc import Sequence

import torch

from layerskip_recipes.generation.drafting.chain import ChainDrafter
from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftedTokens, Drafter, RoundKind, RoundStart
from layerskip_recipes.generation.drafting.lookup import LookupDrafter
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.steps import StepContext


class Decoding:
    """Drafts from the exit, from the text (prompt look-up) or not at all. The chain verifies all drafts.

    With the whole model as the exit, only the other drafters draft. Without a speculation, nothing drafts.
    """

    def __init__(
        self, context: StepContext, speculation: Speculation | None, texts: Sequence[Sequence[int]], rule: DraftRule
    ) -> None:
        self.context, self.rule, self.offered = context, rule, dict[RoundKind, Drafter]()
        self.num_speculations, self.drafters = 0, list[Drafter]()
        self.chain = ChainDrafter(context, context.depth)
        if speculation is not None:
            self.num_speculations = num_speculations = speculation.num_speculations
            self.chain = ChainDrafter(context, speculation.exit_layer, num_speculations, speculation.min_confidence)
            others = list[Drafter]()
            if speculation.prompt_lookup is not None:
                others.append(LookupDrafter(context, num_speculations, speculation.prompt_lookup, texts))
            whole = speculation.exit_layer == context.model.num_layers and context.draft_decoder is context.model
            self.drafters = others if whole and others else [self.chain, *others]

    def begin(self, final: torch.Tensor) -> None:
        self.rule.begin_text()
        for drafter in {*self.drafters, self.chain}:
            drafter.begin(final)

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:
        self.rule.begin_text()
        for drafter in {*self.drafters, self.chain}:
            drafter.replace(row, text, final)

    def propose(self, now: RoundStart) -> DraftedTokens:
        offers = [(drafter.offer(now), drafter) for drafter in self.drafters]
        self.offered = {kind: drafter for kind, drafter in offers if kind is not None}
        picked = self.rule.pick([*self.offered])
        if picked == PLAIN:
            return DraftedTokens(PLAIN, now.last[:, None])
        return self.offered[picked].propose(now)

    def learn(self, kind: RoundKind, tokens: float, seconds: float) -> None:
        """After a round that no limit cut: mean tokens per running row, and seconds (0 if it compiled something)."""
        if self.rule.measures(kind) and self.context.shared:  # all ranks decide by rank 0's clock
            told = self.context.broadcast(torch.tensor(seconds, dtype=torch.float64, device=self.context.device))
            seconds = told.item()
        self.rule.learn(kind, tokens, seconds)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append a round's final tokens [b][any number] to the rows' texts."""
        given = {drafter: drafter.extend(tokens) for drafter in self.drafters}
        for kind, drafter in self.offered.items():
            if (mean := given[drafter]) is not None:
                self.rule.observe(kind, mean)
        self.offered = {}
