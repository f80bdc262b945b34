"""The choice between drafting from an exit and looking up in the text, by the tokens per second that each one gave.

The choice is lossless: it decides who drafts, never what is accepted.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from layerskip_recipes.generation.drafting.chain import ChainDrafter
from layerskip_recipes.generation.drafting.drafter import DraftedTokens, Drafter, DraftStrategy, RoundStart
from layerskip_recipes.generation.drafting.lookup import LookupDrafter
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.steps import StepContext


@dataclass
class _Record:
    """What is known of one strategy."""

    rounds: int = 0
    weight: float = 0.0  # of its rounds, falling with age
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=32))  # seconds, tokens

    @property
    def rate(self) -> float:
        """Tokens per second of a row, 0 if nothing is known; outliers are clipped at three times the median."""
        if not self.recent:
            return 0.0
        most = 3 * median(seconds for seconds, _ in self.recent)
        return sum(tokens for _, tokens in self.recent) / sum(min(seconds, most) for seconds, _ in self.recent)


class DiscountedUCB:
    """Chooses the strategy that gives most tokens per second: each is tried, then the one with the best bound runs.

    The bound is the rate and a margin, as the tokens of a round vary as much as their mean: discounted upper confidence
    bounds (Garivier and Moulines, arXiv 0805.3415). The weight of a measurement falls with every round, so a strategy
    that was unlucky, or a text that changed, gets another try. Pass one object to several generations to keep what was
    learned.

    Args:
        trial: rounds of each strategy before any choice.
        memory: rounds of any strategy after which a round has lost two thirds of its weight.
        margin: of a rate that one round stands for; for n rounds 1 / sqrt(n) of that.
    """

    def __init__(self, trial: int = 4, memory: float = 64.0, margin: float = 0.7) -> None:
        self.trial, self.memory, self.margin = trial, memory, margin
        self.records: dict[DraftStrategy, _Record] = {}

    def pick(self, strategies: Sequence[DraftStrategy]) -> DraftStrategy:
        """One of the strategies that the next round may use."""
        records = {strategy: self.records.setdefault(strategy, _Record()) for strategy in strategies}
        fewest = min(strategies, key=lambda strategy: records[strategy].rounds)
        if records[fewest].rounds < self.trial:
            return fewest
        return max(strategies, key=self._bound)

    def learn(self, strategy: DraftStrategy, tokens: float, seconds: float) -> None:
        """A round of this strategy gave each row so many tokens in so many seconds."""
        record = self.records.setdefault(strategy, _Record())
        for other in self.records.values():
            other.weight *= 1 - 1 / self.memory
        record.rounds += 1
        record.weight += 1
        record.recent.append((seconds, tokens))

    def rate(self, strategy: DraftStrategy) -> float:
        """Tokens per second that a strategy gives a row, 0 if it never ran."""
        return self.records.get(strategy, _Record()).rate

    def _bound(self, strategy: DraftStrategy) -> float:
        record = self.records[strategy]
        return record.rate * (1 + self.margin / math.sqrt(record.weight))


class ChoosingDrafter(Drafter):
    """Drafts from the exit or, where the text offers a draft and that pays, from the text.

    Look-ups of short and of long matches are strategies of their own: judged together, they were dropped after a few
    bad ones (docs/results.md).

    Args:
        drafter: from an exit.
        lookup: from the text.
        choice: learns their rates.
        context: asks rank 0 for its clock's word, so that all ranks choose the same strategy.
    """

    def __init__(self, drafter: Drafter, lookup: LookupDrafter, choice: DiscountedUCB, context: StepContext) -> None:
        self.drafter, self.lookup, self.choice, self.context = drafter, lookup, choice, context
        self.strategy = drafter.strategy

    def begin(self, final: torch.Tensor) -> None:
        self.drafter.begin(final)

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:
        self.drafter.replace(row, text, final)
        self.lookup.replace(row, text)

    def propose(self, now: RoundStart) -> DraftedTokens:
        found = self.lookup.propose(now)
        offered = [self.drafter.strategy, *([found.strategy] if found.length else [])]
        return found if self.choice.pick(offered) == found.strategy else self.drafter.propose(now)

    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        return self.drafter.verify(draft, now)

    def learn(self, draft: DraftedTokens, tokens: float, seconds: float) -> None:
        if self.context.shared:  # all ranks learn rank 0's time, so that they choose alike
            on_device = torch.tensor(seconds, device=self.context.device, dtype=torch.float32)
            seconds = self.context.broadcast(on_device).item()
        if seconds:
            self.choice.learn(draft.strategy, tokens, seconds)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        self.lookup.extend(tokens)


def make_drafter(
    speculation: Speculation,
    context: StepContext,
    prompts: Sequence[Sequence[int]],
    choice: DiscountedUCB | None = None,
) -> Drafter:
    """The drafter of a speculation.

    Args:
        speculation: checked for this model.
        choice: with what earlier generations learned; None: nothing is known yet.
    """
    drafter = ChainDrafter(context, speculation.exit_layer, speculation.num_speculations)
    if speculation.prompt_lookup is None:
        return drafter
    lookup = LookupDrafter(context, speculation.num_speculations, speculation.prompt_lookup, prompts)
    return ChoosingDrafter(drafter, lookup, choice or DiscountedUCB(), context)
