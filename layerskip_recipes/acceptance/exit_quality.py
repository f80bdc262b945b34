"""Measures each exit as a predictor of the labels, and as a draft model for the last layer."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.acceptance.tokens_per_round import ALL_TOKENS, FirstAndLater, expected_rounds
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder, move_batch, on_device
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.head import Head, compute_dtype
from layerskip_recipes.model.limits import check_batch

MOST_CHUNK_TOKENS = 512  # six tensors [tokens, vocabulary] in fp32 are in memory at a time


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
    accepted_length: float | None  # greedily accepted tokens per round of n drafted ones; None without any text
    tokens_per_round: dict[str, dict[str, Any]] = field(repr=False)
    """By draft vocabulary, the fields of a `TokensPerRound` for drafts of 1 to n tokens. {} without a text, which has
    two labels in a row or more."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def report(self) -> dict[str, float | None]:
        names = ("loss", "perplexity", "accuracy", "exact_match", "agreement", "overlap", "accepted_length")
        return {name: getattr(self, name) for name in names}


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
    chunk_tokens: int = MOST_CHUNK_TOKENS,
    generated: Callable[[torch.Tensor], torch.Tensor] = lambda labels: torch.ones_like(labels, dtype=torch.bool),
) -> dict[int, ExitQuality]:
    """Quality of each exit over the counted labels, summed over processes by `add_up`.

    A batch is a dict with tokens [b, s], unshifted labels [b, s] and other inputs of the decoder. `exits` includes the
    last layer. Each exit is measured as a draft model of n = `num_speculations` tokens, over all tokens and, for each
    size in `sizes`, over the first tokens of `vocabulary`. A trained `draft` is exit 0, with its own vocabulary; then
    the only other exit is the last one. `chunk_tokens`, at most 512: how many tokens have logits at a time. `key` is
    the data's config key in messages. `generated` tells which labels [b, s] decoding generates, as
    `ReplyFormat.generated`.
    """
    exits, last = sorted(exits), model.num_layers
    ids = on_device(vocabulary if draft is None else draft.vocabulary or (), device)
    every_token: torch.Tensor | slice = slice(None) if draft is None or draft.vocabulary is None else ids
    vocabularies = {ALL_TOKENS: every_token} | {str(size): ids[:size] for size in sizes}
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        # Labels that count, each at the position that predicts it.
        check_batch(batch["tokens"], model, key)
        written = generated(batch["labels"])
        move_batch(batch, device)
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
        at_labels = _Batch(
            labels, F.pad(written[:, 1:], (0, 1)).to(device), vocabularies, num_speculations, chunk_tokens
        )
        # Hidden states of all exits stay until the last layer; compare() then computes logits chunk by chunk.
        if draft is None:

            def on_exit(exit_layer: int, x: torch.Tensor, at_labels: _Batch = at_labels) -> None:
                if exit_layer in exits:
                    at_labels.keep(exit_layer, [x])
                if exit_layer == last:  # within the model's forward, where a sharded head is gathered
                    at_labels.compare(Head(model))

            model(batch.pop("tokens"), on_exit=on_exit, unembed=False, **batch)
        else:
            x, final = draft.teacher_states(model, batch.pop("tokens"), **batch)
            at_labels.keep(0, draft.states(x, final, **batch))
            at_labels.keep(last, [final])
            at_labels.compare(Head(model, norm=nn.Identity()))  # these states have passed the norm
        sums = {name: value + sums.get(name, 0.0) for name, value in at_labels.sums.items()}
    # Sum over processes.
    if sums:
        totals = add_up(torch.cat([part.flatten() for part in sums.values()])).cpu()
        parts = totals.split([part.numel() for part in sums.values()])
        sums = {name: part.view_as(sums[name]) for name, part in zip(sums, parts, strict=True)}
    if not (sums and sums["labels"] > 0):
        raise ConfigError(f"{key}: no label counts, so there is nothing to measure")
    return {e: _quality(sums, index, [ALL_TOKENS] if e == last else [*vocabularies]) for index, e in enumerate(exits)}


def _quality(sums: Mapping[str, torch.Tensor], index: int, vocabularies: Sequence[str]) -> ExitQuality:
    """The quality of the exit number `index`, given the sums over all batches; see `_Batch.sums`."""
    labels, generated, tokens = (sums[name].item() for name in ("labels", "generated", "tokens"))
    of_exit = {name: values[index] for name, values in sums.items() if values.dim()}
    agreement, overlap = (of_exit["accepted"][0] / max(generated, 1)).tolist()
    # [vocabularies, greedy and sampled, n], and for drafts that end also [.., 2]: tokens and drafted tokens per round.
    rates, ended_rates = tokens / of_exit["rounds"], tokens / of_exit["ended_rounds"]
    ended = torch.stack([ended_rates, of_exit["ended_drafted"] / of_exit["ended_rounds"]], -1)
    decoding = ("greedy", "sampled")
    return ExitQuality(
        labels=round(labels),
        generated=round(generated),
        loss=of_exit["loss"].item() / labels,
        accuracy=of_exit["right"].item() / labels,
        exact_match=(of_exit["exact"] / sums["samples"]).item(),
        agreement=agreement,
        overlap=min(overlap, 1.0),
        accepted_length=rates[0, 0, -1].item() - 1 if tokens else None,
        tokens_per_round={
            name: dict(zip(decoding, rates[i].tolist(), strict=True))
            | {"ended": dict(zip(decoding, ended[i].tolist(), strict=True))}
            for i, name in enumerate(vocabularies if tokens else ())
        },
    )


class _Batch:
    """The hidden states of one batch at its labels, and their comparison."""

    def __init__(
        self,
        labels: torch.Tensor,
        generated: torch.Tensor,
        vocabularies: Mapping[str, torch.Tensor | slice],
        num_speculations: int,
        chunk_tokens: int,
    ) -> None:
        self.vocabularies, self.num_speculations = vocabularies, num_speculations
        self.chunk_tokens = min(chunk_tokens, MOST_CHUNK_TOKENS)
        self.counts = labels != CROSS_ENTROPY_IGNORE_IDX
        self.generated = generated & self.counts
        self.rows = self.counts.flatten().nonzero()[:, 0]  # computed once, because it synchronises a GPU
        self.labels = labels.flatten()[self.rows]
        self.states: dict[int, list[torch.Tensor]] = {}

    def keep(self, exit_layer: int, states: list[torch.Tensor]) -> None:
        """Keep an exit's states [b, s, d] for the first drafted token and, if they differ, for later drafted tokens.

        The last layer comes last.
        """
        self.states[exit_layer] = [x.flatten(0, 1)[self.rows] for x in states]

    def compare(self, head: Head) -> None:
        """Compare the kept exits with the last layer, and compute the sums of this batch."""
        # Per exit and label: is it right? Per exit, vocabulary and label: is it accepted, greedily and when sampled, as
        # the first drafted token and as a later one? And how sure is the draft?
        *_, last = self.states
        final_states = self.states[last][0]
        exits, num_labels, device = len(self.states), len(self.labels), final_states.device
        widest = torch.float32 if device.type == "mps" else torch.float64
        loss = torch.zeros(exits, dtype=widest, device=device)
        right = torch.empty(exits, num_labels, dtype=torch.bool, device=device)
        drafted = torch.zeros(2, exits, len(self.vocabularies), 3, num_labels, device=device)
        size, computing = self.chunk_tokens, compute_dtype(final_states)
        # Cast the head once; autocast would cast it for each chunk and exit.
        with head.using([parameter.to(computing) for parameter in head.parameters]):
            for start in range(0, num_labels, size):
                part = slice(start, start + size)
                final, labels = head(final_states[part].to(computing)), self.labels[part]
                p, top = final.softmax(-1), final.argmax(-1)
                for index, (e, states) in enumerate(self.states.items()):
                    for later, x in enumerate(states):
                        logits = final if e == last else head(x[part].to(computing))
                        if not later:
                            loss[index] += F.cross_entropy(logits, labels, reduction="sum")
                            right[index, part] = logits.argmax(-1) == labels
                        # An exit with one state uses it for the first and for later drafted tokens.
                        of_exit = drafted[later:, index, ..., part]
                        for number, ids in enumerate([slice(None)] if e == last else self.vocabularies.values()):
                            z = logits[:, ids]
                            q, best = z.softmax(-1), z.argmax(-1)
                            of_exit[:, number, 0] = (best if isinstance(ids, slice) else ids[best]) == top
                            of_exit[:, number, 1] = torch.minimum(p[:, ids], q).sum(-1)
                            of_exit[:, number, 2] = q.amax(-1)
        # Rounds: many small operations, so on the CPU. The first token of a text comes from its prefill.
        text = (self.generated & F.pad(self.generated[:, :-1], (1, 0))).cpu()
        by_position = FirstAndLater(*self._by_position(drafted).cpu())
        accept_rate = FirstAndLater(*(values[..., :2, :, :] for values in by_position))
        confidence = FirstAndLater(*(values[..., 2:, :, :] for values in by_position))
        rounds, _ = expected_rounds(accept_rate, text, self.num_speculations)
        ended_rounds, ended_drafted = expected_rounds(accept_rate, text, self.num_speculations, confidence)
        has_labels = self.counts.any(-1)
        sums = {
            "labels": self.counts.sum(),
            "generated": self.generated.sum(),
            "samples": has_labels.sum(),
            "tokens": text.sum(),  # written in rounds
            # [exits]; exact: all labels of a sample are right
            "loss": loss,
            "right": right.sum(-1),
            "exact": (has_labels & ~self._by_position(~right).any(-1)).sum(-1),
            # [exits, vocabularies, greedy and sampled]: first drafted tokens
            "accepted": (drafted[0, ..., :2, :] * self.generated.flatten()[self.rows]).sum(-1),
            # [.., n]: of drafts of a fixed length, and of drafts that end
            "rounds": rounds.sum(-2),
            "ended_rounds": ended_rounds.sum(-2),
            "ended_drafted": ended_drafted.sum(-2),
        }
        self.sums = {name: value.to(device, widest) for name, value in sums.items()}

    def _by_position(self, values: torch.Tensor) -> torch.Tensor:
        """[.., labels] -> [.., b, s], zero where no label counts."""
        by_position = values.new_zeros(*values.shape[:-1], self.counts.numel())
        by_position[..., self.rows] = values
        return by_position.unflatten(-1, self.counts.shape)
