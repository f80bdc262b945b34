"""When to draft, and from what. The output never depends on it, only the speed."""

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from statistics import median_low
from typing import Any

from layerskip_recipes.generation.drafting.drafter import PLAIN, RoundKind

START, MOST_SAVED = 3.5, 14.0  # of the account, in plain steps
SAVED = 0.2  # share of what paying drafts gain that the account gets
PAUSE = 128  # plain rounds before the first new try
MEMORY = 0.9  # decay of earlier rounds in the mean tokens per round
MEASURED = 9  # rounds of each kind whose seconds count


class DraftRule:
    """Picks the draft with the most tokens per cost in recent rounds, or none.

    The unit is a plain step: a round gives some tokens, and costs its seconds divided by those of a plain step.

    1. Measure: the first round is plain, and one more after eight rounds.
    2. Draft from the best kind of draft if its recent rounds gave more tokens than they cost.
    3. If no kind did, try the best one as long as an account can pay for a round that gives only one token. The account
       starts at 3.5. Tries take what they lose from it and add what they gain; paying drafts add a fifth of their gain.
    4. Otherwise decode plainly for 128 rounds, then try one draft; if it does not pay, for 256, 512 and so on.

    So a useless draft loses at most about 5% of 128 tokens, and less of a longer text, while a good one saves up for
    harder text. Plain steps cost what the latest ones took, and drafts what the first ones of a try took, so a busy
    moment of the machine is forgotten in the next try.

    Pass one object to several generations to keep what was learned. `measure=False`: every round costs one plain step,
    so there is a draft in each round that can have one.
    """

    def __init__(self, measure: bool = True) -> None:
        self.measure, self.account, self.rounds = measure, START, 0
        self.pause, self.waited = PAUSE, 0
        self.seconds: dict[RoundKind, deque[float]] = defaultdict(partial(deque, maxlen=MEASURED))
        self.unpaid: dict[RoundKind, list[float]] = defaultdict(list)  # tokens of rounds whose cost is not known yet
        self.recent: dict[RoundKind, tuple[float, float]] = {}  # discounted sums: tokens, rounds

    def pick(self, offered: Sequence[RoundKind]) -> RoundKind:
        """The kind of the next round: one of the offered ones, or PLAIN."""
        # Plain rounds are measured first, and once more when everything is warm.
        known = len(self.seconds[PLAIN]) if self.measure else MEASURED
        if not offered or known < (1 if self.rounds < 8 else 2):
            return PLAIN
        best = max(offered, key=lambda kind: self.tokens(kind) / self.cost(kind))
        if self.pays(best) or self.account >= self.cost(best) - 1:
            return best
        self.waited += 1
        if self.waited < self.pause:
            return PLAIN
        self.waited, self.pause = 0, 2 * self.pause
        self.seconds[best].clear()
        return best

    def begin_text(self) -> None:
        """Another text may suit drafts better: the next try comes as early as in the first text."""
        self.pause = PAUSE

    def pays(self, kind: RoundKind) -> bool:
        """Whether recent rounds gave more than they cost; False before the first one."""
        return kind in self.recent and self.tokens(kind) > self.cost(kind)

    def tokens(self, kind: RoundKind) -> float:
        """Mean tokens of recent rounds."""
        tokens, rounds = self.recent.get(kind, (kind.untried, 1.0))
        return tokens / rounds

    def cost(self, kind: RoundKind) -> float:
        """Plain steps that a round takes; 1 until it is measured twice, as the first round may be slow."""
        ours, plain = self.seconds[kind], self.seconds[PLAIN]
        return median_low(ours) / median_low(plain) if len(ours) > 1 and plain else 1.0

    def speedup(self, stats: Any) -> float | None:
        """How many times as fast as plain steps a generation's rounds were, per row; None if none was measured."""
        plain = self.seconds[PLAIN]
        if not plain or not stats.tokens_per_second or not stats.row_rounds:
            return None
        return stats.tokens_per_second * median_low(plain) * stats.rounds / stats.row_rounds

    def measures(self, kind: RoundKind) -> bool:
        """Whether the seconds of the kind's next round matter."""
        return self.measure and (kind == PLAIN or len(self.seconds[kind]) < MEASURED)

    def learn(self, kind: RoundKind, tokens: float, seconds: float) -> None:
        """After a round: mean tokens per batch row, and seconds (0: unknown)."""
        self.rounds += 1
        if seconds and self.measures(kind):
            self.seconds[kind].append(seconds)
        if kind == PLAIN:
            return
        # The first round is paid with the second one.
        unpaid = self.unpaid[kind]
        unpaid.append(tokens)
        if not self.measure or len(self.seconds[kind]) > 1:
            gained = sum(unpaid) - len(unpaid) * self.cost(kind)
            saved = SAVED * gained if self.pays(kind) else gained
            self.account = min(max(self.account + saved, 0.0), MOST_SAVED)
            self.pause = PAUSE if gained > 0 else self.pause
            unpaid.clear()

    def observe(self, kind: RoundKind, tokens: float) -> None:
        """The tokens per batch row that a round of this kind gave, or would have given."""
        total, rounds = self.recent.get(kind, (0.0, 0.0))
        self.recent[kind] = MEMORY * total + tokens, MEMORY * rounds + 1
