"""Statistics of a generation: counts, times, acceptance and memory traffic; and detection of loops."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch

PROBE_MEGABYTES = 256  # read to measure the memory's bandwidth; more than most caches hold


@dataclass
class GenerationStats:
    """Statistics of one `generate` call over all rows of the batch. Times are wall-clock seconds.

    `tokens` includes stop tokens. `prefill_s` ends when the host has each row's first token, and `decode_s` covers the
    rest, so `tokens_per_second` does not count first tokens. `draft_s` and `verify_s` are parts of `decode_s`, on a GPU
    measured on the device. Compilation counts only in `compile_s`: in the other times, a round that compiled counts
    like the mean of the other rounds.
    """

    tokens: int = 0
    first_tokens: int = 0  # chosen at the end of prefill, one per prompt
    rounds: int = 0
    row_rounds: int = 0  # summed over rows, each until it finishes; a round gives the accepted tokens and one more
    drafted: int = 0
    accepted: int = 0
    draft_steps: int = 0
    prefill_tokens: int = 0
    reused_tokens: int = 0  # prompt tokens found in the cache
    prefill_s: float = 0.0
    decode_s: float = 0.0
    draft_s: float = 0.0
    verify_s: float = 0.0
    compile_s: float = 0.0
    weight_bytes: int = 0  # read by the decoding steps
    cache_bytes: int = 0
    rounds_accepting: Counter = field(default_factory=Counter)  # [k]: row rounds with k accepted tokens
    rounds_drafting: Counter = field(default_factory=Counter)  # [k]: row rounds with k drafted tokens
    rounds_by_kind: Counter = field(default_factory=Counter)  # "chain", "lookup", "plain"; empty without speculation

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted, None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def plain_share(self) -> float | None:
        """Share of rounds without a draft; None without speculation."""
        num_rounds = self.rounds_by_kind.total()
        return self.rounds_by_kind["plain"] / num_rounds if num_rounds else None

    @property
    def accepted_histogram(self) -> list[int]:
        """[k]: row rounds with k accepted tokens."""
        return [self.rounds_accepting[k] for k in range(max(+self.rounds_accepting, default=-1) + 1)]

    @property
    def acceptance_by_position(self) -> list[float]:
        """[i]: of the drafts that have a token number i + 1, the share in which it was accepted."""
        longest = max(+self.rounds_drafting, default=0)

        def num_reaching(rounds: Counter, position: int) -> int:
            return sum(number for length, number in rounds.items() if length >= position)

        return [
            num_reaching(self.rounds_accepting, position) / num_reaching(self.rounds_drafting, position)
            for position in range(1, longest + 1)
        ]

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first ones, per second of decoding; None if there are none."""
        count = self.tokens - self.first_tokens
        return count / self.decode_s if self.decode_s > 0 and count > 0 else None

    @property
    def answer_tokens_per_second(self) -> float | None:
        """All tokens per second of prefill and decoding."""
        seconds = self.prefill_s + self.decode_s
        return self.tokens / seconds if seconds > 0 and self.tokens else None

    @property
    def accept_s(self) -> float:
        """Decoding time outside of draft and verification: bookkeeping on the host, such as stop tokens."""
        return max(self.decode_s - self.draft_s - self.verify_s, 0.0)

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes of weights and KV cache that the steps read per token."""
        count = self.tokens - self.first_tokens
        return (self.weight_bytes + self.cache_bytes) / count if count > 0 else None

    def count_round(self, num_drafted: int, num_accepted: int, times: int = 1) -> None:
        self.drafted += times * num_drafted
        self.accepted += times * num_accepted
        self.rounds_accepting[num_accepted] += times
        self.rounds_drafting[num_drafted] += times

    def __add__(self, other: "GenerationStats") -> "GenerationStats":
        return GenerationStats(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


def is_looping(tokens: Sequence[int], max_period: int = 32, share: float = 0.5) -> bool:
    """Whether a generated sequence (without its prompt) ends in a loop, which inflates the accept rate.

    In a loop, the last `share` of the tokens, at least three periods, repeats with a period of up to `max_period`.
    """
    tokens = list(tokens)
    for period in range(1, max_period + 1):
        tail = max(int(len(tokens) * share), 3 * period)
        if tail <= len(tokens) and all(
            tokens[i] == tokens[i - period] for i in range(len(tokens) - tail + period, len(tokens))
        ):
            return True
    return False


@torch.inference_mode()
def memory_bandwidth(device: torch.device, megabytes: int | None = None) -> float:
    """Bytes per second that the device reads: the best of three sums over a large tensor; 0 if memory is full."""
    try:
        data = torch.ones((megabytes or PROBE_MEGABYTES) * 2**18, device=device)
    except RuntimeError:  # torch has no special out-of-memory error on a CPU
        return 0.0
    best, times = float("inf"), 1 if device.type == "cpu" else 16  # 16 launches in a row hide the launch overhead
    for _ in range(3):
        started = time.perf_counter()
        for _ in range(times):
            total = data.sum()
        float(total)
        best = min(best, (time.perf_counter() - started) / times)
    return data.numel() * data.element_size() / best
