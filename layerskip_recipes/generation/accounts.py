"""The accounts of a generation: what its loop counts and times, beside the loop."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftedTokens, RoundStart
from layerskip_recipes.generation.rows import Rows
from layerskip_recipes.generation.stats import GenerationStats, MemoryTraffic, PhaseTimer
from layerskip_recipes.generation.steps import StepContext


class Accounts:
    """Fills `stats`. A round that compiled counts like the mean of the other rounds; compilation counts by itself.

    `exit_layer`: the exit that drafts, None without speculation.
    """

    def __init__(self, context: StepContext, rows: Rows, exit_layer: int | None) -> None:
        self.context, self.rows, self.exit_layer = context, rows, exit_layer
        self.stats = GenerationStats(first_tokens=len(rows))
        self.phases = PhaseTimer(context.device, on=exit_layer is not None)
        self.timed, self.untimed_s = 0, 0.0  # rounds without compilation; seconds of the others, minus compilation
        self.timed_phases = 0  # number of phases in the timed rounds
        self.round_started, self.compiled_before = 0.0, 0.0
        self.last: dict[int, tuple[int, int]] = {}  # by prompt: drafted and accepted tokens of the last round

    @contextmanager
    def prefill(self) -> Iterator[None]:
        started, compiled = time.perf_counter(), self.context.compile_s
        yield
        compile_s = self.context.compile_s - compiled
        self.stats.compile_s += compile_s
        self.stats.prefill_s += time.perf_counter() - started - compile_s

    @contextmanager
    def round(self) -> Iterator[None]:
        self.round_started, self.compiled_before = time.perf_counter(), self.context.compile_s
        yield
        seconds, compile_s = time.perf_counter() - self.round_started, self.context.compile_s - self.compiled_before
        self.stats.rounds += 1
        if compile_s == 0:
            self.stats.decode_s += seconds
            self.timed, self.timed_phases = self.timed + 1, len(self.phases.phases)
        else:
            self.untimed_s += seconds - compile_s
            self.stats.compile_s += compile_s
            self.phases.forget(self.timed_phases)

    @property
    def round_s(self) -> float:
        """Seconds since this round began; 0 if it compiled something."""
        return time.perf_counter() - self.round_started if self.context.compile_s == self.compiled_before else 0.0

    def begin_rounds(self) -> None:
        """After the prefill, which allocates the cache."""
        self.traffic = MemoryTraffic(self.context)

    def count(
        self, draft: DraftedTokens, now: RoundStart, room: Sequence[int], accepted: Sequence[int], kept: Sequence[list]
    ) -> None:
        """Count a round: the room of each row before it, the accepted tokens of each row, and the tokens kept."""
        running = [row for row, done in enumerate(now.finished) if not done]
        self.stats.row_rounds += len(running)
        self.last = {}
        for row in running if draft.strategy != PLAIN else ():
            # The last token of a round is the full model's own; tokens after a stop token are not counted.
            used = len(kept[row]) - 1
            drafted = used if used < accepted[row] else min(draft.length, room[row] - 1)
            self.stats.count_round(drafted, used)
            self.last[self.rows.in_row[row]] = drafted, used
        slots, own = len(now.slots(self.context, draft.length)), self.context.own_layers
        if self.exit_layer is not None:
            self.stats.rounds_by_kind[draft.strategy.name] += 1
        # Verification reads L layers and a head: layers from E up for all drafted tokens, layers below E for the last
        # one. A trained draft's own layers also run once, except in rounds without a draft.
        self.traffic.count(self.stats, slots, self.context.depth + (len(own) if draft.length else 0))
        if draft.hidden is not None:
            self.stats.draft_steps += draft.length
            e = own.stop or self.exit_layer or 0
            self.traffic.count(self.stats, slots, e, times=draft.length, draft=True)

    def uncount(self, prompt: int, dropped: int) -> None:
        """The last `dropped` tokens of a prompt's output do not count, as after a stop token."""
        self.stats.tokens -= dropped
        if dropped and prompt in self.last:
            drafted, accepted = self.last.pop(prompt)
            kept = max(accepted - dropped, 0)
            self.stats.count_round(drafted, accepted, times=-1)
            self.stats.count_round(kept, kept)

    def close(self) -> None:
        """Complete `stats` at the end, or at an interruption."""
        self.phases.forget(self.timed_phases)  # the phases of an interrupted round
        # Rounds that compiled count like the mean of the others.
        scale = self.stats.rounds / self.timed if self.timed else 0.0
        self.stats.draft_s, self.stats.verify_s = (scale * s for s in self.phases.seconds().values())
        self.stats.decode_s = scale * self.stats.decode_s if self.timed else self.untimed_s
