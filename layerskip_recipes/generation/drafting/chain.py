"""Drafts from an early exit, token by token, and their verification in one pass.

A round of n drafted tokens costs n early passes with head, one early pass without (the last token must be verified
too), and one late pass over n + 1 tokens that starts from the hidden states of the early ones (paper, section 4.3).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, Drafter, DraftStrategy, RoundStart
from layerskip_recipes.generation.drafting.plain import choose
from layerskip_recipes.generation.sampling import accept_greedy, accept_sampled
from layerskip_recipes.generation.steps import Step, StepContext, next_logits

CHAIN = DraftStrategy("chain")
MOST_BEHIND = 128  # tokens that the draft's own layers read together, after rounds without a draft


class ChainDrafter(Drafter):
    """Drafts tokens one by one from exit E.

    Args:
        exit_layer: E.
        longest: d, the tokens of a draft.
    """

    def __init__(self, context: StepContext, exit_layer: int, longest: int) -> None:
        self.context, self.exit_layer, self.longest = context, exit_layer, longest
        # For an adapter, the model's normed state of the token before the last one, [b, 1, d].
        self.before: torch.Tensor | None = None
        # What a trained draft's own layers have not read since plain rounds: slots [b, 1], and tokens [b, 1] or, for an
        # adapter, its inputs [b, 1, 2 d].
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def behind(self) -> int:  # type: ignore[override]
        return len(self.unread)

    def begin(self, final: torch.Tensor) -> None:
        if self.context.has_adapter:
            self.before = self.context.model.norm(final)[:, None]

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:
        if self.before is not None:
            self.before[row] = self.context.model.norm(final)
        for at, _ in self.unread:
            at[row] = -1  # these tokens are gone

    def propose(self, now: RoundStart) -> DraftedTokens:
        context, depth = self.context, now.depth(self.context, self.longest)
        slots = context.cache.slots[: now.last_slot + depth + 1]
        if depth == 0:
            return DraftedTokens(CHAIN, slots, now.last[:, None])
        self._catch_up(now)
        noise = context.draft_noise(depth)
        plain = self.before is None and context.sampler.only_temperature
        if plain and context.cpp is not None and context.cpp.chain is not None:
            arguments = (now.last, now.start, depth, len(slots), self.exit_layer, noise, context.settings.temperature)
            return DraftedTokens(CHAIN, slots, *context.cpp.chain.draft(*arguments))
        return self._token_by_token(now, depth, slots, noise)

    def _token_by_token(
        self, now: RoundStart, depth: int, slots: torch.Tensor, noise: torch.Tensor | None
    ) -> DraftedTokens:
        """A draft by `depth` calls of one step."""
        context, seen, before = self.context, now.seen, self.before
        tokens, hidden, q = [now.last], [], []
        step = Step(context, draft_token, self.exit_layer)
        for i in range(depth):
            noise_i = None if noise is None else noise[:, i].contiguous()
            results = step(slots, tokens[-1], now.start + i, noise_i, seen, before)
            if context.graphs is not None and context.device.type == "cuda":
                # The next step runs the same CUDA graph, which overwrites its results.
                results = [None if result is None else result.clone() for result in results]
            token, x, q_token, seen, before = results
            tokens.append(token)
            hidden.append(x)
            q.append(q_token)
        all_q = None if noise is None else torch.stack(q, 1)
        return DraftedTokens(CHAIN, slots, torch.stack(tokens, 1), torch.cat(hidden, 1), all_q)

    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        context = self.context
        if draft.length == 0:
            return self._step(draft, now)
        self._catch_up(now)
        if context.sampler.greedy and now.seen is None:
            step = Step(context, verify_greedily, self.exit_layer, choice=False)
            return self.after(*step(draft.slots, draft.tokens, draft.hidden, now.start, self.before))
        uniform = context.sampler.uniform((context.cache.rows, draft.length), context.device)
        noise = context.noise()
        step = Step(context, chain_logits, self.exit_layer, choice=False)
        logits, states = step(draft.slots, draft.tokens, draft.hidden, now.start, self.before)
        tensors = (logits, draft.tokens, draft.q, uniform, noise, now.seen, states)
        return self.after(*Step(context, accept_chain, layers=False)(None, *tensors))

    def _step(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        """A round without a draft, which costs what a step of plain decoding costs.

        The draft's own layers catch up later, several tokens at a time.
        """
        context, noise = self.context, self.context.noise()
        if self.before is None:
            step = Step(context, next_logits, context.model.num_layers, choice=False)
            logits, unread = step(draft.slots, now.last, now.start), now.last[:, None]
        else:
            step = Step(context, step_with_states, self.exit_layer, choice=False)
            logits, x, state = step(draft.slots, now.last, now.start)
            unread = torch.cat([x, self.before], -1)
            self.before = state.clone()
        if context.own_layers:
            self.unread.append((now.start[:, None].clone(), unread))
        outcome = choose(context, logits, noise, now.seen)
        if len(self.unread) == MOST_BEHIND:
            self._catch_up(now)
        return outcome

    def _catch_up(self, now: RoundStart) -> None:
        """Let the draft's own layers read the tokens that they have not read."""
        if not self.unread:
            return
        # A graph has one shape. What has no token of its own goes to the slot of the last token, which is written anew
        # before it is read.
        spare = MOST_BEHIND - len(self.unread) if self.context.graphs is not None else 0
        unread = [*self.unread, *[(torch.full_like(self.unread[0][0], -1), self.unread[0][1])] * spare]
        at, inputs = (torch.cat(parts, 1) for parts in zip(*unread, strict=True))
        at = torch.where(at < 0, now.start[:, None], at)
        slots = self.context.cache.slots[: now.last_slot + 1]
        Step(self.context, read_later, choice=False)(slots, inputs, at)
        self.unread = []

    def after(self, result: torch.Tensor, before: torch.Tensor | None) -> torch.Tensor:
        """The result of a verification, whose `before` is kept; the next round's graphs overwrite the given one."""
        self.before = None if before is None else before.clone()
        return result


# ---- steps of drafts ----


def draft_token(context: StepContext, exit_layer: int, slots, last, start, noise, seen, before):
    """One token of each row: last, start [b]; noise [b, v'] or None; seen [b, v] or None; before [b, 1, d] or None.

    Returns:
        the token [b], its x_E [b, 1, d], the distribution q [b, v'] that it was drawn from or None, and what the next
        token goes on from: `seen` with the token, and for an adapter the state that the draft's head unembedded.
    """
    model, at = context.draft_model, start[:, None]
    x = context.run(model, last[:, None], at, slots, exit_layer=exit_layer, unembed=False)
    h = context.read_by_draft(x, before, at, slots)
    scores = context.draft_scores(h, None if seen is None else seen[:, None])[:, -1]
    token = context.in_full_vocabulary(context.sampler.choose(scores, noise))
    seen = None if seen is None else seen.scatter(1, token[:, None], True)
    return token, x, None if noise is None else scores, seen, None if before is None else model.norm(h)


def read_later(context: StepContext, slots, inputs, at):
    """The draft's own layers on tokens [b, s], or on an adapter's inputs [b, s, 2 d], at the slots `at` [b, s]."""
    own = context.own_layers
    tokens, hidden = (inputs, None) if inputs.dim() == 2 else (None, inputs)
    part: Any = {"hidden": hidden, "start_layer": own.start, "exit_layer": own.stop}
    return context.run(context.draft_model, tokens, at, slots, unembed=False, **part)


def step_with_states(context: StepContext, exit_layer: int, slots, last, start):
    """A step of the whole model, and what an adapter reads of it: logits [b, v], x_E and the normed x_L, [b, 1, d]."""
    model, at = context.model, start[:, None]
    x = context.run(model, last[:, None], at, slots, exit_layer=exit_layer, unembed=False)
    final = context.run(model, None, at, slots, hidden=x, start_layer=exit_layer, unembed=False)
    return context.unembed(final)[:, -1], x, model.norm(final)


# ---- steps of verification ----


def chain_logits(context: StepContext, exit_layer: int, slots, tokens, hidden, start, before):
    """The full model on all drafted tokens in one pass. A trained draft's own layers first read the tokens that they
    did not read while they drafted: the last one, or all looked up ones.

    tokens [b, n + 1], the root first; hidden [b, n, d], x_E of all but the last, or None: all layers run; start [b];
    before [b, 1, d] or None -> [b, n + 1, v], and for an adapter the model's normed states [b, n + 1, d].
    """
    model, draft, at = context.model, context.draft_model, start[:, None] + context.cache.slots[: tokens.shape[1]]
    if not context.own_layers and (hidden is None or not context.shares_layers):
        return context.run(model, tokens, at, slots), None
    unread = slice(0 if hidden is None else tokens.shape[1] - 1, None)
    x = context.run(draft, tokens[:, unread], at[:, unread], slots, exit_layer=exit_layer, unembed=False)
    if not context.shares_layers:
        return context.run(model, tokens, at, slots), None
    x = x if hidden is None else torch.cat([hidden, x], 1)
    if before is None:
        return context.run(model, None, at, slots, hidden=x, start_layer=exit_layer), None
    final = context.run(model, None, at, slots, hidden=x, start_layer=exit_layer, unembed=False)
    states = model.norm(final)
    # While it drafted, the adapter went on from its own states.
    context.read_by_draft(x, torch.cat([before, states[:, :-1]], 1), at, slots)
    return context.unembed(final), states


def accept_chain(context: StepContext, slots, logits, tokens, q, uniform, noise, seen, states):
    """The result of `Drafter.verify`, and `before` of the next round. Without q, as of looked up tokens, each one had
    probability 1.

    logits [b, n + 1, v], tokens [b, n + 1], q [b, n, v'], uniform [b, n], noise, seen [b, v], states [b, n + 1, d]; the
    last five or None.
    """
    seen = None if seen is None else context.seen_at(seen, tokens)
    scores, drafted = context.scores(logits, seen), tokens[:, 1:]
    if context.sampler.greedy:
        accepted, following = accept_greedy(drafted, scores)
    else:
        full_q = F.one_hot(drafted, scores.shape[-1]).to(scores) if q is None else context.full_q(q, scores)
        accepted, following = accept_sampled(drafted, full_q, scores, uniform, noise)
    return outcome(accepted, following, drafted), state_of(states, accepted)


def verify_greedily(context: StepContext, exit_layer: int, slots, tokens, hidden, start, before):
    """`chain_logits` and greedy acceptance as one graph: a greedy choice has no settings that could change."""
    logits, states = chain_logits(context, exit_layer, slots, tokens, hidden, start, before)
    accepted, following = accept_greedy(tokens[:, 1:], logits)
    return outcome(accepted, following, tokens[:, 1:]), state_of(states, accepted)


def outcome(accepted: torch.Tensor, following: torch.Tensor, drafted: torch.Tensor) -> torch.Tensor:
    """One tensor, so that the host waits once: accepted [b], next token [b], drafted [b, n] -> [b, 2 + n]."""
    return torch.cat([accepted[:, None], following[:, None], drafted], 1)


def state_of(states: torch.Tensor | None, place: torch.Tensor) -> torch.Tensor | None:
    """The state [b, 1, d] of one token of each row: states [b, n + 1, d] or None, place [b]."""
    return None if states is None else states.gather(1, place[:, None, None].expand(-1, 1, states.shape[-1]))
