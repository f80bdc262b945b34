"""The decoding loop: prefill, then rounds of draft and verify (or plain steps), on one KV cache.

Self-speculation (paper, section 4.3): the layers below exit E draft d tokens one by one; their hidden states x_E are
kept; the layers from E up verify all of them in one pass, starting from those hidden states. A round costs d early
passes with head, one early pass without (the last draft must be verified too), and one late pass over d+1 tokens.
What a step computes stands in steps.py, what runs it in runner.py, drafts in drafting.py and tree.py, what a round does
next in adaptive.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.choice import Arm
from layerskip_recipes.generation.drafting.drafts import Drafting
from layerskip_recipes.generation.drafting.speculation import Speculation, check_lengths, check_tokens
from layerskip_recipes.generation.kernels.compiling import compiled_steps
from layerskip_recipes.generation.runner import Runner
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.steps import Draft, Steps
from layerskip_recipes.generation.timing import Clock, Reads, Stopwatch
from layerskip_recipes.model.decoder import as_layerskip_decoder, is_plain_attention, on_device
from layerskip_recipes.model.kv_cache import DecodingCache, visible, without_plans

PREFILL_CHUNK = 512  # positions whose mask is held at a time, where a prompt goes on from a cache


class Generation:
    """One generation as an iterator: each step yields, per row, the new tokens that are final.

    Stopping early (break) is fine: `stats` and `generated` hold what there is so far.

    Args and errors: see `generate`. `prompts` are rows of token ids without padding. Besides:
        speculation: how to draft; None decodes plainly, from exit_layer if that is given.
        cache: of an earlier generation (its `cache`), of as many rows: what it holds of the prompts is not run again.
        agree: makes what a round chose the same on all processes.
        reserve: slots to make room for in a new cache, at least; None: what this generation needs.
        on_draft: called with each round's drafted tokens, [b][n], before they are verified; of a tree with those that
            a chain would have.

    Example:
        >>> from torchtune.models.llama3._component_builders import llama3
        >>> from layerskip_recipes import Generation, Speculation
        >>> model = llama3(vocab_size=50, num_layers=4, num_heads=2, num_kv_heads=1, embed_dim=8, max_seq_len=64)
        >>> generation = Generation(model, [[1, 2, 3]], 16, speculation=Speculation(exit_layer=2, num_speculations=6))
        >>> text = [token for new in generation for token in new[0]]  # new: [b][n], what a round made final
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
        compile: bool = False,
        cache: DecodingCache | None = None,
        agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
        reserve: int | None = None,
        on_draft: Callable[[list[list[int]]], None] | None = None,
    ) -> None:
        self.model = as_layerskip_decoder(model)
        self.prompts = [list(prompt) for prompt in prompts]
        self.exit_layer = self.model.check_exit(self.model.num_layers if exit_layer is None else exit_layer)
        self.speculation = speculation
        self.limit = max_generated_tokens
        self.sampler = sampler or Sampler()
        if speculation is not None:
            speculation.check(self.model)
        device = self.model.tok_embeddings.weight.device
        compiled = compiled_steps(self.model, device) if compile else None
        self.runner = runner = Runner(self.model, len(self.prompts), self.sampler, speculation, compiled)
        self.device, self.tree = device, runner.tree
        nodes = self.tree.nodes if self.tree else 1
        lengths = [len(prompt) for prompt in self.prompts]
        check_tokens(self.model, self.prompts)
        check_lengths(
            self.model, lengths, max_generated_tokens, spare=0 if self.tree is None or self.tree.is_chain else nodes
        )
        if isinstance(stop_tokens, int):
            raise ConfigError(
                f"stop_tokens: {stop_tokens} is not allowed. Allowed: a list; for example [{stop_tokens}]"
            )
        self.stop_tokens = {int(token) for token in stop_tokens}
        self.agree = agree or _alone
        self.on_draft = on_draft
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.finished = [False] * len(self.prompts)
        self.stats = GenerationStats(rows=len(self.prompts))
        self.clock = Clock(device, lambda: runner.compile_s)
        self.watch = Stopwatch(device, lambda: runner.compile_s, agree)
        # The last generated token is never an input; drafts behind a row's limit have slots of their own.
        runner.take_cache(cache, max(lengths) + self.limit + nodes, reserve or 0)
        self.cache = runner.cache
        self.started = False

    @torch.inference_mode()
    def __iter__(self) -> Iterator[list[list[int]]]:
        if self.started:
            raise RuntimeError("a Generation runs once; make another one to generate again")
        if self.model.decoding:
            raise RuntimeError(
                "another Generation of this model has not ended: iterate it to its end, or close() its iterator"
            )
        self.started = True
        # Logits in one piece, whatever a training left.
        users = list({id(user): user for user in (self.model, self.runner.drafter)}.values())
        training = [(module, module.training) for user in users for module in user.modules()]
        chunks = [(user, user.num_output_chunks) for user in users]
        timed, rest = 0, 0.0  # rounds that compiled nothing; of the others what was no compilation
        for user in users:
            user.num_output_chunks = 0
            user.eval()
        try:
            with self.cache.used_by(*users):
                self._prepare()
                started = time.perf_counter()
                with without_plans(self.device):
                    new = self._prefill()
                self.stats.prefill_s = time.perf_counter() - started
                yield new
                while not all(self.finished):
                    started, compiled, phases = time.perf_counter(), self.compile_s, self.clock.mark()
                    with without_plans(self.device):
                        new = self._step() if self.speculation is None else self._round()
                    self.stats.rounds += 1
                    if self.compile_s == compiled:
                        self.stats.decode_s += time.perf_counter() - started
                        timed += 1
                    else:
                        rest += time.perf_counter() - started - (self.compile_s - compiled)
                        self.stats.compile_s += self.compile_s - compiled
                        self.clock.forget(phases)
                    yield new
        finally:
            self.clock.read(self.stats)
            if timed:
                self.stats.scale_times(self.stats.rounds / timed)
            else:
                self.stats.decode_s = rest
            # What stands in the cache: all but the last token, which was never an input.
            if all(self.generated):
                self.cache.tokens = [(p + g)[:-1] for p, g in zip(self.prompts, self.generated, strict=True)]
            if self.runner.compiled is not None:
                self.runner.compiled.release()
            for module, was in training:
                module.training = was
            for user, was in chunks:
                user.num_output_chunks = was

    @property
    def _depth(self) -> int:
        """The layers that run over the text."""
        return self.model.num_layers if self.speculation is not None else self.exit_layer

    @cached_property
    def reads(self) -> Reads:
        """Made in the first round: only then there are a cache and a draft head to measure."""
        return Reads(self.model, self.cache, self.runner.drafter, self.runner.draft_head)

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.runner.compile_s

    def _prepare(self) -> None:
        """What the rounds need to know of the text so far."""
        self.drafting = None
        if self.speculation is not None:
            self.drafting = Drafting(self.runner, self.speculation, self.prompts, self.agree, self.watch)
        self.seen = None
        if self.sampler.penalises:
            vocabulary_size = self.model.tok_embeddings.num_embeddings
            self.seen = torch.zeros(len(self.prompts), vocabulary_size, dtype=torch.bool, device=self.device)
            for row, prompt in enumerate(self.prompts):
                self.seen[row, on_device(prompt, self.device)] = True

    # ---- prefill ----

    def _prefill(self) -> list[list[int]]:
        """The prompts through the model, the head at each row's last position only."""
        held = self.cache.tokens if self._depth <= self.cache.depth else [[] for _ in self.prompts]
        reused = min(_common(old, new) for old, new in zip(held, self.prompts, strict=True))
        reused = min(reused, min(len(prompt) for prompt in self.prompts) - 1)
        # Until the end of the prefill no more than that counts: it may be interrupted.
        self.cache.tokens, self.cache.depth = [prompt[:reused] for prompt in self.prompts], self._depth
        width = max(len(prompt) for prompt in self.prompts)
        self.stats.reused_tokens = reused * len(self.prompts)
        self.stats.prefill_tokens = sum(len(prompt) - reused for prompt in self.prompts)
        # Padded on the right: what stands after a row's prompt is overwritten before any of its queries sees it.
        tokens = on_device([prompt + [0] * (width - len(prompt)) for prompt in self.prompts], self.device)
        last = on_device([len(prompt) - 1 for prompt in self.prompts], self.device)
        whole = reused == 0 and all(is_plain_attention(layer) for layer in self.model.layers)
        rows = torch.arange(len(self.prompts), device=self.device)
        final = None
        for start in range(reused, width, width if whole else PREFILL_CHUNK):
            end = width if whole else min(start + PREFILL_CHUNK, width)
            at = self.cache.slots[None, start:end]
            self.cache.seek(at, end)
            mask = None if whole else visible(self.cache.slots[:end], at, self.model.tok_embeddings.weight.dtype)
            x = self.model(tokens[:, start:end], exit_layer=self._depth, unembed=False, input_pos=at, mask=mask)
            here = x[rows, (last - start).clamp(0, end - start - 1)]
            ends_here = ((last >= start) & (last < end))[:, None]
            final = here if final is None else torch.where(ends_here, here, final)
        logits = self.model(hidden=final[:, None], start_layer=self.model.num_layers)[:, -1]
        scores = self.sampler.scores(logits, self.seen, self.runner.settings)
        self.last = self.agree(self.sampler.choose(scores, self.runner.noise()))
        return self._keep([[token] for token in self.last.tolist()])

    # ---- rounds ----

    def _step(self) -> list[list[int]]:
        """One token of each row from exit E (E = L: the ordinary model)."""
        self.runner.begin_round()
        steps = self.runner.steps(self.exit_layer)
        start, slots = self._where(1)
        noise = self.runner.noise()
        logits = self.runner.run(steps, "plain_logits", slots, self.last, start, slots)
        if self.sampler.greedy:
            self.last = self.agree(steps.choose(logits, noise, self.seen))
        else:
            self.last = self.agree(self.runner.run(steps, "choose", slots, logits, noise, self.seen)).clone()
        self.reads.count(self.stats, len(slots), self.exit_layer)
        return self._keep([[token] for token in self.last.tolist()])

    def _round(self) -> list[list[int]]:
        """Draft, verify, keep the accepted tokens and one of the full model."""
        self.runner.begin_round()
        started = self.watch.start()
        looked_up, match = self.drafting.look_up(self.finished)
        policy = self.speculation.policy
        arm = policy.pick(match)
        room = [self.limit - len(row) for row in self.generated]
        depth = self.tree.depth
        if self.runner.compiled is None:
            # Nothing is drafted behind the limit of all rows; graphs are made for one depth.
            depth = min(depth, max(r for r, done in zip(room, self.finished, strict=True) if not done) - 1)
        steps = self.runner.steps(arm.exit_layer, max(depth, 1))
        start, slots = self._where(steps.tree.nodes)
        confidences = None
        with self.clock.phase("draft"):
            if depth == 0 or arm.kind == "plain":
                draft = Draft(self.last[:, None], None, None)
            elif arm.kind == "lookup":
                draft = Draft(torch.cat([self.last[:, None], looked_up[:, :depth]], 1), None, None)
            elif arm.kind == "adaptive":
                draft, confidences = self.drafting.stopping(
                    steps, arm, self.last, start, slots, self.seen, self.finished
                )
            else:
                draft = self.drafting.whole(steps, self.last, start, slots, self.seen)
        if self.on_draft is not None:
            drafted = draft.tokens[:, 1:].tolist()
            self.on_draft(drafted if draft.parents is None else [self.tree.chain(row) for row in drafted])

        chain = draft.parents is None
        b, n = len(self.prompts), draft.tokens.shape[1] - 1 if chain else depth
        with self.clock.phase("verify"):
            outcome = self._verify(steps, draft, start, slots, n)
            outcome = self.agree(outcome)
        self.last = outcome[:, 1].clone()
        # The only time in a round that the host waits for the device.
        rows = outcome.tolist()

        running = [not done for done in self.finished]
        kept = self._keep([[*tokens[:count], following] for count, following, *tokens in rows])
        for row in range(b):
            if running[row]:
                # The last token of a round is the full model's own; what stands behind a stop counts nowhere.
                accepted = len(kept[row]) - 1
                stopped = accepted < rows[row][0]
                self.stats.count_round(accepted if stopped else min(n, room[row] - 1), accepted)
                if confidences is not None:
                    policy.lengths[arm.exit_layer].learn(confidences[row], rows[row][0])
        self._count_round(arm, draft, slots, n)
        # A round cut at the limit says nothing about others, nor do the rows that had finished.
        whole = max(r for r, runs in zip(room, running, strict=True) if runs) > self.tree.depth
        if policy.has_choice and whole and (seconds := self.watch.since(started)):
            stood = sum(row[0] == n for row, runs in zip(rows, running, strict=True) if runs)
            policy.learn(arm, sum(map(len, kept)) / sum(running), seconds, stood / sum(running), depth - n)
        return kept

    def _verify(self, steps: Steps, draft: Draft, start: torch.Tensor, slots: torch.Tensor, n: int) -> torch.Tensor:
        """[b, 2 + n]: how many of n drafted tokens stand, the next token, the drafted tokens."""
        chain = draft.parents is None
        if chain and self.sampler.greedy and self.seen is None:
            return self.runner.run(steps, "verify_greedily", slots, draft.tokens, draft.hidden, start, slots)
        b = len(self.prompts)
        uniform = self.sampler.uniform((b, n) if chain else (b, n, self.tree.candidates(1)), self.device)
        noise = self.runner.noise()
        if chain:
            logits = self.runner.run(steps, "chain_logits", slots, draft.tokens, draft.hidden, start, slots)
        else:
            parts = (draft.tokens, draft.hidden, draft.ancestors)
            logits = self.runner.run(steps, "tree_logits", slots, *parts, start, slots)
        name = "accept_chain" if chain else "accept_tree"
        return self.runner.run(steps, name, slots, logits, draft, start, uniform, noise, self.seen)

    def _where(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot of each row's last token [b], and the slots that attention sees with count tokens from there."""
        starts = [len(p) + len(g) - 1 for p, g in zip(self.prompts, self.generated, strict=True)]
        return on_device(starts, self.device), self.runner.visible(max(starts) + count)

    def _keep(self, new: list[list[int]]) -> list[list[int]]:
        """Append each row's new tokens, cut at a stop token and at the limit; none for rows that had finished."""
        kept = []
        for row, tokens in enumerate(new):
            if self.finished[row]:
                kept.append([])
                continue
            tokens = tokens[: self.limit - len(self.generated[row])]
            stop = next((i for i, token in enumerate(tokens) if token in self.stop_tokens), None)
            if stop is not None:
                tokens = tokens[: stop + 1]
            self.generated[row] += tokens
            self.stats.tokens += len(tokens)
            self.finished[row] = stop is not None or len(self.generated[row]) >= self.limit
            kept.append(tokens)
        if self.drafting is not None:
            self.drafting.extend(kept)
        if self.seen is not None:
            at = on_device([(row, token) for row, tokens in enumerate(kept) for token in tokens], self.device)
            if len(at):
                self.seen[at[:, 0], at[:, 1]] = True
        return kept

    def _count_round(self, arm: Arm, draft: Draft, slots: torch.Tensor, n: int) -> None:
        """Statistics of a round: its kind, and what its steps read."""
        e, depth = arm.exit_layer, self.model.num_layers
        self.stats.arms[f"{arm.kind} exit {e}" if arm.kind in ("fixed", "adaptive") else arm.kind] += 1
        # The late pass over all drafts, and the early one of the last draft, which no head looked at yet.
        self.reads.count(self.stats, len(slots), depth)
        if draft.hidden is not None:
            self.stats.draft_steps += n
            self.reads.count(self.stats, len(slots), e, times=n, draft=True)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """One process agrees with itself."""
    return tensor


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts share at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
