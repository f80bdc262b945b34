"""The choice between an exit's draft, a look-up and no draft, by measured tokens per second.

The choice is lossless: it never changes which tokens are accepted, and it depends on past rounds only.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from statistics import median

import torch

from layerskip_recipes.generation.drafting.chain import CHAIN, ChainDrafter
from layerskip_recipes.generation.drafting.drafter import (
    PLAIN,
    DraftedTokens,
    DraftStrategy,
    RoundStart,
)
from layerskip_recipes.generation.drafting.lookup import LookupDrafter
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.steps import StepContext

# Budgets in plain decoding steps: drafting stops once it has lost this many. Together they are 3.7% of 128 tokens.
BUDGETS = {"chain": 4.0, "lookup": 0.75}
MOST_SAVED = 3.5  # the most that good drafts save up for harder text, in budgets
REPAID = 1 / 48  # steps that one plain round earns back while drafting is stopped; each new stop halves it


@dataclass
class _Record:
    """Measurements of one strategy."""

    rounds: int = 0
    weight: float = 0.0  # discounted number of rounds
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=32))  # seconds, tokens

    @property
    def usual(self) -> float:
        """Median seconds of a round; a round counts for at most three times as long."""
        return median(seconds for seconds, _ in self.recent)

    @property
    def rate(self) -> float:
        """Tokens per second and row; 0 without a round."""
        if not self.recent:
            return 0.0
        most = 3 * self.usual
        return sum(tokens for _, tokens in self.recent) / sum(min(seconds, most) for seconds, _ in self.recent)


@dataclass
class _Budget:
    """What drafts of one kind may lose. One budget for both kinds would let cheap look-ups spend what chains need."""

    most: float
    lost: float = 0.0
    repaid: float = REPAID
    stopped: bool = False

    def begin_round(self, losses: Sequence[float]) -> list[bool]:
        """Which of the next round's possible losses the budget covers. Stopping again halves what plain rounds earn."""
        allowed = [self.lost + loss < self.most for loss in losses]
        if not any(allowed) and not self.stopped:
            self.repaid /= 2
        self.stopped = not any(allowed)
        return allowed

    def spend(self, loss: float) -> None:
        # Capped, so that one slow round does not stop drafts for long.
        self.lost = min(max(self.lost + loss, -MOST_SAVED * self.most), 2 * self.most)
        self.repaid = REPAID if self.lost < 0 else self.repaid

    def repay(self) -> None:
        self.lost -= self.repaid if self.stopped else 0.0


class DiscountedUCB:
    """Chooses the strategy with the most tokens per second: each is tried, then the one with the best bound runs.

    The bound is the rate plus a margin: discounted upper confidence bounds (Garivier and Moulines, arXiv 0805.3415).
    The weight of a measurement falls with every round, so each strategy is tried again now and then.

    Plain decoding is one of the strategies, and each kind of draft has a budget. A round loses its duration in plain
    steps minus its tokens. A strategy stops if a round without an accepted token would exceed the budget. Plain rounds
    then earn the next try. So a text whose drafts are never accepted is hardly slower than plain decoding.

    Pass one object to several generations to keep what was learned.

    Args:
        trial: rounds of each drafting strategy before any choice; plain decoding gets one.
        memory: rounds (of any strategy) after which a measurement has lost two thirds of its weight.
        margin: relative margin after one drafting round; after n rounds it is margin / sqrt(n).
        plain: whether plain decoding is a strategy; without it drafts have no budget.
    """

    def __init__(self, trial: int = 4, memory: float = 64.0, margin: float = 0.7, plain: bool = True) -> None:
        self.trial, self.memory, self.margin, self.plain = trial, memory, margin, plain
        self.records: dict[DraftStrategy, _Record] = {}
        self.budgets = {kind: _Budget(most) for kind, most in BUDGETS.items()}

    def begin_text(self) -> None:
        """Retry drafts as soon as on the first text: they may do better on another one."""
        for budget in self.budgets.values():
            budget.repaid = REPAID

    def pick(self, strategies: Sequence[DraftStrategy]) -> DraftStrategy:
        """The strategy of the next round: one of these, or plain decoding."""
        if not strategies:
            return PLAIN
        if self.plain:
            within: list[DraftStrategy] = []
            for kind, budget in self.budgets.items():
                if offered := [strategy for strategy in strategies if strategy.name == kind]:
                    within += compress(offered, budget.begin_round([self._most_lost(strategy) for strategy in offered]))
            # The first round is plain: its time is the unit of losses.
            strategies = [PLAIN, *(within if self.rate(PLAIN) else [])]
        records = {strategy: self.records.setdefault(strategy, _Record()) for strategy in strategies}
        untried = {s: r.rounds for s, r in records.items() if r.rounds < (1 if s == PLAIN else self.trial)}
        return min(untried, key=untried.__getitem__) if untried else max(strategies, key=self._bound)

    def learn(self, strategy: DraftStrategy, tokens: float, seconds: float) -> None:
        """Record a round: tokens per row, and seconds."""
        record = self.records.setdefault(strategy, _Record())
        for other in self.records.values():
            other.weight *= 1 - 1 / self.memory
        record.rounds += 1
        record.weight += 1
        record.recent.append((seconds, tokens))
        if strategy == PLAIN:
            for budget in self.budgets.values():
                budget.repay()
        elif self.rate(PLAIN):
            self.budgets[strategy.name].spend(min(seconds, 3 * record.usual) * self.rate(PLAIN) - tokens)

    def rate(self, strategy: DraftStrategy) -> float:
        """Tokens per second and row; 0 for a strategy that never ran."""
        return self.records.get(strategy, _Record()).rate

    def _most_lost(self, strategy: DraftStrategy) -> float:
        """The loss of a round without an accepted token; 0 for a strategy that never ran."""
        record = self.records.get(strategy)
        return record.usual * self.rate(PLAIN) - 1 if record and record.recent else 0.0

    def _bound(self, strategy: DraftStrategy) -> float:
        record = self.records[strategy]
        # A plain round always gives one token: only its time is uncertain.
        margin = self.margin / 5 if strategy == PLAIN else self.margin
        return record.rate * (1 + margin / math.sqrt(record.weight))


class ChoosingDrafter(ChainDrafter):
    """Drafts from the exit, from the text, or not at all, as `DiscountedUCB` chooses.

    The whole model as the exit means look-ups alone. Look-ups of short and of long matches are separate strategies: as
    one strategy, a few bad ones ended all look-ups.
    """

    def __init__(
        self,
        context: StepContext,
        speculation: Speculation,
        prompts: Sequence[Sequence[int]],
        choice: DiscountedUCB | None = None,
    ) -> None:
        super().__init__(context, speculation.exit_layer, speculation.num_speculations, speculation.min_confidence)
        ngram = speculation.prompt_lookup
        self.lookup = None if ngram is None else LookupDrafter(context, self.longest, ngram, prompts)
        self.choice = choice or DiscountedUCB()
        whole = speculation.exit_layer == context.model.num_layers and speculation.drafter is None
        self.of_exit: list[DraftStrategy] = [] if whole and self.lookup is not None else [CHAIN]

    def begin(self, final: torch.Tensor) -> None:
        self.choice.begin_text()
        super().begin(final)

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:
        self.choice.begin_text()
        super().replace(row, text, final)
        if self.lookup is not None:
            self.lookup.replace(row, text)

    def propose(self, now: RoundStart) -> DraftedTokens:
        found = None if self.lookup is None else self.lookup.propose(now)
        offered = [*self.of_exit, *([found.strategy] if found is not None and found.length else [])]
        picked = self.choice.pick(offered)
        if picked == PLAIN:
            return DraftedTokens(PLAIN, now.last[:, None])
        return super().propose(now) if found is None or picked == CHAIN else found

    def learn(self, strategy: DraftStrategy, tokens: float, seconds: float) -> None:
        if seconds:
            self.choice.learn(strategy, tokens, seconds)

    def extend(self, tokens: Sequence[Sequence[int]]) -> None:
        if self.lookup is not None:
            self.lookup.extend(tokens)
