"""The drafters of a generation, and which of them drafts in a round."""

from collections.abc import Sequence

import torch

from layerskip_recipes.generation.drafting.chain import ChainDrafter
from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftedTokens, Drafter, RoundKind, RoundStart
from layerskip_recipes.generation.drafting.lookup import LookupDrafter
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.drafting.verification import Verifier


class Drafters:
    """The drafters of a plan (none without one), and the rule that picks one of them, or none, in each round.

    `texts` are those in which look-ups search, see `BatchRows.searched`.
    """

    def __init__(
        self,
        verifier: Verifier,
        plan: Speculation | None,
        texts: Sequence[Sequence[int]],
        rule: DraftRule | None = None,
    ) -> None:
        self.verifier, self.context = verifier, verifier.context
        self.rule = DraftRule(measure=False) if rule is None or plan is None else rule
        self.num_speculations = 0 if plan is None else plan.num_speculations
        self.drafters = list[Drafter]()
        if plan is not None and plan.exit_layer is not None:
            self.drafters.append(ChainDrafter(verifier, plan.num_speculations, plan.min_confidence))
        if plan is not None and plan.looks_up:
            settings = (plan.num_speculations, plan.prompt_lookup, plan.answers)
            self.drafters.append(LookupDrafter(self.context, *settings, texts))
        self.offered = dict[RoundKind, Drafter]()  # in this round

    def begin(self) -> None:
        self.rule.begin_text()

    def replace(self, row: int, text: Sequence[int]) -> None:
        self.rule.begin_text()
        for drafter in self.drafters:
            drafter.replace(row, text)

    def propose(self, round_start: RoundStart) -> DraftedTokens:
        """The draft that the rule picks among the drafters' offers, or no tokens for a plain step."""
        offers = [(drafter.offer(round_start), drafter) for drafter in self.drafters]
        self.offered = {kind: drafter for kind, drafter in offers if kind is not None}
        picked = self.rule.pick([*self.offered])
        if picked == PLAIN:
            self.offered = {}  # the one token of this round tells too little of them
            return DraftedTokens(PLAIN, round_start.last[:, None])
        return self.offered[picked].propose(round_start)

    def learn(self, kind: RoundKind, tokens: float, seconds: float) -> None:
        """After a round that no limit cut: mean tokens per running row, and seconds (0 if it compiled something)."""
        if self.context.shared and self.rule.measures(kind):  # all ranks decide by rank 0's clock
            rank0_seconds = self.context.broadcast(
                torch.tensor(seconds, dtype=torch.float64, device=self.context.device)
            )
            seconds = rank0_seconds.item()
        self.rule.learn(kind, tokens, seconds)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append a round's final tokens [b][any number] to the rows' texts."""
        mean_tokens = {drafter: drafter.extend(tokens) for drafter in self.drafters}
        for kind, drafter in self.offered.items():
            if (mean := mean_tokens[drafter]) is not None:
                self.rule.observe(kind, mean)
        self.offered = {}
