"""Drafts from an early exit, token by token, and their verification in one forward pass.

A round of n drafted tokens costs n early passes with the head, one early pass without the head for the last token, and
one late pass over n + 1 tokens that starts from the early hidden states (paper, section 4.3).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, Drafter, RoundKind, RoundStart
from layerskip_recipes.generation.sampling import accept, confidence
from layerskip_recipes.generation.steps import Step, StepContext, choose_token, next_logits

CHAIN = RoundKind("chain")
MOST_BEHIND = 128  # the most tokens that the draft's own layers leave unread during plain rounds


class ChainDrafter(Drafter):
    """Drafts up to `num_speculations` tokens one by one from the exit E = `exit_layer`.

    A draft ends once the confidence that all of it is accepted falls below `min_confidence`. The host must see each
    token at once, and shapes vary, so this needs a CPU, no graphs and one process.
    """

    def __init__(
        self, context: StepContext, exit_layer: int, num_speculations: int = 0, min_confidence: float = 0.0
    ) -> None:
        self.context, self.exit_layer, self.num_speculations = context, exit_layer, num_speculations
        can_stop = context.device.type == "cpu" and context.graphs is None and not context.shared
        self.min_confidence = min_confidence if can_stop else 0.0
        # For an adapter: the normed x_L of the token before the last one, [b, 1, d].
        self.last_state: torch.Tensor | None = None
        # Inputs of plain rounds that a trained draft's own layers have not read: slots [b, 1], and tokens [b, 1] or an
        # adapter's inputs [b, 1, 2 d].
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.drafted = False  # this round

    @property
    def behind(self) -> int:
        """How many of the last tokens the draft's own layers have not read."""
        return len(self.unread)

    def offer(self, now: RoundStart) -> RoundKind:
        return CHAIN

    def extend(self, tokens: Sequence[Sequence[int]]) -> float | None:
        counts, drafted = [len(new) for new in tokens if new], self.drafted
        self.drafted = False
        return sum(counts) / len(counts) if counts and drafted else None

    def begin(self, final: torch.Tensor) -> None:
        if self.context.has_adapter:
            self.last_state = self.context.model.norm(final)[:, None]

    def replace(self, row: int, text: Sequence[int], final: torch.Tensor) -> None:
        if self.last_state is not None:
            self.last_state[row] = self.context.model.norm(final)
        for at, _ in self.unread:
            at[row] = -1  # skip the old text's tokens

    def propose(self, now: RoundStart) -> DraftedTokens:
        context, num_to_draft = self.context, now.num_to_draft(self.context, self.num_speculations)
        if num_to_draft == 0:
            return DraftedTokens(CHAIN, now.last[:, None])
        self.drafted = True
        self._catch_up(now)
        slots = now.slots(context, num_to_draft)
        running = torch.tensor([float(not done) for done in now.finished])  # the confidence of empty drafts
        in_one_call = self.last_state is None and context.sampler.only_temperature
        if in_one_call and context.cpp is not None and context.cpp.draft is not None:
            temperature = context.sampler.temperature
            arguments = (now.last, now.start, num_to_draft, len(slots), self.exit_layer, now.keys, temperature)
            return DraftedTokens(CHAIN, *context.cpp.draft(*arguments, running, self.min_confidence))
        return self._token_by_token(now, num_to_draft, slots, running)

    def _token_by_token(
        self, now: RoundStart, num_to_draft: int, slots: torch.Tensor, confident: torch.Tensor
    ) -> DraftedTokens:
        context, seen, state = self.context, now.seen, self.last_state
        tokens, hidden = [now.last], []
        step = Step(context, draft_token, self.exit_layer, self.min_confidence > 0)
        for i in range(num_to_draft):
            results = step(slots, tokens[-1], now.start + i, now.keys, seen, state)
            if context.graphs is not None and context.device.type == "cuda":
                # The next replay of this CUDA graph overwrites its outputs.
                results = [None if result is None else result.clone() for result in results]
            token, x, sure, seen, state = results
            tokens.append(token)
            hidden.append(x)
            if self.min_confidence:
                confident = confident * sure
                if confident.max() < self.min_confidence:
                    break
        return DraftedTokens(CHAIN, torch.stack(tokens, 1), torch.cat(hidden, 1))

    def verify(self, draft: DraftedTokens, now: RoundStart) -> torch.Tensor:
        """[b, 2 + n]: the number of accepted tokens, the full model's next token, the drafted tokens."""
        context = self.context
        if draft.num_drafted == 0:
            return self._step(now)
        self._catch_up(now)
        inputs = (now.slots(context, draft.num_drafted), draft.tokens, draft.hidden, now.start, self.last_state)
        logits, states = Step(context, chain_logits, self.exit_layer, samples=False)(*inputs)
        tensors = (logits, draft.tokens, now.start, now.keys, now.seen, states)
        result, state = Step(context, accept_chain, layers=False)(None, *tensors)
        # A copy: the next CUDA graph replay overwrites its outputs.
        self.last_state = None if state is None else state.clone()
        return result

    def _step(self, now: RoundStart) -> torch.Tensor:
        """A round without a draft, at the cost of a plain step; the draft's own layers catch up later."""
        context, slots = self.context, now.slots(self.context)
        if self.last_state is None:
            step = Step(context, next_logits, context.depth, samples=False)
            logits, unread = step(slots, now.last, now.start), now.last[:, None]
        else:
            step = Step(context, step_with_states, self.exit_layer, samples=False)
            logits, x, state = step(slots, now.last, now.start)
            unread = torch.cat([x, self.last_state], -1)
            self.last_state = state.clone()
        if context.own_layers:
            self.unread.append((now.start[:, None].clone(), unread))
        choose = Step(context, choose_token, layers=False)
        run = choose.run if context.sampler.greedy else choose
        following = run(None, logits, now.keys, now.start + 1, now.seen)
        outcome = F.pad(following[:, None], (1, 0))  # no accepted token
        if len(self.unread) == MOST_BEHIND:
            self._catch_up(now)
        return outcome

    def _catch_up(self, now: RoundStart) -> None:
        """Run the draft's own layers over the tokens that they have not read."""
        if not self.unread:
            return
        # A graph has one shape. Padding goes to the last token's slot, which is overwritten before it is read.
        spare = MOST_BEHIND - len(self.unread) if self.context.graphs is not None else 0
        unread = [*self.unread, *[(torch.full_like(self.unread[0][0], -1), self.unread[0][1])] * spare]
        at, inputs = (torch.cat(parts, 1) for parts in zip(*unread, strict=True))
        at = torch.where(at < 0, now.start[:, None], at)
        Step(self.context, read_later, samples=False)(now.slots(self.context), inputs, at)
        self.unread = []


# ---- steps of drafts ----


def draft_token(context: StepContext, exit_layer: int, confident: bool, slots, last, start, keys, seen, state):
    """Draft one token per row: last, start [b]; keys [b, 2], seen [b, v], state [b, 1, d], each or None.

    Returns the token [b], x_E of `last` [b, 1, d], with `confident` the `confidence` [b], `seen` with the token, and an
    adapter's state.
    """
    model, at = context.draft_decoder, start[:, None]
    x = context.run(model, last[:, None], at, slots, exit_layer=exit_layer, unembed=False)
    h = context.read_by_draft(x, state, at, slots)
    scores = context.draft_scores(h, None if seen is None else seen[:, None])
    ids = None if context.draft_head is None else context.draft_head.vocabulary
    token = context.choose_tokens(scores, keys, at + 1, ids)[:, 0]
    token = token if ids is None else ids[token]
    seen = None if seen is None else seen.scatter(1, token[:, None], True)
    sure = confidence(scores[:, 0]) if confident else None
    return token, x, sure, seen, None if state is None else model.norm(h)


def read_later(context: StepContext, slots, inputs, at):
    """Run the draft's own layers over tokens [b, s] or an adapter's inputs [b, s, 2 d] in the slots `at` [b, s]."""
    own = context.own_layers
    tokens, hidden = (inputs, None) if inputs.dim() == 2 else (None, inputs)
    part: Any = {"hidden": hidden, "start_layer": own.start, "exit_layer": own.stop}
    return context.run(context.draft_decoder, tokens, at, slots, unembed=False, only_cache=True, **part)


def step_with_states(context: StepContext, exit_layer: int, slots, last, start):
    """A step of the whole model: logits [b, v], and for an adapter x_E and the normed x_L, [b, 1, d]."""
    model, at = context.model, start[:, None]
    x = context.run(model, last[:, None], at, slots, exit_layer=exit_layer, unembed=False)
    final = context.run(model, None, at, slots, hidden=x, start_layer=exit_layer, unembed=False)
    return context.unembed(final)[:, -1], x, model.norm(final)


# ---- steps of verification ----


def chain_logits(context: StepContext, exit_layer: int, slots, tokens, hidden, start, state):
    """The full model over all drafted tokens, after a draft's own layers have read the tokens that are new to them.

    tokens [b, n + 1], first the last token of the text; hidden [b, n, d], x_E of all but the last, or None to run all
    layers; start [b]; state [b, 1, d] or None -> logits [b, n + 1, v], and for an adapter the normed x_L [b, n + 1, d].
    """
    model, at = context.model, start[:, None] + context.cache.slots[: tokens.shape[1]]
    if not context.own_layers and (hidden is None or not context.shares_layers):
        return context.run(model, tokens, at, slots), None
    unread = slice(0 if hidden is None else tokens.shape[1] - 1, None)
    # The model continues from the states of its own early layers. A copy only fills its cache here.
    part: Any = {"exit_layer": exit_layer, "unembed": False, "only_cache": not context.shares_layers}
    x = context.run(context.draft_decoder, tokens[:, unread], at[:, unread], slots, **part)
    if not context.shares_layers:
        return context.run(model, tokens, at, slots), None
    x = x if hidden is None else torch.cat([hidden, x], 1)
    if state is None:
        return context.run(model, None, at, slots, hidden=x, start_layer=exit_layer), None
    final = context.run(model, None, at, slots, hidden=x, start_layer=exit_layer, unembed=False)
    states = model.norm(final)
    # While drafting the adapter saw its own states. Now it reads the model's.
    context.read_by_draft(x, torch.cat([state, states[:, :-1]], 1), at, slots, only_cache=True)
    return context.unembed(final), states


def accept_chain(context: StepContext, slots, logits, tokens, start, keys, seen, states):
    """The result of `ChainDrafter.verify`, and the last accepted token's state.

    logits [b, n + 1, v], tokens [b, n + 1], start [b]; keys [b, 2], seen [b, v], states [b, n + 1, d], each or None ->
    [b, 2 + n] in one tensor, so that the host waits once, and [b, 1, d] or None.
    """
    seen = None if seen is None else context.seen_at(seen, tokens)
    positions = start[:, None] + 1 + context.cache.slots[: tokens.shape[1]]
    chosen = context.choose_tokens(context.scores(logits, seen), keys, positions)
    num_accepted, following = accept(tokens[:, 1:], chosen)
    result = torch.cat([num_accepted[:, None], following[:, None], tokens[:, 1:]], 1)
    if states is None:
        return result, None
    return result, states.gather(1, num_accepted[:, None, None].expand(-1, 1, states.shape[-1]))
