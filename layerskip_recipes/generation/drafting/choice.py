"""What the next round does, learned from the rounds so far: which exit drafts, when a draft stops, when to look up.

All of it is lossless: it decides how much is drafted and by whom, never what is accepted.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from layerskip_recipes.config.checks import check_number
from layerskip_recipes.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """A way to do a round.

    Args:
        kind: "fixed" drafts num_speculations tokens, "adaptive" stops by confidence, "lookup" drafts from the text,
            "plain" drafts nothing.
        exit_layer: E.
        match: of a look-up how long the text is that it found again: 0, 1 or 2, see `LookUp.find`.
    """

    kind: str
    exit_layer: int
    match: int = 0


@dataclass
class _Record:
    rounds: int = 0
    weight: float = 0.0  # of the rounds, the older the less
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=32))  # seconds, tokens

    @property
    def rate(self) -> float:
        """No round counts for more than three times the usual one: what else the machine did says nothing."""
        if not self.recent:
            return 0.0
        most = 3 * median(seconds for seconds, _ in self.recent)
        return sum(tokens for _, tokens in self.recent) / sum(min(seconds, most) for seconds, _ in self.recent)


class Chooser:
    """Which of several arms gives most tokens per second: each is tried, then the one that promises most runs.

    What an arm promises is its rate and a margin, as the tokens of a round vary as much as their mean: discounted upper
    confidence bounds (Garivier and Moulines, arXiv 0805.3415). What was measured loses its weight with every round, so
    an arm that was unlucky, or a text that changed, gets another try.

    Args:
        trial: rounds of each arm before any choice.
        memory: rounds of any arm after which a round has lost two thirds of its weight.
        margin: of an arm's rate, where one round speaks for it; of n rounds 1 / sqrt(n) of that.
            An eighth of it where nothing is drafted, which always gives one token.
    """

    def __init__(self, trial: int = 4, memory: float = 64.0, margin: float = 0.7) -> None:
        self.trial, self.memory, self.margin = trial, memory, margin
        self.records: dict[Arm, _Record] = {}

    def pick(self, arms: Sequence[Arm]) -> Arm:
        """One of the arms that the next round may use."""
        records = [self.records.setdefault(arm, _Record()) for arm in arms]
        fewest = min(range(len(arms)), key=lambda i: records[i].rounds)
        if records[fewest].rounds < self.trial:
            return arms[fewest]
        return max(arms, key=self._promise)

    def learn(self, arm: Arm, tokens: float, seconds: float) -> None:
        """A round of this arm gave each row so many tokens in so many seconds."""
        record = self.records.setdefault(arm, _Record())
        for old in self.records.values():
            old.weight *= 1 - 1 / self.memory
        record.rounds += 1
        record.weight += 1
        record.recent.append((seconds, tokens))

    def rate(self, arm: Arm) -> float:
        """Tokens per second that an arm gives a row, 0 if it never ran."""
        return self.records.get(arm, _Record()).rate

    def _promise(self, arm: Arm) -> float:
        record = self.records[arm]
        margin = self.margin / 8 if arm.kind == "plain" else self.margin  # always one token: only its time varies
        return record.rate * (1 + margin / math.sqrt(record.weight))


@dataclass
class DraftLength:
    """When a draft stops: below a fixed confidence, or when one more token costs more than it brings.

    With "auto" the confidence (the draft's probability of its token) is calibrated by what was accepted: a bin of
    confidences has the acceptance seen in it. One more drafted token brings P(all so far stand) * acceptance tokens
    and costs one draft step; drafting goes on while that is a better rate than the rounds have on the whole, which is
    the stopping rule that maximises the rate. If confidence says nothing, all bins agree and the length is a fixed one.

    Args:
        threshold: in [0, 1], or "auto".

    Raises:
        ValueError: if it is neither.
    """

    threshold: float | str
    bins: int = 12
    drafted: list[float] = field(default_factory=list)
    accepted: list[float] = field(default_factory=list)
    step_seconds: float = 0.0

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        self.drafted, self.accepted = [0.0] * self.bins, [0.0] * self.bins

    def go_on(self, confidences: Sequence[Sequence[float]], rate: float) -> bool:
        """Whether to draft one token more.

        Args:
            confidences: for each row that still runs, those of its drafted tokens so far.
            rate: tokens per second that such rounds give a row on the whole, 0 if not known yet.
        """
        if self.threshold != "auto":
            return any(row[-1] >= self.threshold for row in confidences)
        gain = 0.0
        for row in confidences:
            stands = 1.0
            for confidence in row:
                stands *= self.acceptance(confidence)
            gain += stands * self.mean
        return gain / len(confidences) >= rate * self.step_seconds

    def acceptance(self, confidence: float) -> float:
        """Of drafts of such a confidence, the share that was accepted; the mean counts as a few observations."""
        at, prior = self._bin(confidence), 4.0
        return (self.accepted[at] + prior * self.mean) / (self.drafted[at] + prior)

    @property
    def mean(self) -> float:
        """Share of all drafts that was accepted, starting at 0.7."""
        return (sum(self.accepted) + 1.4) / (sum(self.drafted) + 2)

    def learn(self, confidences: Sequence[float], accepted: int) -> None:
        """A row's drafts, of which the first `accepted` stood; what follows the first rejection says nothing."""
        for i, confidence in enumerate(confidences[: accepted + 1]):
            self.drafted[self._bin(confidence)] += 1
            self.accepted[self._bin(confidence)] += i < accepted

    def timed(self, seconds: float) -> None:
        """A draft step took so long."""
        self.step_seconds = seconds if not self.step_seconds else 0.9 * self.step_seconds + 0.1 * seconds

    def _bin(self, confidence: float) -> int:
        return min(int(confidence * self.bins), self.bins - 1)


def check_threshold(threshold: float | str | None, key: str = "threshold") -> float | str | None:
    """Raises a ValueError unless it is None, "auto", or a number in [0, 1]."""
    if threshold is None or threshold == "auto":
        return threshold
    if isinstance(threshold, str):
        raise ConfigError(f"{key}: {threshold!r} is no threshold. Allowed: auto, or a number in [0, 1]; {key}=auto")
    check_number(key, threshold, minimum=0, maximum=1, integer=False, example=0.4)
    return threshold


@dataclass
class Stopping:
    """Whether drafts that stop by their confidence beat whole ones: both judged on the same rounds.

    Texts differ more than the two ways do, and each way would see others: in a loop, say, any draft is right. So every
    round that may have stopped counts for both. A whole draft in its place takes what whole drafts take, whatever the
    text, and brings the same tokens; and where all that was drafted stood, m + m^2 + ... more, for a share m of drafts
    that is accepted.

    Args:
        trial: rounds of each way before any choice.
        every: of so many rounds, one goes the way that is not chosen, to see whether it still is the worse one.
        memory: rounds that may have stopped after which one has lost two thirds of its weight.
    """

    trial: int = 4
    every: int = 32
    memory: float = 64.0
    rounds: int = 0
    stopping: int = 0  # those of them that might stop
    whole_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=32))
    tokens: list[float] = field(default_factory=lambda: [0.0, 0.0])  # whole drafts, drafts that stop
    seconds: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def pays(self) -> bool:
        """Whether drafts that stop gave more tokens per second than whole ones would have."""
        return self.tokens[1] * self.seconds[0] > self.tokens[0] * self.seconds[1]

    def next(self) -> bool:
        """Whether the next draft may stop."""
        if len(self.whole_seconds) < self.trial or self.stopping < self.trial:
            return len(self.whole_seconds) >= self.trial
        return self.pays != (self.rounds % self.every == 0)

    def learn(self, may_stop: bool, tokens: float, more: float, seconds: float) -> None:
        """A round.

        Args:
            may_stop: whether its draft might stop.
            tokens: of each row.
            more: what each row would have got besides from a whole draft.
            seconds: that the round took.
        """
        self.rounds += 1
        if not may_stop:
            self.whole_seconds.append(seconds)
            return
        self.stopping += 1
        whole = median(self.whole_seconds)
        new = ((tokens + more, whole), (tokens, min(seconds, 3 * whole)))  # what else the machine did says nothing
        for way, (of_tokens, of_seconds) in enumerate(new):
            self.tokens[way] = self.tokens[way] * (1 - 1 / self.memory) + of_tokens
            self.seconds[way] = self.seconds[way] * (1 - 1 / self.memory) + of_seconds


class Policy:
    """The choices of one speculation, kept over several generations so that what was learned stays.

    Args:
        exits: the exits that may draft; several: the best is found by measuring.
        threshold: see `DraftLength`; None drafts a fixed number of tokens.
        lookup: whether rounds may draft from the text.
    """

    def __init__(self, exits: Sequence[int], threshold: float | str | None = None, lookup: bool = False) -> None:
        fixed = check_threshold(threshold) in (None, "auto")
        self.arms = [Arm("fixed" if fixed else "adaptive", exit_layer) for exit_layer in exits]
        if threshold == "auto" and exits:  # where no draft pays, the best one has no token
            self.arms.append(Arm("plain", exits[0]))
        # One for each length of a match: what follows long ones is right far more often.
        self.lookups = [Arm("lookup", exits[0], match) for match in range(3)] if lookup and exits else []
        self.chooser = Chooser()
        self.lengths = {e: DraftLength("auto" if threshold is None else threshold) for e in exits}
        self.stopping = {e: Stopping() for e in exits} if threshold == "auto" else {}

    @property
    def has_choice(self) -> bool:
        """Whether there is anything to learn."""
        return len(self.arms) > 1 or bool(self.lookups) or self.arms[0].kind == "adaptive"

    def pick(self, match: int | None = None) -> Arm:
        """How to do the next round; `match`: of the drafts that the text has to offer, None if it has none."""
        arm = self.chooser.pick(self.arms if match is None else [*self.arms, self.lookups[match]])
        if arm.kind == "fixed" and self.stopping and self.stopping[arm.exit_layer].next():
            return replace(arm, kind="adaptive")
        return arm

    def rate(self, arm: Arm) -> float:
        """Tokens per second that such rounds give a row, 0 if not known yet."""
        return self.chooser.rate(self._chosen(arm))

    def learn(self, arm: Arm, tokens: float, seconds: float, stood: float = 0.0, left: int = 0) -> None:
        """A round of this arm gave each row so many tokens in so many seconds.

        Args:
            stood: the share of rows whose drafts all stood.
            left: how many tokens a whole draft would have had besides.
        """
        self.chooser.learn(self._chosen(arm), tokens, seconds)
        if self.stopping and arm.kind in ("fixed", "adaptive"):
            mean = self.lengths[arm.exit_layer].mean
            more = stood * sum(mean**i for i in range(1, left + 1))
            self.stopping[arm.exit_layer].learn(arm.kind == "adaptive", tokens, more, seconds)

    def _chosen(self, arm: Arm) -> Arm:
        """As the chooser knows it, for which drafts that stop and whole ones are one way."""
        return replace(arm, kind="fixed") if self.stopping and arm.kind == "adaptive" else arm
