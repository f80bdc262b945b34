"""Statistics of a generation: counts, times, acceptance and memory traffic; timers; and detection of loops."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.head import head_of
from layerskip_recipes.model.memory import tensor_bytes


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
        """Share of rounds without a draft, because plain decoding was faster; None without speculation."""
        kinds = self.rounds_by_kind
        return kinds["plain"] / kinds.total() if kinds.total() else None

    @property
    def accepted_histogram(self) -> list[int]:
        """[k]: row rounds with k accepted tokens."""
        return [self.rounds_accepting[k] for k in range(max(+self.rounds_accepting, default=-1) + 1)]

    @property
    def acceptance_by_position(self) -> list[float]:
        """[i]: of the drafts that have a token number i + 1, the share in which it was accepted."""
        longest = max(+self.rounds_drafting, default=0)
        kinds = (self.rounds_accepting, self.rounds_drafting)
        reach = [[sum(n for k, n in rounds.items() if k >= i) for rounds in kinds] for i in range(1, longest + 1)]
        return [accepted / drafted for accepted, drafted in reach]

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

    def count_round(self, drafted: int, accepted: int, times: int = 1) -> None:
        self.drafted += times * drafted
        self.accepted += times * accepted
        self.rounds_accepting[accepted] += times
        self.rounds_drafting[drafted] += times

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


class PhaseTimer:
    """Times drafts and verifications; on a GPU by events, which are read only at the end and delay nothing."""

    def __init__(self, device: torch.device, on: bool = True) -> None:
        self.device, self.on = device, on
        self.phases: list[tuple[str, Any, Any]] = []  # name, begin and end (seconds or events)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block as "draft" or "verify"."""
        if not self.on:
            yield
            return
        begin = self._now()
        yield
        self.phases.append((name, begin, self._now()))

    def forget(self, first: int) -> None:
        """Drop all phases from index `first` on, such as the phases of a round that compiled."""
        del self.phases[first:]

    def seconds(self) -> dict[str, float]:
        """Total seconds by name; waits for a GPU."""
        cuda = self.device.type == "cuda"
        if cuda and self.phases:
            torch.cuda.synchronize(self.device)
        total = {"draft": 0.0, "verify": 0.0}
        for name, begin, end in self.phases:
            total[name] += begin.elapsed_time(end) / 1000 if cuda else end - begin
        return total

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _weight_bytes(module: object) -> int:
    """Bytes of a module's weights once they are gathered from other ranks; 0 for a plain function."""
    return sum(tensor_bytes(p) * _num_shards(p) for p in module.parameters()) if isinstance(module, nn.Module) else 0


def _num_shards(weight: torch.Tensor) -> int:
    """From how many ranks a weight is gathered before a step reads it."""
    if not isinstance(weight, DTensor) or "shards" not in (weight.device_mesh.mesh_dim_names or ()):
        return 1
    return weight.device_mesh["shards"].size()


class MemoryTraffic:
    """Bytes that steps read: weights of layers and heads, and KV-cache slots. The cache must be allocated already."""

    def __init__(self, context: StepContext) -> None:
        model, draft_model, draft_head = context.model, context.draft_model, context.draft_head
        head_bytes = _weight_bytes(head_of(draft_model) if draft_head is None else draft_head.output)
        self.full = (_weight_bytes(model.layers[0]), _weight_bytes(head_of(model)))
        self.draft = (_weight_bytes(draft_model.layers[0]), head_bytes)
        first = context.cache.layers[0]
        self.slot = 2 * first.k[:, :, 0].numel() * first.k.element_size()

    def count(self, stats: GenerationStats, slots: int, layers: int, times: int = 1, draft: bool = False) -> None:
        """Add `times` steps through this many layers and a head, whose attention sees this many slots."""
        layer, head = self.draft if draft else self.full
        stats.weight_bytes += times * (layers * layer + head)
        stats.cache_bytes += times * layers * slots * self.slot


@torch.inference_mode()
def memory_bandwidth(device: torch.device, megabytes: int = 256, repeats: int = 3) -> float:
    """Bytes per second that the device reads: the best of several sums over a large tensor; 0 if memory is full."""
    try:
        data = torch.ones(megabytes * 2**18, device=device)
    except RuntimeError:  # torch has no special out-of-memory error on a CPU
        return 0.0
    best, times = float("inf"), 1 if device.type == "cpu" else 16  # 16 launches in a row hide the launch overhead
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(times):
            total = data.sum()
        float(total)
        best = min(best, (time.perf_counter() - started) / times)
    return data.numel() * data.element_size() / best
