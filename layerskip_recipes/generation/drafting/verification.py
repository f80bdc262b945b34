"""Verification: one forward pass of the full model over all drafted tokens, and how many of them are accepted.

After a chain it continues from the early hidden states that the draft has computed (paper, section 4.3); after other
drafts it runs all layers. A round without a draft is a plain step.
"""

import torch
import torch.nn.functional as F

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, RoundStart
from layerskip_recipes.generation.sampling import accept
from layerskip_recipes.generation.steps import Step, StepContext, choose_token, next_logits

MOST_BEHIND = 128  # the most tokens that the draft's own layers leave unread during plain rounds


class Verifier:
    """Verifies the drafts of a generation, and makes its plain steps.

    `exit_layer`: the exit that drafts, or L. It also keeps what a trained draft needs of the text: an adapter's last
    state, and the tokens that the draft's own layers have not read.
    """

    def __init__(self, context: StepContext, exit_layer: int) -> None:
        self.context, self.exit_layer = context, exit_layer
        # For an adapter: the normed x_L of the token before the last one, [b, 1, d].
        self.last_state: torch.Tensor | None = None
        # Inputs of plain rounds that a trained draft's own layers have not read: slots [b, 1], and tokens [b, 1] or an
        # adapter's inputs [b, 1, 2 d].
        self.unread: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def behind(self) -> int:
        """How many of the last tokens the draft's own layers have not read."""
        return len(self.unread)

    def begin(self, final: torch.Tensor) -> None:
        """After the prefill; final [b, d] is x_L of each row's last token in the cache."""
        if self.context.has_adapter:
            self.last_state = self.context.model.norm(final)[:, None]

    def replace(self, row: int, final: torch.Tensor) -> None:
        """A batch row continues another text, which is in the cache; final [d] is x_L of its last token."""
        if self.last_state is not None:
            self.last_state[row] = self.context.model.norm(final)
        for at, _ in self.unread:
            at[row] = -1  # skip the old text's tokens

    def verify(self, draft: DraftedTokens, round_start: RoundStart) -> torch.Tensor:
        """[b, 2 + n]: the number of accepted tokens, the full model's next token, the drafted tokens."""
        if draft.outcome is not None:
            return draft.outcome
        if draft.num_drafted == 0:
            return self._plain_step(round_start)
        self.catch_up(round_start)
        slots = round_start.slots(self.context, draft.num_drafted)
        inputs = (round_start.start, round_start.keys, round_start.seen, self.last_state)
        result, state = verify_tokens(self.context, self.exit_layer, slots, draft.tokens, draft.hidden, *inputs)
        self.keep_state(state)
        return result

    def keep_state(self, state: torch.Tensor | None) -> None:
        """A copy: the next CUDA graph replay overwrites its outputs."""
        self.last_state = None if state is None else state.clone()

    def _plain_step(self, round_start: RoundStart) -> torch.Tensor:
        """A round without a draft; the draft's own layers catch up later."""
        context, slots = self.context, round_start.slots(self.context)
        if self.last_state is None:
            step = Step(context, next_logits, context.output_exit, samples=False)
            logits, unread = step(slots, round_start.last, round_start.start), round_start.last[:, None]
        else:
            step = Step(context, next_logits_and_states, self.exit_layer, samples=False)
            logits, x, state = step(slots, round_start.last, round_start.start)
            unread = torch.cat([x, self.last_state], -1)
            self.last_state = state.clone()
        if context.trained_layers:
            self.unread.append((round_start.start[:, None].clone(), unread))
        choose = Step(context, choose_token, layers=False)
        run = choose.run if context.sampler.greedy else choose
        following = run(None, logits, round_start.keys, round_start.start + 1, round_start.seen)
        if len(self.unread) == MOST_BEHIND:
            self.catch_up(round_start)
        return F.pad(following[:, None], (1, 0))  # no accepted token

    def catch_up(self, round_start: RoundStart) -> None:
        """Run the draft's own layers over the tokens that they have not read."""
        if not self.unread:
            return
        # A graph has one shape. Padding goes to the last token's slot, which is overwritten before it is read.
        spare = MOST_BEHIND - len(self.unread) if self.context.backend.fixed_shapes else 0
        unread = [*self.unread, *[(torch.full_like(self.unread[0][0], -1), self.unread[0][1])] * spare]
        at, inputs = (torch.cat(parts, 1) for parts in zip(*unread, strict=True))
        at = torch.where(at < 0, round_start.start[:, None], at)
        Step(self.context, fill_draft_cache, samples=False)(round_start.slots(self.context), inputs, at)
        self.unread = []


def verify_tokens(context: StepContext, exit_layer: int, slots, tokens, hidden, start, keys, seen, state):
    """The result of `Verifier.verify`, and the last accepted token's state; for the shapes see the steps."""
    logits, states = Step(context, draft_logits, exit_layer, samples=False)(slots, tokens, hidden, start, state)
    return Step(context, accept_tokens, layers=False)(None, logits, tokens, start, keys, seen, states)


# ---- the steps ----


def fill_draft_cache(context: StepContext, slots, inputs, at):
    """Run the draft's own layers over tokens [b, s] or an adapter's inputs [b, s, 2 d] in the slots `at` [b, s]."""
    return context.backend.run(context.draft_decoder, inputs, at, slots, context.trained_layers, only_cache=True)


def next_logits_and_states(context: StepContext, exit_layer: int, slots, last, start):
    """A step of the whole model: logits [b, v], and for an adapter x_E and the normed x_L, [b, 1, d]."""
    model, at = context.model, start[:, None]
    backend = context.backend
    x = backend.run(model, last[:, None], at, slots, range(exit_layer))
    final = backend.run(model, x, at, slots, range(exit_layer, model.num_layers))
    return backend.logits(model, final)[:, -1], x, model.norm(final)


def draft_logits(context: StepContext, exit_layer: int, slots, tokens, hidden, start, state):
    """The full model over all drafted tokens, after a draft's own layers have read the tokens that are new to them.

    tokens [b, n + 1], first the last token of the text; hidden [b, n, d], x_E of all but the last, or None to run all
    layers; start [b]; state [b, 1, d] or None -> logits [b, n + 1, v], and for an adapter the normed x_L [b, n + 1, d].
    """
    backend, model, all_layers = context.backend, context.model, range(context.model.num_layers)
    at = start[:, None] + context.cache.slots[: tokens.shape[1]]
    if not context.trained_layers and (hidden is None or not context.shares_layers):
        return backend.run(model, tokens, at, slots, all_layers, unembed=True), None
    unread = slice(0 if hidden is None else tokens.shape[1] - 1, None)
    # The model continues from the states of its own early layers. A copy only fills its cache here.
    x = backend.run(
        context.draft_decoder,
        tokens[:, unread],
        at[:, unread],
        slots,
        range(exit_layer),
        only_cache=not context.shares_layers,
    )
    if not context.shares_layers:
        return backend.run(model, tokens, at, slots, all_layers, unembed=True), None
    x = x if hidden is None else torch.cat([hidden, x], 1)
    if state is None:
        return backend.run(model, x, at, slots, all_layers[exit_layer:], unembed=True), None
    final = backend.run(model, x, at, slots, all_layers[exit_layer:])
    states = model.norm(final)
    # While drafting the adapter saw its own states. Now it reads the model's.
    context.read_by_draft(x, torch.cat([state, states[:, :-1]], 1), at, slots, only_cache=True)
    return backend.logits(model, final), states


def accept_tokens(context: StepContext, slots, logits, tokens, start, keys, seen, states):
    """The result of `Verifier.verify`, and the last accepted token's state.

    logits [b, n + 1, v], tokens [b, n + 1], start [b]; keys [b, 2], seen [b, v], states [b, n + 1, d], each or None ->
    [b, 2 + n] in one tensor, so that the host waits once, and [b, 1, d] or None.
    """
    seen = None if seen is None else context.seen_at(seen, tokens)
    positions = start[:, None] + 1 + context.cache.slots[: tokens.shape[1]]
    chosen = context.backend.choose_tokens(context.scores(logits, seen), keys, positions)
    num_accepted, following = accept(tokens[:, 1:], chosen)
    result = torch.cat([num_accepted[:, None], following[:, None], tokens[:, 1:]], 1)
    if states is None:
        return result, None
    return result, states.gather(1, num_accepted[:, None, None].expand(-1, 1, states.shape[-1]))
