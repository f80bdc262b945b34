"""Measures each exit as a predictor of the labels, and as a draft model for the last layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder, on_device
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.head import Head, chunk_tokens, compute_dtype
from layerskip_recipes.model.limits import check_batch

ALL = "all"  # name of the draft vocabulary with all tokens
MIN_CONFIDENCE = 0.4  # the `self_speculation.min_confidence` that is measured and chosen


@dataclass(frozen=True)
class ExitQuality:
    """Quality of an exit; p is the last layer's distribution, q the exit's. Loss, accuracy and exact match are over the
    counted labels; the rest is over the labels that decoding generates."""

    labels: int
    generated: int
    loss: float  # nats per token
    accuracy: float  # fraction of labels that are the exit's most likely token
    exact_match: float  # fraction of samples (or packs) in which all labels are the exit's most likely tokens
    agreement: float  # fraction of generated labels at which the exit and the last layer choose the same token
    overlap: float  # mean of sum_v min(p_v, q_v): the accept rate of a sampled token at temperature 1
    accepted_length: float | None  # greedily accepted tokens per round of d drafted ones; None without any text
    tokens_per_round: dict[str, dict[str, Any]] = field(repr=False)
    """By draft vocabulary, a `TokensPerRound` of checkpoint/trained_exits.py for drafts of 1 to d tokens. {} without a
    text: at least two labels in a row."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def report(self) -> dict[str, float | None]:
        names = ("loss", "perplexity", "accuracy", "exact_match", "agreement", "overlap", "accepted_length")
        return {name: getattr(self, name) for name in names}


def expected_rounds(
    first: torch.Tensor,
    later: torch.Tensor,
    text: torch.Tensor,
    longest: int,
    sure: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The expected numbers of rounds and of drafted tokens that write the texts [..], for drafts of at most 1 to d =
    `longest` tokens: [.., d] each.

    first, later [.., s]: the probability that a token is accepted as the first of a draft, or as a later one. text
    [.., s]: True for tokens of a text; other tokens separate texts. `sure`: the same two of `sampling.confidence`; a
    draft ends where their product is below MIN_CONFIDENCE, and never with ones.

    A round at token i drafts l(i) tokens, and accepts at least k <= l(i) of them with probability S_k(i) = first_i
    later_(i+1) .. later_(i+k-1). So the rounds R(i) that write the text from token i on are R(i) = 1 + R(i+1) +
    sum_k S_k(i) (R(i+k+1) - R(i+k)), or with G(i) = R(i) - R(i+1): G(i) = 1 - sum_k S_k(i) G(i+k). The sum of G is R at
    the first token. With l(i) instead of 1 it is the number of drafted tokens.
    """

    def products(first: torch.Tensor, later: torch.Tensor) -> torch.Tensor:
        """[.., s, k]: of the values of the first k tokens of a draft at token i."""
        first, later = (torch.where(text, x, 0.0).double() for x in (first, later))
        values = F.pad(later, (0, longest)).unfold(-1, longest, 1)[..., :-1, :].clone()
        values[..., 0] = first
        return values.cumprod(-1)

    # Whether a draft at token i has a k-th token, and S_k(i).
    drafts = (F.pad(products(*sure)[..., :-1], (1, 0), value=1.0) >= MIN_CONFIDENCE).double()
    drafts, reach = torch.broadcast_tensors(drafts, products(first, later))
    within = torch.ones(longest, longest, dtype=torch.float64).triu()  # [k, d]: k <= d
    reach = (reach * drafts)[..., None, None]
    counts = torch.stack([torch.ones_like(drafts), drafts @ within], -2)  # [.., s, 2, d]: 1 and l(i)
    *batch, length, _, _ = counts.shape
    more = counts.new_zeros(*batch, length + longest, 2, longest)  # G(i) of both, for each d
    for i in reversed(range(length)):
        fewer = (reach[..., i, :, :, :] * within[:, None] * more[..., i + 1 : i + 1 + longest, :, :]).sum(-3)
        more[..., i, :, :] = torch.where(text[..., i, None, None], counts[..., i, :, :] - fewer, 0.0)
    rounds, drafted = more.sum(-3).unbind(-2)
    return rounds, drafted


@torch.no_grad()  # not inference mode: FSDP could not reuse its tensors in training
def exit_quality(
    model: LayerSkipDecoder,
    batches: Iterable[dict[str, Any]],
    exits: Sequence[int],
    device: torch.device,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    num_speculations: int = 6,
    key: str = "dataset",
    draft: Draft | None = None,
    vocabulary: Sequence[int] = (),
    sizes: Sequence[int] = (),
    generated: Callable[[torch.Tensor], torch.Tensor] = lambda labels: torch.ones_like(labels, dtype=torch.bool),
) -> dict[int, ExitQuality]:
    """Quality of each exit over the counted labels, summed over processes by `add_up`.

    A batch is a dict with tokens [b, s], unshifted labels [b, s] and other inputs of the decoder. `exits` includes the
    last layer. Each exit is measured as a draft model of d = `num_speculations` tokens, over all tokens and, for each n
    in `sizes`, over the first n tokens of `vocabulary`. A trained `draft` is exit 0, with its own vocabulary; then the
    only other exit is the last one. `key` is the data's config key in messages. `generated` tells which labels [b, s]
    decoding generates, as `ReplyFormat.generated`.
    """
    exits, last = sorted(exits), model.num_layers
    if draft is not None:
        vocabulary = draft.vocabulary or ()
    ids = on_device(vocabulary, device)
    drafts = [_Draft(e, ALL, slice(None)) for e in exits]
    drafts += [_Draft(e, str(n), ids[:n]) for e in exits if e != last for n in sizes]
    if draft is not None and len(ids):
        drafts[0] = _Draft(0, ALL, ids)
    sums = _Sums(exits, drafts, num_speculations, device)
    for batch in batches:
        # Labels that count, each at the position that predicts it.
        check_batch(batch["tokens"], model, key)
        written = generated(batch["labels"])
        utils.batch_to_device(batch, device)
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
        one = _Batch(sums, labels, F.pad(written[:, 1:], (0, 1)).to(device))
        # Hidden states of all exits stay until the last layer; compare() then computes logits chunk by chunk.
        if draft is None:

            def on_exit(exit_layer: int, x: torch.Tensor, one: _Batch = one) -> None:
                if exit_layer in exits:
                    one.keep(exit_layer, [x])
                if exit_layer == last:  # within the model's forward, where a sharded head is gathered
                    one.compare(Head(model), last)

            model(batch.pop("tokens"), on_exit=on_exit, unembed=False, **batch)
        else:
            x, final = draft.teacher_states(model, batch.pop("tokens"), **batch)
            one.keep(0, draft.states(x, final, **batch))
            one.keep(last, [final])
            one.compare(Head(model, norm=nn.Identity()), last)  # these states have passed the norm
    return sums.quality(add_up, last, key)


@dataclass(frozen=True)
class _Draft:
    """An exit as a draft model over a vocabulary: token ids, or a slice for all tokens."""

    exit_layer: int
    name: str
    ids: torch.Tensor | slice

    def best(self, logits: torch.Tensor) -> torch.Tensor:
        """The most likely tokens [n], given logits [n, v'] over the vocabulary."""
        column = logits.argmax(-1)
        return column if isinstance(self.ids, slice) else self.ids[column]


class _Sums:
    """Sums over all batches, by name; for each exit, or each draft of 1 to d tokens, greedy and sampled."""

    def __init__(
        self, exits: Sequence[int], drafts: Sequence[_Draft], num_speculations: int, device: torch.device
    ) -> None:
        self.of_exits, self.of_drafts, self.num_speculations = exits, drafts, num_speculations
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("loss", "labels", "right"), (len(exits),)),
            **dict.fromkeys(("samples", "exact"), (len(exits),)),  # exact: all labels of a sample are right
            "accepted": (len(drafts), 2),  # first drafted tokens, over the generated labels
            "rounds": (len(drafts), 2, num_speculations),
            # Of drafts that end at low confidence: rounds, and drafted tokens.
            **dict.fromkeys(("ended_rounds", "ended_drafted"), (len(drafts), 2, num_speculations)),
            "tokens": (1,),  # written in rounds
        }
        widest = torch.float32 if device.type == "mps" else torch.float64
        self.by_name = {name: torch.zeros(shape, dtype=widest, device=device) for name, shape in shapes.items()}

    def add(self, name: str, values: torch.Tensor) -> None:
        self.by_name[name] += values.to(self.by_name[name])

    def quality(self, add_up: Callable[[torch.Tensor], torch.Tensor], last: int, key: str) -> dict[int, ExitQuality]:
        """The quality of each exit, over all processes."""
        # Sum over processes.
        parts = self.by_name.values()
        all_sums = add_up(torch.cat([part.flatten() for part in parts])).cpu().split([part.numel() for part in parts])
        sums = {name: total.view_as(self.by_name[name]) for name, total in zip(self.by_name, all_sums, strict=True)}
        # The last layer always agrees with itself, so its sum counts the generated labels.
        generated = sums["accepted"][[draft.exit_layer for draft in self.of_drafts].index(last), 0].item()
        if not sums["labels"][0] > 0:
            raise ConfigError(f"{key}: no label counts, so there is nothing to measure")
        loss, accuracy = ((sums[name] / sums["labels"]).tolist() for name in ("loss", "right"))
        exact, shares = sums["exact"] / sums["samples"], sums["accepted"] / max(generated, 1)
        rates, ended_rates = (sums["tokens"] / sums[name] for name in ("rounds", "ended_rounds"))
        ended = torch.stack([ended_rates, sums["ended_drafted"] / sums["ended_rounds"]], -1).tolist()
        kinds = ("greedy", "sampled")
        quality = {}
        for index, e in enumerate(self.of_exits):
            own = {draft.name: i for i, draft in enumerate(self.of_drafts) if draft.exit_layer == e}
            agreement, overlap = shares[own[ALL]].tolist()
            quality[e] = ExitQuality(
                labels=round(sums["labels"][index].item()),
                generated=round(generated),
                loss=loss[index],
                accuracy=accuracy[index],
                exact_match=exact[index].item(),
                agreement=agreement,
                overlap=min(overlap, 1.0),
                accepted_length=rates[own[ALL], 0, -1].item() - 1 if sums["tokens"] else None,
                tokens_per_round={
                    name: dict(zip(kinds, rates[i].tolist(), strict=True))
                    | {"ended": dict(zip(kinds, ended[i], strict=True))}
                    for name, i in own.items()
                    if sums["tokens"]
                },
            )
        return quality


class _Batch:
    """The hidden states of one batch at its labels, and their comparison."""

    def __init__(self, sums: _Sums, labels: torch.Tensor, generated: torch.Tensor) -> None:
        self.sums, self.generated = sums, generated & (labels != CROSS_ENTROPY_IGNORE_IDX)
        self.counts = labels != CROSS_ENTROPY_IGNORE_IDX
        self.rows = self.counts.flatten().nonzero()[:, 0]  # computed once, because it synchronises a GPU
        self.labels = labels.flatten()[self.rows]
        self.states: dict[int, list[torch.Tensor]] = {}

    def keep(self, exit_layer: int, states: list[torch.Tensor]) -> None:
        """Keep an exit's states [b, s, d] for the first drafted token and, if they differ, for later drafted tokens."""
        self.states[exit_layer] = [x.flatten(0, 1)[self.rows] for x in states]

    def compare(self, head: Head, last: int) -> None:
        """Compare the kept exits with the last layer, and add to the sums."""
        # Per exit and label: is it right? Per draft and label: is it accepted, greedily and when sampled, as the first
        # drafted token and as a later one? And how sure is the draft?
        final_states = self.states[last][0]
        right = torch.empty(len(self.sums.of_exits), len(self.labels), dtype=torch.bool, device=final_states.device)
        drafted = final_states.new_empty(2, len(self.sums.of_drafts), 3, len(self.labels), dtype=torch.float32)
        size, computing = chunk_tokens(final_states.device.type), compute_dtype(final_states)
        by_exit = {e: [(i, d) for i, d in enumerate(self.sums.of_drafts) if d.exit_layer == e] for e in self.states}
        # Cast the head once; autocast would cast it for each chunk and exit.
        with head.using([parameter.to(computing) for parameter in head.parameters]):
            for start in range(0, len(self.labels), size):
                part = slice(start, start + size)
                final, labels = head(final_states[part].to(computing)), self.labels[part]
                p, top = final.softmax(-1), final.argmax(-1)
                for index, e in enumerate(self.sums.of_exits):
                    for later, x in enumerate(self.states[e]):
                        logits = final if e == last else head(x[part].to(computing))
                        if not later:
                            self.sums.by_name["loss"][index] += F.cross_entropy(logits, labels, reduction="sum")
                            right[index, part] = logits.argmax(-1) == labels
                        for number, draft in by_exit[e]:
                            z = logits[:, draft.ids]
                            q = z.softmax(-1)
                            # An exit with one state uses it for the first and for later drafted tokens.
                            drafted[later:, number, 0, part] = (draft.best(z) == top).float()
                            drafted[later:, number, 1, part] = torch.minimum(p[:, draft.ids], q).sum(-1)
                            drafted[later:, number, 2, part] = q.amax(-1)
        # Counts of labels, and of samples with labels.
        sums, has_labels = self.sums, self.counts.any(-1)
        wrong = self._by_position(~right).any(-1)
        sums.add("labels", torch.full((len(right),), len(self.labels)))
        sums.add("right", right.sum(-1))
        sums.add("samples", has_labels.sum().expand(len(right)))
        sums.add("exact", (has_labels & ~wrong).sum(-1))
        # Rounds: many small operations, so on the CPU. The first token of a text comes from its prefill.
        text = (self.generated & F.pad(self.generated[:, :-1], (1, 0))).cpu()
        both = self._by_position(drafted).cpu()
        first, later = both[:, :, :2]
        # Drafts of a fixed length, as if the draft were always sure, and drafts that end.
        sure, sure_later = (torch.stack([torch.ones_like(x), x]) for x in both[:, :, 2:])
        rounds, counts = expected_rounds(first, later, text, sums.num_speculations, (sure, sure_later))
        sums.add("accepted", (drafted[0, :, :2] * self.generated.flatten()[self.rows]).sum(-1))
        sums.add("rounds", rounds[0].sum(-2))
        sums.add("ended_rounds", rounds[1].sum(-2))
        sums.add("ended_drafted", counts[1].sum(-2))
        sums.add("tokens", text.sum())

    def _by_position(self, values: torch.Tensor) -> torch.Tensor:
        """[.., labels] -> [.., b, s], zero where no label counts."""
        by_position = values.new_zeros(*values.shape[:-1], self.counts.numel())
        by_position[..., self.rows] = values
        return by_position.unflatten(-1, self.counts.shape)
