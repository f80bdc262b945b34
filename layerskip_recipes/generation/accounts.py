"""The accounts of a generation: what its loop counts and times, beside the loop."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from layerskip_recipes.generation.drafting.drafter import PLAIN, DraftedTokens, RoundStart
from layerskip_recipes.generation.kernels.cpp_decoder import int4_of
from layerskip_recipes.generation.rows import BatchRows
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.head import head_of
from layerskip_recipes.model.memory import tensor_bytes


class Accounts:
    """Fills `stats`. A round that compiled counts like the mean of the other rounds; compilation counts by itself.

    `drafts_from`: the exit that drafts, None without speculation.
    """

    def __init__(self, context: StepContext, rows: BatchRows, drafts_from: int | None) -> None:
        self.context, self.rows, self.drafts_from = context, rows, drafts_from
        self.stats = GenerationStats(first_tokens=len(rows))
        self.phases: list[tuple[str, Any, Any]] = []  # name, begin and end (seconds, or events of a GPU)
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
            self.timed, self.timed_phases = self.timed + 1, len(self.phases)
        else:
            self.untimed_s += seconds - compile_s
            self.stats.compile_s += compile_s
            del self.phases[self.timed_phases :]

    @property
    def round_s(self) -> float:
        """Seconds since this round began; 0 if it compiled something."""
        return time.perf_counter() - self.round_started if self.context.compile_s == self.compiled_before else 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of a round, "draft" or "verify"; events are read only at the end, and delay no GPU."""
        begin = None if self.drafts_from is None else self._now()
        yield
        if begin is not None:
            self.phases.append((name, begin, self._now()))

    def _now(self) -> Any:
        if self.context.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.context.device))
        return event

    def begin_rounds(self) -> None:
        """Note the bytes of a layer, a head and a cache slot, which the prefill has allocated."""
        model, draft_decoder, draft_head = self.context.model, self.context.draft_decoder, self.context.draft_head
        head = head_of(draft_decoder) if draft_head is None else draft_head.output
        packs_int4 = self.context.backend.packs_int4
        self.of_model = (_weight_bytes(model.layers[0], packs_int4), _weight_bytes(head_of(model), packs_int4))
        self.of_draft = (_weight_bytes(draft_decoder.layers[0], packs_int4), _weight_bytes(head, packs_int4))
        keys = self.context.cache.layers[0].k
        self.slot = 2 * keys[:, :, 0].numel() * keys.element_size()

    def _read(self, weights: tuple[int, int], layers: int, slots: int, times: int = 1) -> None:
        """Count the bytes of `times` steps through layers and a head, whose attention sees this many slots."""
        self.stats.weight_bytes += times * (layers * weights[0] + weights[1])
        self.stats.cache_bytes += times * layers * slots * self.slot

    def count(
        self,
        draft: DraftedTokens,
        round_start: RoundStart,
        room: Sequence[int],
        num_accepted: Sequence[int],
        kept_tokens: Sequence[list],
    ) -> None:
        """Count a round: the room of each row before it, its number of accepted tokens, and the tokens kept."""
        running = [row for row, done in enumerate(round_start.finished) if not done]
        self.stats.row_rounds += len(running)
        self.last = {}
        for row in running if draft.round_kind != PLAIN else ():
            # The last token of a round is the full model's own; tokens after a stop token are not counted.
            used = len(kept_tokens[row]) - 1
            num_drafted = used if used < num_accepted[row] else min(draft.num_drafted, room[row] - 1)
            self.stats.count_round(num_drafted, used)
            self.last[self.rows.in_row[row]] = num_drafted, used
        slots = len(round_start.slots(self.context, draft.num_drafted))
        trained_layers = self.context.trained_layers  # of a trained draft
        if self.drafts_from is not None:
            self.stats.rounds_by_kind[draft.round_kind.name] += 1
        # Verification reads L layers and a head: layers from E up for all drafted tokens, layers below E for the last
        # one. A trained draft's own layers also run once, except in rounds without a draft.
        self._read(self.of_model, self.context.output_exit + (len(trained_layers) if draft.num_drafted else 0), slots)
        self.stats.draft_steps += draft.draft_steps
        self._read(self.of_draft, trained_layers.stop or self.drafts_from or 0, slots, times=draft.draft_steps)

    def uncount(self, prompt: int, dropped: int) -> None:
        """The last `dropped` tokens of a prompt's output do not count, as after a stop token."""
        self.stats.tokens -= dropped
        if dropped and prompt in self.last:
            num_drafted, num_accepted = self.last.pop(prompt)
            num_kept = max(num_accepted - dropped, 0)
            self.stats.count_round(num_drafted, num_accepted, times=-1)
            self.stats.count_round(num_kept, num_kept)

    def close(self) -> None:
        """Complete `stats` at the end, or at an interruption."""
        del self.phases[self.timed_phases :]  # of an interrupted round
        # Rounds that compiled count like the mean of the others.
        scale = self.stats.rounds / self.timed if self.timed else 0.0
        cuda, seconds = self.context.device.type == "cuda", {"draft": 0.0, "verify": 0.0}
        if cuda and self.phases:
            torch.cuda.synchronize(self.context.device)
        for name, begin, end in self.phases:
            seconds[name] += begin.elapsed_time(end) / 1000 if cuda else end - begin
        self.stats.draft_s, self.stats.verify_s = scale * seconds["draft"], scale * seconds["verify"]
        self.stats.decode_s = scale * self.stats.decode_s if self.timed else self.untimed_s
        if self.context.compiled is not None:
            self.context.compiled.say_what_was_kept()


def _weight_bytes(module: object, packs_int4: bool) -> int:
    """Bytes of a module's weights once they are gathered from other ranks; 0 for a function."""
    if not isinstance(module, nn.Module):
        return 0
    parameters = list(module.parameters())
    packed = sum(p.numel() for p in parameters if int4_of(p) is not None) if packs_int4 else 0
    return sum(tensor_bytes(p) * _num_shards(p) for p in parameters) - packed // 2


def _num_shards(weight: torch.Tensor) -> int:
    """From how many ranks a weight is gathered before a step reads it."""
    if not isinstance(weight, DTensor) or "shards" not in (weight.device_mesh.mesh_dim_names or ()):
        return 1
    return weight.device_mesh["shards"].size()
