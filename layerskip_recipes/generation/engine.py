"""The decoding loop: prefill, then rounds of draft and verification (or plain steps), on one KV cache.

drafting/drafters.py proposes tokens and drafting/verification.py verifies them; backends.py runs both in torch, as
graphs or in C++. rows.py holds prompts and outputs, accounts.py counts and times, prefill.py fills the cache, and
state.py keeps what later generations use again.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch.distributed.fsdp import FSDPModule
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.accounts import Accounts
from layerskip_recipes.generation.drafting.draft_weights import DraftHead, DraftWeights
from layerskip_recipes.generation.drafting.drafter import PLAIN, RoundStart, longest_draft
from layerskip_recipes.generation.drafting.drafters import Drafters
from layerskip_recipes.generation.drafting.rule import DraftRule
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.drafting.verification import Verifier
from layerskip_recipes.generation.kernels.compiling import CompiledSteps, cache_length
from layerskip_recipes.generation.prefill import common_length, common_start, read_texts
from layerskip_recipes.generation.rows import BatchRows
from layerskip_recipes.generation.sampling import Sampler, noise_keys
from layerskip_recipes.generation.state import ModelState, state_of
from layerskip_recipes.generation.steps import StepContext, choose_token
from layerskip_recipes.model.changes import has_user_code
from layerskip_recipes.model.decoder import on_device
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
        draft_weights: what drafts instead of the weights that the speculation names: a decoder, and None or the head
            of its draft vocabulary.
        sampler: how to choose tokens; None: greedily.
        stop_tokens: an output ends with the first of these tokens.
        rows: how many prompts to decode at a time, in order: a row that has finished takes the next prompt (continuous
            batching). None: all prompts.
        compile: compile the steps; the model keeps the graphs for later generations.
        cache: the `cache` of an earlier generation with as many rows; its tokens are not computed again.
        reuse: without `cache`, at most so many first tokens of each prompt are taken from the model's last generation
            with as many rows. C++ only: it computes the same keys and values however the prompts are split.
        shared: all ranks of torchrun decode these prompts, and rank 0 decides the tokens.
        reserve: minimum number of slots in a new cache; None: what this generation needs.
        on_draft: called with each row's drafted tokens, [b][n], before every verification.
        rule: decides where to draft, and keeps what earlier generations measured; None: draft wherever possible.
        numbers: equal prompts with different numbers get different samples; None: see `noise_keys`.
        predictions: tokens that look-ups in the text also search for each prompt, see `predicted_tokens`; None: none.
        state: what earlier generations of this model built; None: the state kept for this model.

    Attributes:
        generated: new tokens of each prompt so far.
        finished: whether the output of each prompt is complete.
        in_row: index of the prompt that each row decodes, or decoded last.

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
        draft_weights: DraftWeights | None = None,
        sampler: Sampler | None = None,
        stop_tokens: Sequence[int] = (),
        rows: int | None = None,
        compile: bool = False,
        cache: DecodingCache | None = None,
        reuse: int = 0,
        shared: bool = False,
        reserve: int | None = None,
        on_draft: Callable[[list[list[int]]], None] | None = None,
        rule: DraftRule | None = None,
        numbers: Sequence[int] | None = None,
        predictions: Sequence[Sequence[int]] | None = None,
        state: ModelState | None = None,
    ) -> None:
        started = time.perf_counter()
        if has_user_code(model):
            raise ConfigError(
                f"model: {type(model).__name__} has a forward hook or another `forward`, but decoding runs it in "
                "parts. Allowed: hooks on its modules, for example model.layers[0].register_forward_hook(hook)"
            )
        state = state or state_of(model)
        self.model, self.in_use = state.decoder(model), state.in_use
        # The exit whose tokens are the output: with speculation the last one.
        output_exit = self.model.check_exit(exit_layer) if speculation is None and exit_layer is not None else None
        self.rows = BatchRows(prompts, rows, max_generated_tokens, stop_tokens, predictions)
        # The same lists as in `rows`, for callers.
        self.generated, self.finished = self.rows.generated, self.rows.finished
        self.in_row = self.rows.in_row
        sampler = sampler or Sampler()
        lengths = [len(prompt) for prompt in self.rows.prompts]
        check_prompt_tokens(self.model, self.rows.prompts)
        check_prompt_tokens(self.model, self.rows.predictions, "predictions")
        check_prompt_lengths(self.model, lengths, max_generated_tokens)
        self.on_draft = on_draft
        self.started = False

        compiled = state.compiled_steps(self.model) if compile else None
        compiled_before_s = compiled.seconds if compiled else 0.0
        decoder, head = self._draft_weights(speculation, draft_weights, state)
        # The cache has room for prompt, output and a draft that reaches beyond a row's limit.
        needed = max(lengths) + max_generated_tokens + 1 + (speculation.num_speculations if speculation else 0)
        self.cache = self._fitting_cache(cache, compiled, needed, reserve or 0, len(decoder.trained_layers))
        self.context = StepContext(self.model, self.cache, sampler, compiled, decoder, head, output_exit, shared)
        self.reuse = None
        if self.cache is not cache:
            self.reuse = reuse if self.context.backend.exact_splits else 0
        # The keys of the noise: [b, 2] by row, and by prompt.
        self.keys: torch.Tensor | None = None
        if not sampler.greedy:
            self.keys_by_prompt = noise_keys(self._seed(sampler, shared), self.rows.prompts, numbers)
            self.keys = on_device(self.rows.values_in_rows(self.keys_by_prompt), self.context.device)
        sharded = (layer for layer in self.model.layers if isinstance(layer, FSDPModule))
        self.first_sharded = None if speculation is None else next(sharded, None)
        self.verifier = Verifier(self.context, (speculation and speculation.exit_layer) or self.context.output_exit)
        searched = [self.rows.searched(row) for row in range(len(self.rows))]
        self.drafters = Drafters(self.verifier, speculation, searched, rule)
        self.common = common_start(self.rows.prompts) if self.context.backend.exact_splits else 0
        self.accounts = Accounts(self.context, self.rows, None if speculation is None else self.verifier.exit_layer)
        self.stats = self.accounts.stats
        self.stats.compile_s = self.context.compile_s - compiled_before_s
        # Time to the first token includes this setup.
        self.stats.prefill_s = time.perf_counter() - started - self.stats.compile_s

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[int]]]:
        if self.started:
            raise RuntimeError("a Generation runs once; make another one to generate again")
        if self.model.decoding or not self.in_use.acquire(blocking=False):
            raise RuntimeError(
                "another Generation of this model has not ended: iterate it to its end, or close() its iterator"
            )
        self.started = True
        try:
            # Now, since another generation may have used the cache after this one was made.
            self.context.forget_stale_tokens()
            if self.reuse is not None:
                self.cache.keep_first(self.reuse)
            with self._models_in_use():
                with self.accounts.prefill(), decoding_kernels(self.context.device):
                    new = self._prefill()
                self.accounts.begin_rounds()
                yield self.rows.by_prompt(new)
                while self.rows.waiting or any(self.rows.room):
                    if (free := self.rows.free) is not None:
                        with self.accounts.prefill(), decoding_kernels(self.context.device):
                            new = self._take_next(free)
                    else:
                        with self.accounts.round(), decoding_kernels(self.context.device):
                            new = self._round()
                    yield self.rows.by_prompt(new)
        finally:
            try:
                self.accounts.close()
                # The last token has not been fed to the model yet, and the draft's own layers may be further behind.
                if all(self.rows.values_in_rows(self.generated)):
                    self.cache.tokens = [text[: -1 - self.verifier.behind] for text in self.rows.texts]
            finally:
                self.in_use.release()

    def stop(self, prompt: int, keep: int) -> None:
        """End the output of prompt number `prompt` after its first `keep` tokens; call this between two iterations."""
        self.accounts.uncount(prompt, self.rows.end(prompt, keep))

    # ---- the setup ----

    def _draft_weights(
        self, speculation: Speculation | None, chosen: DraftWeights | None, state: ModelState
    ) -> DraftWeights:
        """The decoder that drafts, and the head of its draft vocabulary or None."""
        if speculation is None:
            return self.model, None
        speculation.check(self.model)
        decoder, head = chosen or state.draft_weights(speculation, self.model)
        if head is None and speculation.draft_vocabulary is not None:
            head = DraftHead(decoder if decoder.trained_layers else self.model, speculation.draft_vocabulary)
        return decoder, head

    @staticmethod
    def _seed(sampler: Sampler, shared: bool) -> int:
        seed = int(torch.randint(2**31, ())) if sampler.seed is None else sampler.seed
        return from_rank_zero(seed) if shared else seed

    def _fitting_cache(
        self,
        cache: DecodingCache | None,
        compiled: CompiledSteps | None,
        needed: int,
        reserve: int,
        draft_layers: int,
    ) -> DecodingCache:
        """The caller's cache if it fits, else a kept or a new one with at least `reserve` slots."""
        size = cache_length if compiled else int  # rounds up for compiled steps
        num_rows = len(self.rows)
        if cache is not None and cache.fits(self.model, num_rows, draft_layers, size(needed)):
            return cache
        make = partial(compiled.cache, size(needed)) if compiled else DecodingCache
        return make(self.model, num_rows, size(max(needed, reserve)), draft_layers)

    @contextmanager
    def _models_in_use(self) -> Iterator[None]:
        """Put model and draft model into eval mode with this generation's cache, and restore them afterwards."""
        users = list({id(user): user for user in (self.model, self.context.draft_decoder)}.values())
        with ExitStack() as afterwards:
            for user in users:
                for module in [module for module in user.modules() if module.training]:
                    afterwards.callback(setattr, module, "training", True)
                    module.training = False
                afterwards.callback(setattr, user, "num_output_chunks", user.num_output_chunks)
                user.num_output_chunks = 0  # training may have turned on chunked logits
            with self.cache.used_by(*users):
                if self.context.sampler.penalises:
                    self.rows.begin_seen(self.context.vocabulary_size, self.context.device)
                yield

    # ---- prefill ----

    def _prefill(self) -> list[list[int]]:
        """Run the prompts and choose the first new token of each row."""
        prompts = self.rows.texts  # nothing is generated yet
        cached = self.cache.tokens if self.context.output_exit <= self.cache.cached_layers else [[] for _ in prompts]
        reused = min(common_length(old, new) for old, new in zip(cached, prompts, strict=True))
        reused = min(reused, min(len(prompt) for prompt in prompts) - 1)
        # The prefill may be interrupted: until it ends, only the reused tokens count as cached.
        self.cache.tokens, self.cache.cached_layers = [prompt[:reused] for prompt in prompts], self.context.output_exit
        self.stats.reused_tokens = reused * len(prompts)
        self.stats.prefill_tokens = sum(len(prompt) - reused for prompt in prompts)
        final = read_texts(self.context, prompts, reused)
        self.verifier.begin(final)
        self.drafters.begin()
        self.last = self._first_tokens(final, slice(None))
        return self._keep([[token] for token in self.last.tolist()])

    def _take_next(self, row: int) -> list[list[int]]:
        """Prefill a finished row with the next prompt; returns its first token, and no token for other rows."""
        text, this_row = self.rows.take_next(row), slice(row, row + 1)
        self.cache.tokens[row] = []  # until the prefill is done
        if self.keys is not None:
            self.keys[row] = on_device(self.keys_by_prompt[self.rows.in_row[row]], self.context.device)
        self.last = self.last.clone()
        reused = self.common
        final = read_texts(self.context, [text], reused, rows=[row])
        self.last[this_row] = self._first_tokens(final, this_row)
        self.verifier.replace(row, final[0])
        self.drafters.replace(row, self.rows.searched(row))
        self.stats.first_tokens += 1
        self.stats.prefill_tokens += len(text) - reused
        self.stats.reused_tokens += reused
        return self._keep([self.last[this_row].tolist() if i == row else [] for i in range(self.cache.num_rows)])

    def _first_tokens(self, final: torch.Tensor, rows: slice) -> torch.Tensor:
        """The first new tokens [b] of these rows, from x_L of the texts' last tokens, `final` [b, d]."""
        logits = self.context.backend.logits(self.model, final[:, None])[:, -1]
        positions = on_device(self.rows.lengths[rows], self.context.device)
        keys, seen = (None if t is None else t[rows] for t in (self.keys, self.rows.seen))
        return self.context.broadcast(choose_token(self.context, None, logits, keys, positions, seen))

    # ---- rounds ----

    def _round(self) -> list[list[int]]:
        """Draft, verify, keep the accepted tokens and one token of the full model."""
        self.context.backend.begin_round()
        room, finished = self.rows.room, self.rows.values_in_rows(self.finished)
        starts = [length - 1 for length in self.rows.lengths]  # the slot of each row's last token
        start = on_device(starts, self.context.device)
        round_start = RoundStart(self.last, start, max(starts), self.keys, self.rows.seen, finished, max(room))
        # Draft from the last token of each row.
        if self.first_sharded is not None:
            self.first_sharded.unshard(async_op=True)  # while the draft is made
        with self.accounts.phase("draft"):
            draft = self.drafters.propose(round_start)
        if self.on_draft is not None:
            self.on_draft(draft.tokens[:, 1:].tolist())
        # Verify.
        with self.accounts.phase("verify"):
            outcome = self.context.broadcast(self.verifier.verify(draft, round_start))
        self.last = outcome[:, 1].clone()
        # Accept. This is the only time in a round that the host waits for the device.
        outcomes = outcome.tolist()
        new = self._keep([[*tokens[:num_accepted], following] for num_accepted, following, *tokens in outcomes])
        self.accounts.count(draft, round_start, room, [num_accepted for num_accepted, *_ in outcomes], new)
        # Learn how fast the round was, unless a limit may have cut it. The first draft of a short output counts.
        is_typical = draft.num_drafted > 0 or draft.round_kind == PLAIN
        if is_typical and round_start.room > longest_draft(self.drafters.num_speculations, self.rows.limit):
            tokens = sum(map(len, new)) / finished.count(False)
            self.drafters.learn(draft.round_kind, tokens, self.accounts.round_s)
        return new

    def _keep(self, new: list[list[int]]) -> list[list[int]]:
        """Append each row's new tokens, cut at its end; returns the tokens kept, none for finished rows."""
        final = self.rows.add(new)
        self.stats.tokens += sum(map(len, final))
        self.drafters.extend(final)
        return final
