"""When to draft, and from what. The output never depends on it, only the speed."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from statistics import median_low
from weakref import WeakKeyDictionary

from torch import nn

from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftStrategy

START, MOST = 4.0, 14.0  # of the account, in plain steps
EARNED = 1 / 64  # what a plain round adds to it
MEMORY = 0.9  # decay of earlier rounds in the mean tokens per round
MEASURED = 9  # rounds of each kind whose seconds are measured


_RULES: WeakKeyDictionary[nn.Module, dict[Hashable, "DraftRule"]] = WeakKeyDictionary()


def kept_rule(model: nn.Module, settings: Hashable) -> "DraftRule":
    """The rule of earlier generations of this model with these settings."""
    return _RULES.setdefault(model, {}).setdefault(settings, DraftRule())


class DraftRule:
    """Picks the draft with the most tokens per cost in recent rounds, or none.

    A round costs its seconds divided by those of a plain step, as measured in the first rounds. Drafts have an account
    in plain steps: each round adds its tokens and takes its cost. If the account could not pay for a round that accepts
    nothing, the next round is plain, which adds a little. So a useless draft loses at most 4 + n / 64 plain steps in n
    tokens, 4.7% of 128. A good one saves up for harder text.

    Pass one object to several generations to keep what was learned. `measure=False`: every round costs one plain step,
    so there is a draft in each round that can have one.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure, self.account, self.rounds = measure, START, 0
        self.seconds: dict[str, list[float]] = defaultdict(list)  # of the first rounds, by name
        self.recent: dict[DraftStrategy, tuple[float, float]] = {}  # discounted sums: tokens, rounds

    def pick(self, offered: Sequence[DraftStrategy]) -> DraftStrategy:
        """The strategy of the next round: one of these, or PLAIN."""
        # Plain rounds are measured first, and once more when everything is warm.
        known = len(self.seconds[PLAIN.name]) if self.measure else MEASURED
        if not offered or known < (1 if self.rounds < 8 else 2):
            return PLAIN
        best = max(offered, key=lambda strategy: self.tokens(strategy) / self.cost(strategy))
        if self.account >= self.cost(best) - 1:
            return best
        self.account += EARNED
        return PLAIN

    def tokens(self, strategy: DraftStrategy) -> float:
        """Mean tokens of recent rounds. Before the first one, look-ups count as useless, and others are tried."""
        tokens, rounds = self.recent.get(strategy, (1.0 if strategy.name == "lookup" else float("inf"), 1.0))
        return tokens / rounds

    def cost(self, strategy: DraftStrategy) -> float:
        """Plain steps that a round takes; 1 until both are measured."""
        ours, plain = self.seconds[strategy.name], self.seconds[PLAIN.name]
        return median_low(ours) / median_low(plain) if ours and plain else 1.0

    def measures(self, strategy: DraftStrategy) -> bool:
        """Whether the seconds of the strategy's next round matter."""
        return self.measure and len(self.seconds[strategy.name]) < MEASURED

    def learn(self, strategy: DraftStrategy, tokens: float, seconds: float) -> None:
        """After a round: mean tokens per batch row, and seconds (0: unknown)."""
        self.rounds += 1
        if seconds and self.measures(strategy):
            self.seconds[strategy.name].append(seconds)
        if strategy != PLAIN:
            self.account = min(self.account + tokens - self.cost(strategy), MOST)

    def observe(self, strategy: DraftStrategy, tokens: float) -> None:
        """The tokens per batch row that a round of this strategy gave, or would have given."""
        total, rounds = self.recent.get(strategy, (0.0, 0.0))
        self.recent[strategy] = MEMORY * total + tokens, MEMORY * rounds + 1
