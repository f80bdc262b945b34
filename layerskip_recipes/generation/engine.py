"""The decoding loop: prefill, then rounds of draft and verify (or plain steps), on one KV cache.

Self-speculation (paper, section 4.3): the layers below exit E draft d tokens one by one; their hidden states x_E are
kept; the layers from E up verify all of them in one pass, starting from those hidden states. A round costs d early
passes with head, one early pass without (the last draft must be verified too), and one late pass over d+1 tokens.
What a step computes stands in steps.py, trees of drafts in tree.py, what a round does next in adaptive.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.decoder import LayerSkipDecoder, is_plain_attention, on_device, walked
from layerskip_recipes.generation.adaptive import Arm
from layerskip_recipes.generation.compiling import CompiledSteps, cache_length, rounded
from layerskip_recipes.generation.lookup import LookUp
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.speculation import Speculation, check_lengths, check_tokens
from layerskip_recipes.generation.stats import GenerationStats
from layerskip_recipes.generation.steps import Draft, DraftHead, Steps
from layerskip_recipes.generation.timing import Clock, Reads
from layerskip_recipes.generation.tree import DraftTree
from layerskip_recipes.kv_cache import DecodingCache, visible, without_plans

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
        self.model = walked(model)
        self.prompts = [list(prompt) for prompt in prompts]
        self.exit_layer = self.model.check_exit(self.model.num_layers if exit_layer is None else exit_layer)
        self.speculation = speculation
        self.limit = max_generated_tokens
        self.sampler = sampler or Sampler()
        self.tree = None
        if speculation is not None:
            speculation.check(self.model)
            self.tree = DraftTree(
                speculation.num_speculations,
                speculation.tree_width,
                speculation.tree_children,
                greedy=self.sampler.greedy,
            )
        nodes = self.tree.nodes if self.tree else 1
        lengths = [len(prompt) for prompt in self.prompts]
        check_tokens(self.model, self.prompts)
        check_lengths(
            self.model, lengths, max_generated_tokens, spare=0 if self.tree is None or self.tree.is_chain else nodes
        )
        if isinstance(stop_tokens, int):
            raise ValueError(f"stop_tokens: {stop_tokens} is not allowed. Allowed: a list; for example [{stop_tokens}]")
        self.stop_tokens = {int(token) for token in stop_tokens}
        self.device = self.model.tok_embeddings.weight.device
        self.settings = self.sampler.settings(self.device)
        self.compiled = compiled_steps(self.model, self.device) if compile else None
        self.agree = agree or _alone
        self.on_draft = on_draft
        self.generated: list[list[int]] = [[] for _ in self.prompts]
        self.finished = [False] * len(self.prompts)
        self.stats = GenerationStats(rows=len(self.prompts))
        compiled = self.compiled
        self.clock = Clock(self.device, lambda: compiled.seconds if compiled else 0.0)
        # The last generated token is never an input; drafts behind a row's limit have slots of their own.
        needed = max(lengths) + self.limit + nodes
        least = needed if self.compiled is None else cache_length(needed)
        if cache is None or cache.rows != len(self.prompts) or cache.max_len < least:
            cache = self._new_cache(max(needed, reserve or 0))
        self.cache = cache
        self.steps: dict[tuple[int, int], Steps] = {}
        self.drafter = self.model
        if speculation is not None and speculation.drafter is not None:
            self.drafter = walked(speculation.drafter)
        self.draft_head: DraftHead | None = None
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
        users = list({id(user): user for user in (self.model, self.drafter)}.values())
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
            if self.compiled is not None:
                self.compiled.release()
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
        return Reads(self.model, self.cache, self.drafter, self.draft_head)

    @property
    def compile_s(self) -> float:
        """Seconds that compilation took so far, in all generations of this model."""
        return self.compiled.seconds if self.compiled else 0.0

    def _prepare(self) -> None:
        """The steps, and what the rounds need to know of the text so far."""
        if self.speculation is not None and self.speculation.prompt_lookup is not None:
            self.texts = [LookUp(self.speculation.prompt_lookup) for _ in self.prompts]
            for text, prompt in zip(self.texts, self.prompts, strict=True):
                text.extend(prompt)
        self.seen = None
        if self.sampler.penalises:
            vocabulary_size = self.model.tok_embeddings.num_embeddings
            self.seen = torch.zeros(len(self.prompts), vocabulary_size, dtype=torch.bool, device=self.device)
            for row, prompt in enumerate(self.prompts):
                self.seen[row, on_device(prompt, self.device)] = True

    def _steps(self, exit_layer: int, depth: int = 0) -> Steps:
        """The steps for drafts of that depth from that exit; depth 0: plain steps."""
        if (exit_layer, depth) not in self.steps:
            speculation, tree, head = self.speculation, None, None
            if depth:
                tree = replace(self.tree, depth=depth)
                if speculation.draft_vocabulary is not None:
                    self.draft_head = self.draft_head or DraftHead.of(self.model, speculation.draft_vocabulary)
                    head = self.draft_head
            drafter = self.drafter if depth else None
            self.steps[exit_layer, depth] = Steps(
                self.model, self.cache, self.sampler, self.settings, exit_layer, tree, drafter, head
            )
        return self.steps[exit_layer, depth]

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
        scores = self.sampler.scores(logits, self.seen, self.settings)
        noise = self.sampler.noise(tuple(scores.shape), self.device)
        self.last = self.agree(self.sampler.choose(scores, noise))
        return self._keep([[token] for token in self.last.tolist()])

    # ---- rounds ----

    def _step(self) -> list[list[int]]:
        """One token of each row from exit E (E = L: the ordinary model)."""
        if self.compiled is not None:
            self.compiled.begin_round()
        steps = self._steps(self.exit_layer)
        start, slots = self._where(1)
        noise = self.sampler.noise((len(self.prompts), self._vocabulary(steps, full=True)), self.device)
        logits = self._run(steps, "plain_logits", slots, self.last, start, slots)
        if self.sampler.greedy:
            self.last = self.agree(steps.choose(logits, noise, self.seen))
        else:
            self.last = self.agree(self._run(steps, "choose", slots, logits, noise, self.seen)).clone()
        self.reads.count(self.stats, len(slots), self.exit_layer)
        return self._keep([[token] for token in self.last.tolist()])

    def _round(self) -> list[list[int]]:
        """Draft, verify, keep the accepted tokens and one of the full model."""
        if self.compiled is not None:
            self.compiled.begin_round()
        started, compiled = time.perf_counter(), self.compile_s
        looked_up, match = self._look_up() if self.speculation.prompt_lookup is not None else (None, None)
        policy = self.speculation.policy
        arm = policy.pick(match)
        room = [self.limit - len(row) for row in self.generated]
        depth = self.tree.depth
        if self.compiled is None:
            # Nothing is drafted behind the limit of all rows; graphs are made for one depth.
            depth = min(depth, max(r for r, done in zip(room, self.finished, strict=True) if not done) - 1)
        steps = self._steps(arm.exit_layer, max(depth, 1))
        start, slots = self._where(steps.tree.nodes)
        confidences = None
        with self.clock.phase("draft"):
            if depth == 0 or arm.kind == "plain":
                draft = Draft(self.last[:, None], None, None)
            elif arm.kind == "lookup":
                draft = Draft(torch.cat([self.last[:, None], looked_up[:, :depth]], 1), None, None)
            elif arm.kind == "adaptive":
                draft, confidences = self._draft_adaptively(steps, arm, start, slots)
            else:
                name = "draft_chain" if self.tree.is_chain else "draft_tree"
                shape = (len(self.prompts), len(steps.tree.expanded), self._vocabulary(steps))
                noise = self.sampler.noise(shape, self.device)
                draft = self._run(steps, name, slots, self.last, start, slots, noise, self.seen)
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
        if policy.has_choice and whole and (seconds := self._seconds(started, compiled)):
            stood = sum(row[0] == n for row, runs in zip(rows, running, strict=True) if runs)
            policy.learn(arm, sum(map(len, kept)) / sum(running), seconds, stood / sum(running), depth - n)
        return kept

    def _verify(self, steps: Steps, draft: Draft, start: torch.Tensor, slots: torch.Tensor, n: int) -> torch.Tensor:
        """[b, 2 + n]: how many of n drafted tokens stand, the next token, the drafted tokens."""
        chain = draft.parents is None
        if chain and self.sampler.greedy and self.seen is None:
            return self._run(steps, "verify_greedily", slots, draft.tokens, draft.hidden, start, slots)
        b = len(self.prompts)
        uniform = self.sampler.uniform((b, n) if chain else (b, n, self.tree.candidates(1)), self.device)
        noise = self.sampler.noise((b, self._vocabulary(steps, full=True)), self.device)
        if chain:
            logits = self._run(steps, "chain_logits", slots, draft.tokens, draft.hidden, start, slots)
        else:
            parts = (draft.tokens, draft.hidden, draft.ancestors)
            logits = self._run(steps, "tree_logits", slots, *parts, start, slots)
        name = "accept_chain" if chain else "accept_tree"
        return self._run(steps, name, slots, logits, draft, start, uniform, noise, self.seen)

    def _draft_adaptively(self, steps: Steps, arm: Arm, start: torch.Tensor, slots: torch.Tensor):
        """A chain that stops by its confidences; where it may stop, the host waits for them."""
        policy = self.speculation.policy
        length = policy.lengths[arm.exit_layer]
        tokens, hidden, q, confidences, seen = [self.last], [], [], [[] for _ in self.prompts], self.seen
        unread, started, compiled = [], time.perf_counter(), self.compile_s
        for i in range(steps.tree.depth):
            noise = self.sampler.noise((len(self.prompts), self._vocabulary(steps)), self.device)
            token, x, probs, sure, seen = self._run(
                steps, "draft_one", slots, tokens[-1], start + i, slots, noise, seen, True
            )
            if self.device.type == "cuda" and self.compiled:
                token, x, sure = token.clone(), x.clone(), sure.clone()
                probs, seen = (None if t is None else t.clone() for t in (probs, seen))
            tokens.append(token)
            hidden.append(x)
            q.append(probs)
            unread.append(sure)
            # Each number of drafts that is verified needs a compiled graph: some are enough.
            may_stop = self.compiled is None or (i + 1) & i == 0
            if not may_stop and i + 1 < steps.tree.depth:
                continue
            for row, values in zip(confidences, self.agree(torch.stack(unread, 1)).tolist(), strict=True):
                row += values
            if seconds := self._seconds(started, compiled):
                length.timed(seconds / len(unread))
            of_running = [row for row, done in zip(confidences, self.finished, strict=True) if not done]
            if may_stop and not length.go_on(of_running, policy.rate(arm)):
                break
            unread, started, compiled = [], time.perf_counter(), self.compile_s
        q = None if q[0] is None else torch.stack(q, 1)
        return Draft(torch.stack(tokens, 1), torch.cat(hidden, 1), q), confidences

    def _seconds(self, started: float, compiled: float) -> float:
        """The time since then, by rank 0's clock: what is chosen by time has to be the same on all processes.

        0 if something was compiled meanwhile, which says nothing about the next time.
        """
        seconds = time.perf_counter() - started if self.compile_s == compiled else 0.0
        if self.agree is _alone:
            return seconds
        return self.agree(torch.tensor(seconds, device=self.device, dtype=torch.float32)).item()

    def _look_up(self) -> tuple[torch.Tensor | None, int | None]:
        """[b, n] drafts from the text and the worst match of a row; None unless every row that still runs has one."""
        n = self.speculation.num_speculations
        found = [None if done else text.find(n) for text, done in zip(self.texts, self.finished, strict=True)]
        if not all(row is None or row[0] for row in found):
            return None, None
        drafts = [[0] * n if row is None else row[0] for row in found]
        return on_device(drafts, self.device), min(row[1] for row in found if row is not None)

    def _run(self, steps: Steps, name: str, slots: torch.Tensor, *args):
        """A step, by its compiled graph if there is one for it."""
        step = getattr(steps, name)
        if self.compiled is None:
            return step(*args)
        key = [name, steps.exit_layer, self.cache.rows, steps.shares or steps.drafter]
        if name not in ("choose", "accept_chain"):
            key += [self.cache.max_len]
        if name in ("chain_logits", "verify_greedily"):  # those for drafts of any length
            key += [args[0].shape[1], args[1] is None]
        elif name != "plain_logits":
            key += [steps.tree]
        if name.startswith(("draft", "accept", "choose")):
            key += [self.sampler.kind, self._vocabulary(steps), steps.draft_head is None]
        if name == "accept_chain":
            key += [args[1].tokens.shape[1], args[1].q is None]
        sees_slots = not name.startswith(("accept", "choose"))
        return self.compiled(tuple(key), step, slots if sees_slots else None, *args)

    def _where(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot of each row's last token [b], and the slots that attention sees with count tokens from there."""
        starts = [len(p) + len(g) - 1 for p, g in zip(self.prompts, self.generated, strict=True)]
        end = max(starts) + count
        if self.compiled is not None:
            end = min(rounded(end, self.device), self.cache.max_len)
        return on_device(starts, self.device), self.cache.slots[:end]

    def _vocabulary(self, steps: Steps, full: bool = False) -> int:
        if steps.draft_head is not None and not full:
            return len(steps.draft_head.vocabulary)
        return self.model.tok_embeddings.num_embeddings

    def _new_cache(self, needed: int) -> DecodingCache:
        """A cache of so many slots; with compiled steps those that they know, as long as one is large enough."""
        rows = len(self.prompts)
        if self.compiled is None:
            return DecodingCache(self.model, rows, needed, self.device)
        return self.compiled.cache(self.model, rows, cache_length(needed))

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
        if self.speculation is not None and self.speculation.prompt_lookup is not None:
            for text, tokens in zip(self.texts, kept, strict=True):
                text.extend(tokens)
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


def compiled_steps(model: LayerSkipDecoder, device: torch.device) -> CompiledSteps:
    """The graphs of a model, kept with it as long as its weights are of the same kinds."""
    kept = getattr(model, "compiled_steps", None)
    weights = tuple((name, type(p), p.dtype, p.shape) for name, p in model.named_parameters())
    if kept is None or (kept.device, kept.weights) != (device, weights):
        model.compiled_steps = CompiledSteps(device, weights)
    return model.compiled_steps
