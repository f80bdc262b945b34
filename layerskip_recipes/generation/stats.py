"""What a generation measured: counts, times, acceptance; and whether an output runs in a loop."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class GenerationStats:
    """Counts of one `generate` call, over all rows of the batch.

    `tokens` are the tokens generated, stop tokens included. `prefill_s` (seconds) ends with the first token of each
    row on the host; `decode_s` covers the rest, so `tokens_per_second` leaves the first tokens out of its count.
    """

    tokens: int = 0
    rows: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    accepted_histogram: list[int] = field(default_factory=list)  # [k]: rounds of a row in which k drafts were accepted

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted, None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after each row's first, per second of decoding; None if there were none."""
        return (self.tokens - self.rows) / self.decode_s if self.decode_s > 0 and self.tokens > self.rows else None

    def count_round(self, drafted: int, accepted: int) -> None:
        """One row in one round of draft and verification."""
        self.drafted += drafted
        self.accepted += accepted
        self.accepted_histogram += [0] * (accepted + 1 - len(self.accepted_histogram))
        self.accepted_histogram[accepted] += 1

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        longer, shorter = sorted((self.accepted_histogram, other.accepted_histogram), key=len, reverse=True)
        return GenerationStats(
            tokens=self.tokens + other.tokens,
            rows=self.rows + other.rows,
            rounds=self.rounds + other.rounds,
            drafted=self.drafted + other.drafted,
            accepted=self.accepted + other.accepted,
            prefill_s=self.prefill_s + other.prefill_s,
            decode_s=self.decode_s + other.decode_s,
            accepted_histogram=[n + (shorter[k] if k < len(shorter) else 0) for k, n in enumerate(longer)],
        )


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
