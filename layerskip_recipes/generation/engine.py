"""The decoding loop: prefill, then rounds of draft and verification (or plain steps), on one KV cache.

The engine sees drafters only through the interface in drafting/drafter.py. rows.py holds prompts and outputs,
prefill.py fills the cache, steps.py and the drafters compute, and kernels/compiling.py compiles their steps.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from layerskip_recipes.generation.draft_head import draft_head_of
from layerskip_recipes.generation.drafting.choice import ChoosingDrafter, DiscountedUCB
from layerskip_recipes.generation.drafting.drafter import (
    PLAIN,
    DraftedTokens,
    Drafter,
    DraftStrategy,
    PlainDrafter,
    RoundStart,
)
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels.compiling import cache_length, compiled_steps
from layerskip_recipes.generation.prefill import read_texts
from layerskip_recipes.generation.rows import Rows
from layerskip_recipes.generation.sampling import Sampler, noise_keys
from layerskip_recipes.generation.stats import GenerationStats, MemoryTraffic, PhaseTimer
from layerskip_recipes.generation.steps import Step, StepContext, choose_token
from layerskip_recipes.model.decoder import as_layerskip_decoder, on_device
from layerskip_recipes.model.kv_cache import DecodingCache, decoding_kernels
from layerskip_recipes.model.limits import check_prompt_lengths, check_prompt_tokens
from layerskip_recipes.processes import from_rank_zero


class Generation:
    """One generation as an iterator: each step yields the new, final tokens of each prompt.

    You may stop early (break): `stats` and `generated` are complete up to that point.

    Args:
        model: a `LayerSkipDecoder`, or a plain torchtune decoder.
        prompts: token ids without padding.
        max_generated_tokens: maximum number of new tokens per prompt.
        exit_layer: without speculation, take every token from this exit; None: from the whole model.
        speculation: how to draft; None decodes without drafts.
        sampler: how to choose tokens; None: greedily.
        stop_tokens: an output ends with the first of these tokens.
        rows: how many prompts to decode at a time, in order: a row that has finished takes the next prompt (continuous
            batching). None: all prompts.
        compile: compile the steps; the model keeps the graphs for later generations.
        cache: the `cache` of an earlier generation with as many rows; its tokens are not computed again.
        shared: all ranks of torchrun decode these prompts, and rank 0 decides the tokens.
        reserve: minimum number of slots in a new cache; None: what this generation needs.
        on_draft: called with each row's drafted tokens, [b][n], before every verification.
        choice: the rates that earlier generations measured, which decide what to draft; None: measure anew.
        numbers: equal prompts with different numbers get different samples; None: see `noise_keys`.

    Attributes:
        generated: new tokens of each prompt so far.
        finished: whether the output of each prompt is complete.
        in_row: index of the prompt that each row decodes, or decoded last.

    Raises:
        ConfigError: see `generate`.

    Example:
        >>> from torchtune.models.llama3._component_builders import llama3
        >>> from layerskip_recipes import Generation, Speculation
        >>> model = llama3(vocab_size=50, num_layers=4, num_heads=2, num_kv_heads=1, embed_dim=8, max_seq_len=64)
        >>> generation = Generation(model, [[1, 2, 3]], 16, speculation=Speculation(exit_layer=2, num_speculations=6))
        >>> text = [token for new in generation for token in new[0]]  # new: the final tokens of each prompt
        >>> len(text), text == generation.generated[0]
        (16, True)
    """

    def __init__(
        self,
        model: TransformerDecoder,
        prompts: Sequence[Sequence[int]],
        max_generated_tokens: int,
        *,
        exit_layer: int | None = None,
        speculation: Speculation | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] = (),
        rows: int | None = None,
        compile: bool = False,
        cache: DecodingCache | None = None,
        shared: bool = False,
        reserve: int | None = None,
        on_draft: Callable[[list[list[int]]], None] | None = None,
        choice: DiscountedUCB | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        started = time.perf_counter()
        self.model = as_layerskip_decoder(model)
        # The layers whose tokens are final: with speculation all layers.
        self.exit_layer = self.model.num_layers
        if speculation is None and exit_layer is not None:
            self.exit_layer = self.model.check_exit(exit_layer)
        self.rows = Rows(prompts, rows, max_generated_tokens, stop_tokens)
        # The same lists as in `rows`, for callers.
        self.generated, self.finished = self.rows.generated, self.rows.finished
        self.in_row = self.rows.in_row
        sampler = sampler or Sampler()
        drafted = 0
        if speculation is not None:
            speculation.check(self.model)
            drafted = speculation.num_speculations
        lengths = [len(prompt) for prompt in self.rows.prompts]
        check_prompt_tokens(self.model, self.rows.prompts)
        check_prompt_lengths(self.model, lengths, max_generated_tokens)
        self.on_draft = on_draft
        self.stats = GenerationStats(first_tokens=len(self.rows))
        self.started = False

        compiled = compiled_steps(self.model) if compile else None
        # The cache has room for prompt, output and a draft that reaches beyond a row's limit.
        needed = max(lengths) + max_generated_tokens + drafted + 1
        size = cache_length if compile else int  # rounds up for compiled steps
        draft_model, draft_head = self.model, None
        if speculation is not None and speculation.drafter is not None:
            draft_model = as_layerskip_decoder(speculation.drafter)
        own = len(draft_model.own_layers)
        if cache is None or (cache.rows, cache.draft_layers) != (len(self.rows), own) or cache.max_len < size(needed):
            make = compiled.cache if compiled else DecodingCache
            cache = make(self.model, len(self.rows), size(max(needed, reserve or 0)), own)
        self.cache = cache
        if speculation is not None and speculation.draft_vocabulary is not None:
            rows_of = draft_model if own else self.model
            draft_head = speculation.draft_head or draft_head_of(rows_of, speculation.draft_vocabulary)
        self.context = StepContext(self.model, cache, sampler, compiled, draft_model, draft_head, shared=shared)
        # The keys of the noise: [b, 2] by row, and by prompt.
        self.keys: torch.Tensor | None = None
        if not sampler.greedy:
            self.keys_by_prompt = noise_keys(self._seed(sampler), self.rows.prompts, numbers)
            self.keys = on_device(self.rows.values_in_rows(self.keys_by_prompt), self.context.device)
        self.speculation = speculation
        sharded = (layer for layer in self.model.layers if isinstance(layer, FSDPModule))
        self.first_sharded = None if speculation is None else next(sharded, None)
        self.drafter: Drafter
        if speculation is None:
            self.drafter = PlainDrafter(self.context, self.exit_layer)
        else:
            self.drafter = ChoosingDrafter(self.context, speculation, self.rows.texts, choice)
        # The last round's strategy, tokens per row and seconds. Several ranks learn it in the next round, which brings
        # rank 0's seconds.
        self.unlearnt: tuple[DraftStrategy, float, float] | None = None
        self.counted: dict[int, tuple[int, int]] = {}  # by prompt: drafted and accepted tokens of the last round
        self.choose_token = Step(self.context, choose_token, layers=False)
        self.phases = PhaseTimer(self.context.device, on=speculation is not None)
        self.stats.prefill_s = time.perf_counter() - started  # time to the first token includes this setup

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[int]]]:
        if self.started:
            raise RuntimeError("a Generation runs once; make another one to generate again")
        if self.model.decoding:
            raise RuntimeError(
                "another Generation of this model has not ended: iterate it to its end, or close() its iterator"
            )
        self.started = True
        timed, untimed_s = 0, 0.0  # rounds without compilation; seconds of the other rounds, minus compilation
        phases = 0  # number of phases in the timed rounds
        try:
            with self._models_in_use():
                started, compiled = time.perf_counter(), self.context.compile_s
                with decoding_kernels(self.context.device):
                    new = self._prefill()
                self.traffic = MemoryTraffic(self.context)
                self.stats.compile_s = self.context.compile_s - compiled
                self.stats.prefill_s += time.perf_counter() - started - self.stats.compile_s
                yield self.rows.by_prompt(new)
                while self.rows.waiting or any(self.rows.room):
                    if (free := self.rows.free) is not None:
                        yield self.rows.by_prompt(self._take_next(free))
                        continue
                    started, compiled = time.perf_counter(), self.context.compile_s
                    with decoding_kernels(self.context.device):
                        new = self._round()
                    self.stats.rounds += 1
                    seconds, compile_s = time.perf_counter() - started, self.context.compile_s - compiled
                    if compile_s == 0:
                        self.stats.decode_s += seconds
                        timed, phases = timed + 1, len(self.phases.phases)
                    else:
                        untimed_s += seconds - compile_s
                        self.stats.compile_s += compile_s
                        self.phases.forget(phases)
                    yield self.rows.by_prompt(new)
        finally:
            self.phases.forget(phases)  # the phases of an interrupted round
            # Rounds that compiled count like the mean of the others.
            scale = self.stats.rounds / timed if timed else 0.0
            self.stats.draft_s, self.stats.verify_s = (scale * s for s in self.phases.seconds().values())
            self.stats.decode_s = scale * self.stats.decode_s if timed else untimed_s
            # The last token has not been fed to the model yet, and the draft's own layers may be further behind.
            if all(self.rows.values_in_rows(self.generated)):
                self.cache.tokens = [text[: -1 - self.drafter.behind] for text in self.rows.texts]

    def stop(self, prompt: int, keep: int) -> None:
        """End the output of prompt number `prompt` after its first `keep` tokens; call this between two iterations."""
        dropped = self.rows.end(prompt, keep)
        self.stats.tokens -= dropped
        if dropped and prompt in self.counted:  # as for a stop token, tokens after the end are not counted
            drafted, accepted = self.counted.pop(prompt)
            kept = max(accepted - dropped, 0)
            self.stats.count_round(drafted, accepted, times=-1)
            self.stats.count_round(kept, kept)

    def _seed(self, sampler: Sampler) -> int:
        """The sampler's seed or a random one; the same on ranks that share the prompts."""
        seed = int(torch.randint(2**31, ())) if sampler.seed is None else sampler.seed
        return from_rank_zero(seed) if self.context.shared else seed

    # ---- the cache ----

    @contextmanager
    def _models_in_use(self) -> Iterator[None]:
        """Put model and draft model into eval mode with this generation's cache, and restore them afterwards."""
        users = list({id(user): user for user in (self.model, self.context.draft_model)}.values())
        with ExitStack() as afterwards:
            for user in users:
                for module in user.modules():
                    afterwards.callback(setattr, module, "training", module.training)
                afterwards.callback(setattr, user, "num_output_chunks", user.num_output_chunks)
            for user in users:
                user.num_output_chunks = 0  # training may have turned on chunked logits
                user.eval()
            with self.cache.used_by(*users):
                if self.context.sampler.penalises:
                    self.rows.begin_seen(self.context.vocabulary_size, self.context.device)
                yield

    # ---- prefill ----

    def _prefill(self) -> list[list[int]]:
        """Run the prompts and choose the first new token of each row."""
        prompts = self.rows.texts  # nothing is generated yet
        held = self.cache.tokens if self.exit_layer <= self.cache.depth else [[] for _ in prompts]
        reused = min(_common_length(old, new) for old, new in zip(held, prompts, strict=True))
        reused = min(reused, min(len(prompt) for prompt in prompts) - 1)
        # The prefill may be interrupted: until it ends, only the reused tokens count as cached.
        self.cache.tokens, self.cache.depth = [prompt[:reused] for prompt in prompts], self.exit_layer
        self.stats.reused_tokens = reused * len(prompts)
        self.stats.prefill_tokens = sum(len(prompt) - reused for prompt in prompts)
        final = read_texts(self.context, prompts, self.exit_layer, reused)
        self.drafter.begin(final)
        self.context.load_cpp()  # its head chooses each row's first token, even if torch has read the prompts
        self.last = self._first_tokens(final, slice(None))
        return self._keep([[token] for token in self.last.tolist()])

    def _take_next(self, row: int) -> list[list[int]]:
        """Prefill a finished row with the next prompt; returns its first token, and no token for other rows."""
        started = time.perf_counter()
        text, here = self.rows.take_next(row), slice(row, row + 1)
        self.cache.tokens[row] = []  # until the prefill is done
        if self.keys is not None:
            self.keys[row] = on_device(self.keys_by_prompt[self.rows.in_row[row]], self.context.device)
        self.last = self.last.clone()
        with decoding_kernels(self.context.device):
            final = read_texts(self.context, [text], self.exit_layer, rows=[row])
            self.last[here] = self._first_tokens(final, here)
            self.drafter.replace(row, text, final[0])
        self.stats.first_tokens += 1
        self.stats.prefill_tokens += len(text)
        new = self._keep([self.last[here].tolist() if i == row else [] for i in range(self.cache.rows)])
        self.stats.prefill_s += time.perf_counter() - started
        return new

    def _first_tokens(self, final: torch.Tensor, rows: slice) -> torch.Tensor:
        """The first new tokens [b] of these rows, from x_L of the texts' last tokens, `final` [b, d]."""
        logits = self.context.unembed(final[:, None])[:, -1]
        at = on_device(self.rows.lengths[rows], self.context.device)
        keys, seen = (None if t is None else t[rows] for t in (self.keys, self.rows.seen))
        return self.context.broadcast(self.choose_token.run(None, logits, keys, at, seen))

    # ---- rounds ----

    def _round(self) -> list[list[int]]:
        """Draft, verify, keep the accepted tokens and one token of the full model."""
        # Draft from the last token of each row.
        started, compiled = time.perf_counter(), self.context.compile_s
        self.context.begin_round()
        room, finished = self.rows.room, self.rows.values_in_rows(self.finished)
        starts = [length - 1 for length in self.rows.lengths]  # the slot of each row's last token
        start = on_device(starts, self.context.device)
        now = RoundStart(self.last, start, max(starts), self.keys, self.rows.seen, finished, max(room))
        if self.first_sharded is not None:
            self.first_sharded.unshard(async_op=True)  # while the draft is made
        with self.phases.phase("draft"):
            draft = self.drafter.propose(now)
        if self.on_draft is not None:
            self.on_draft(draft.tokens[:, 1:].tolist())
        # Verify.
        with self.phases.phase("verify"):
            outcome = self._agreed(self.drafter.verify(draft, now))
        self.last = outcome[:, 1].clone()
        # The only time in a round that the host waits for the device.
        outcomes = outcome.tolist()
        if self.context.shared:
            nanoseconds, *_ = [row.pop() for row in outcomes]
            self._learn(nanoseconds / 1e9)

        # Append the tokens to the texts, and count them.
        kept = self._keep([[*tokens[:count], following] for count, following, *tokens in outcomes])
        running = [row for row, done in enumerate(finished) if not done]
        self.counted = {}
        for row in running if draft.strategy != PLAIN else ():
            # The last token of a round is the full model's own; tokens after a stop token are not counted.
            accepted = len(kept[row]) - 1
            stopped = accepted < outcomes[row][0]
            drafted = accepted if stopped else min(draft.length, room[row] - 1)
            self.stats.count_round(drafted, accepted)
            self.counted[self.rows.in_row[row]] = drafted, accepted
        self.stats.row_rounds += len(running)
        self._count_round(draft, now)
        # Learn the round's rate, unless a limit may have cut the round. The first round of a short output counts.
        if self.speculation is not None and now.room > min(self.speculation.num_speculations, self.rows.limit - 2):
            seconds = time.perf_counter() - started if self.context.compile_s == compiled else 0.0
            self.unlearnt = draft.strategy, sum(map(len, kept)) / len(running), seconds
            if not self.context.shared:
                self._learn(seconds)
        return kept

    def _learn(self, seconds: float) -> None:
        if self.unlearnt is not None:
            strategy, tokens, _ = self.unlearnt
            self.drafter.learn(strategy, tokens, seconds)
            self.unlearnt = None

    def _agreed(self, outcome: torch.Tensor) -> torch.Tensor:
        """Rank 0's verification result and the nanoseconds of its last round, in one broadcast for one wait."""
        if not self.context.shared:
            return outcome
        seconds = 0.0 if self.unlearnt is None else self.unlearnt[2]
        told = on_device([[round(seconds * 1e9)]] * len(outcome), self.context.device)
        return self.context.broadcast(torch.cat([outcome, told], 1))

    def _keep(self, new: list[list[int]]) -> list[list[int]]:
        """Append each row's new tokens, cut at its end; returns the tokens kept, none for finished rows."""
        kept = self.rows.add(new)
        self.stats.tokens += sum(map(len, kept))
        self.drafter.extend(kept)
        return kept

    # ---- statistics ----

    def _count_round(self, draft: DraftedTokens, now: RoundStart) -> None:
        """Count a round's kind, draft steps and memory traffic."""
        slots, own = len(now.slots(self.context, draft.length)), self.context.own_layers
        if self.speculation is not None:
            self.stats.rounds_by_kind[draft.strategy.name] += 1
        # Verification reads L layers and a head: layers from E up for all drafted tokens, layers below E for the last
        # one. A trained draft's own layers also run once, except in rounds without a draft.
        self.traffic.count(self.stats, slots, self.exit_layer + (len(own) if draft.length else 0))
        if draft.hidden is not None:
            self.stats.draft_steps += draft.length
            e = own.stop or self.speculation.exit_layer
            self.traffic.count(self.stats, slots, e, times=draft.length, draft=True)


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
