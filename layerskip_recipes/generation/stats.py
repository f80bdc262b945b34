"""What a generation measured: counts, times, acceptance, bytes; and whether an output runs in a loop."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields


@dataclass
class GenerationStats:
    """Counts of one `generate` call, over all rows of the batch. Times are seconds of wall clock.

    `tokens` are the tokens generated, stop tokens included. `prefill_s` ends with the first token of each row on the
    host; `decode_s` covers the rest, so `tokens_per_second` leaves the first tokens out of its count. `draft_s` and
    `verify_s` are parts of `decode_s`; on a GPU they are the device's own times. Compilation is only in `compile_s`:
    a round with it counts in the others as rounds without do on the mean.
    """

    tokens: int = 0
    rows: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_steps: int = 0  # sequential ones; a tree's level is one
    prefill_tokens: int = 0
    reused_tokens: int = 0  # of the prompt, found in the cache
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    compile_s: float = 0.0
    weight_bytes: int = 0  # read by the decoding steps
    cache_bytes: int = 0
    rounds_accepting: Counter = field(default_factory=Counter)  # [k]: rounds of a row in which k drafts were accepted
    drafted_at: Counter = field(default_factory=Counter)  # [i]: how often an i-th token was drafted, from 0
    accepted_at: Counter = field(default_factory=Counter)
    arms: Counter = field(default_factory=Counter)  # rounds of each kind, as "fixed exit 4"

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted, None if nothing was drafted. Of a tree, a level counts as one draft."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def accepted_histogram(self) -> list[int]:
        """[k]: rounds of a row in which k drafts were accepted."""
        return [self.rounds_accepting[k] for k in range(max(self.rounds_accepting, default=-1) + 1)]

    @property
    def acceptance_by_position(self) -> list[float]:
        """Of the first, second, ... drafted tokens, the share that was accepted."""
        return [self.accepted_at[i] / self.drafted_at[i] for i in range(len(self.drafted_at))]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after each row's first, per second of decoding; None if there were none."""
        return (self.tokens - self.rows) / self.decode_s if self.decode_s > 0 and self.tokens > self.rows else None

    @property
    def accept_s(self) -> float:
        """What is neither draft nor verification: choosing, keeping, looking for stops on the host."""
        return max(self.decode_s - self.draft_s - self.verify_s, 0.0)

    @property
    def bytes_per_token(self) -> float | None:
        """Weights and cache read per token, by the sizes of what the steps run over."""
        count = self.tokens - self.rows
        return (self.weight_bytes + self.cache_bytes) / count if count > 0 else None

    def count_round(self, drafted: int, accepted: int) -> None:
        """One row in one round of draft and verification."""
        self.drafted += drafted
        self.accepted += accepted
        self.rounds_accepting[accepted] += 1
        self.drafted_at.update(range(drafted))
        self.accepted_at.update(range(accepted))

    def scale_times(self, factor: float) -> None:
        """Of the rounds; such as from some rounds to all."""
        self.decode_s, self.draft_s, self.verify_s = (
            factor * seconds for seconds in (self.decode_s, self.draft_s, self.verify_s)
        )

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        return GenerationStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def ideal_speedup(acceptance_rate: float, num_speculations: float, draft_cost: float) -> float:
    """(rho d + 1) / (d c + 1): tokens of a round, over its cost in steps of the full model.

    Args:
        acceptance_rate: rho, accepted / drafted.
        num_speculations: d, drafted tokens per round.
        draft_cost: c, the time of a draft step as a part of a full step's.
    """
    return (acceptance_rate * num_speculations + 1) / (num_speculations * draft_cost + 1)


def is_looping(tokens: Sequence[int], max_period: int = 32, share: float = 0.5) -> bool:
    """Whether a generated sequence ends by repeating itself: any draft predicts that, so it flatters acceptance.

    Args:
        tokens: the generated tokens, without the prompt.
        max_period: the longest repeated piece to look for, in tokens.
        share: the part of the sequence, from its end, that must repeat (at least three times the period).
    """
    tokens = list(tokens)
    for period in range(1, max_period + 1):
        tail = max(int(len(tokens) * share), 3 * period)
        if tail <= len(tokens) and all(
            tokens[i] == tokens[i - period] for i in range(len(tokens) - tail + period, len(tokens))
        ):
            return True
    return False
