"""Drafts from an early exit, token by token (paper, section 4.3)."""

from collections.abc import Sequence

import torch

from layerskip_recipes.generation.drafting.drafter import DraftedTokens, Drafter, RoundKind, RoundStart
from layerskip_recipes.generation.drafting.verification import Verifier, verify_tokens
from layerskip_recipes.generation.sampling import confidence
from layerskip_recipes.generation.steps import Step, StepContext

CHAIN = RoundKind("chain")


class ChainDrafter(Drafter):
    """Drafts up to `num_speculations` tokens one by one from the verifier's exit.

    n drafted tokens cost n early passes with the head. Verification then runs the early layers once more, for the last
    token, and the late layers over n + 1 tokens. A draft ends once the confidence that all of it is accepted falls
    below `min_confidence`. The host must see each token at once, and shapes vary, so this needs a CPU, no graphs and
    one process.
    """

    def __init__(self, verifier: Verifier, num_speculations: int, min_confidence: float = 0.0) -> None:
        self.verifier, self.context, self.exit_layer = verifier, verifier.context, verifier.exit_layer
        self.num_speculations = num_speculations
        context = self.context
        can_end = context.device.type == "cpu" and not context.backend.fixed_shapes and not context.shared
        self.min_confidence = min_confidence if can_end else 0.0
        self.drafted = False  # this round

    def offer(self, round_start: RoundStart) -> RoundKind:
        return CHAIN

    def extend(self, tokens: Sequence[Sequence[int]]) -> float | None:
        counts, drafted = [len(new) for new in tokens if new], self.drafted
        self.drafted = False
        return sum(counts) / len(counts) if counts and drafted else None

    def propose(self, round_start: RoundStart) -> DraftedTokens:
        context, num_to_draft = self.context, round_start.num_to_draft(self.context, self.num_speculations)
        if num_to_draft == 0:
            return DraftedTokens(CHAIN, round_start.last[:, None])
        self.drafted = True
        self.verifier.catch_up(round_start)
        slots = round_start.slots(context, num_to_draft)
        running = torch.tensor([float(not done) for done in round_start.finished])  # the confidence of empty drafts
        if self.verifier.last_state is None and context.sampler.only_temperature:
            in_one_call = context.backend.draft_chain(
                round_start.last,
                round_start.start,
                num_to_draft,
                len(slots),
                self.exit_layer,
                round_start.keys,
                context.sampler.temperature,
                running,
                self.min_confidence,
            )
            if in_one_call is not None:
                return _drafted(*in_one_call)
        inputs = (round_start.last, round_start.start, round_start.keys, round_start.seen, self.verifier.last_state)
        step = Step(context, draft_and_verify, self.exit_layer, num_to_draft)
        whole_round = context.backend.call_round(step, slots, *inputs)
        if whole_round is not None:
            tokens, hidden, outcome, state = whole_round
            self.verifier.keep_state(state)
            return _drafted(tokens, hidden, outcome)
        ends = (running, self.min_confidence)
        return _drafted(*draft_tokens(context, self.exit_layer, num_to_draft, slots, *inputs, *ends))


def _drafted(tokens: torch.Tensor, hidden: torch.Tensor, outcome: torch.Tensor | None = None) -> DraftedTokens:
    return DraftedTokens(CHAIN, tokens, hidden, outcome, draft_steps=hidden.shape[1])


def draft_tokens(
    context: StepContext,
    exit_layer: int,
    num_to_draft: int,
    slots,
    last,
    start,
    keys,
    seen,
    state,
    confident=None,
    min_confidence: float = 0.0,
):
    """Draft token by token; for the shapes see `draft_token`. Returns tokens [b, 1 + n] and x_E [b, n, d].

    With `min_confidence` the host reads the confidence [b] of the draft, at first `confident`, after each token.
    """
    tokens, hidden = [last], []
    step = Step(context, draft_token, exit_layer, min_confidence > 0)
    for i in range(num_to_draft):
        results = step(slots, tokens[-1], start + i, keys, seen, state)
        token, x, sure, seen, state = context.backend.keep(results)
        tokens.append(token)
        hidden.append(x)
        if min_confidence:
            confident = confident * sure
            if confident.max() < min_confidence:
                break
    return torch.stack(tokens, 1), torch.cat(hidden, 1)


# ---- the steps ----


def draft_and_verify(context: StepContext, exit_layer: int, num_to_draft: int, slots, last, start, keys, seen, state):
    """A whole round: a draft of `num_to_draft` tokens and its verification.

    Returns tokens [b, 1 + n], x_E [b, n, d], the result of `Verifier.verify`, and the last accepted token's state.
    """
    tokens, hidden = draft_tokens(context, exit_layer, num_to_draft, slots, last, start, keys, seen, state)
    return tokens, hidden, *verify_tokens(context, exit_layer, slots, tokens, hidden, start, keys, seen, state)


def draft_token(context: StepContext, exit_layer: int, confident: bool, slots, last, start, keys, seen, state):
    """Draft one token per row: last, start [b]; keys [b, 2], seen [b, v], state [b, 1, d], each or None.

    Returns the token [b], x_E of `last` [b, 1, d], with `confident` the `confidence` [b], `seen` with the token, and an
    adapter's state.
    """
    model, at = context.draft_decoder, start[:, None]
    x = context.backend.run(model, last[:, None], at, slots, range(exit_layer))
    h = context.read_by_draft(x, state, at, slots)
    scores = context.draft_scores(h, None if seen is None else seen[:, None])
    ids = None if context.draft_head is None else context.draft_head.vocabulary
    token = context.backend.choose_tokens(scores, keys, at + 1, ids)[:, 0]
    token = token if ids is None else ids[token]
    seen = None if seen is None else seen.scatter(1, token[:, None], True)
    sure = confidence(scores[:, 0]) if confident else None
    return token, x, sure, seen, None if state is None else model.norm(h)
