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


@dataclass(frozen=True)
class ExitQuality:
    """Quality of an exit over the counted labels; p is the last layer's distribution, q the exit's."""

    labels: int
    loss: float  # nats per token
    accuracy: float  # fraction of labels that are the exit's most likely token
    exact_match: float  # fraction of samples (or packs) in which all labels are the exit's most likely tokens
    accepted_length: float | None  # mean leading matches among d drafted tokens; None without d labels in a row
    acceptance: dict[str, dict[str, Any]] = field(repr=False)
    """By draft vocabulary: "matches" [d], the fraction of positions whose first k drafted tokens equal the last
    layer's, and "overlap", the mean of sum_v min(p_v, q_v)."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def agreement(self) -> float:
        """The fraction of labels at which the exit and the last layer choose the same token."""
        return self.acceptance[ALL]["matches"][0]

    @property
    def overlap(self) -> float:
        """The accept rate of a sampled token at temperature 1."""
        return self.acceptance[ALL]["overlap"]

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
) -> dict[int, ExitQuality]:
    """Quality of each exit over the counted labels, summed over processes by `add_up`.

    A batch is a dict with tokens [b, s], unshifted labels [b, s] and other inputs of the decoder. `exits` includes the
    last layer. Each exit is measured as a draft model of d = `num_speculations` tokens, over all tokens and, for each n
    in `sizes`, over the first n tokens of `vocabulary`. A trained `draft` is exit 0, with its own vocabulary; then the
    only other exit is the last one. `key` is the data's config key in messages.
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
        utils.batch_to_device(batch, device)
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
        one = _Batch(sums, labels)
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
    """Sums over all batches.

    `exits` [E, 4]: loss, correct tokens, samples with all tokens correct, samples. `drafts` [D, 1 + 2 d]: overlap, and
    the counts of `_Batch._positions`.
    """

    def __init__(
        self, exits: Sequence[int], drafts: Sequence[_Draft], num_speculations: int, device: torch.device
    ) -> None:
        self.of_exits, self.of_drafts, self.num_speculations = exits, drafts, num_speculations
        widest = torch.float32 if device.type == "mps" else torch.float64
        self.exits = torch.zeros(len(exits), 4, dtype=widest, device=device)
        self.drafts = torch.zeros(len(drafts), 1 + 2 * num_speculations, dtype=widest, device=device)

    def quality(self, add_up: Callable[[torch.Tensor], torch.Tensor], last: int, key: str) -> dict[int, ExitQuality]:
        """The quality of each exit, over all processes."""
        # Sum over processes.
        d, width = self.num_speculations, self.drafts.shape[1]
        all_sums = add_up(torch.cat([self.exits.flatten(), self.drafts.flatten()])).cpu()
        exits, drafts = all_sums[: self.exits.numel()].view(-1, 4), all_sums[self.exits.numel() :].view(-1, width)
        # The last layer always agrees with itself, so its sums count the labels and the windows of d labels in a row.
        itself = [draft.exit_layer for draft in self.of_drafts].index(last)
        count, windows = drafts[itself, 1].item(), drafts[itself, d].item()
        if not count > 0:
            raise ConfigError(f"{key}: no label counts, so there is nothing to measure")
        acceptance: dict[int, dict[str, dict[str, Any]]] = {e: {} for e in self.of_exits}
        for draft, (overlap, *positions) in zip(self.of_drafts, drafts.tolist(), strict=True):
            # A product of conditional fractions, because positions near a text's end have fewer than d labels.
            matches, fraction = [], 1.0
            for agreed, possible in zip(positions[:d], positions[d:], strict=True):
                fraction *= agreed / possible if possible else 0.0
                matches.append(fraction)
            acceptance[draft.exit_layer][draft.name] = {"matches": matches, "overlap": min(overlap / count, 1.0)}
        return {
            e: ExitQuality(
                labels=round(count),
                loss=loss / count,
                accuracy=right / count,
                exact_match=exact / samples,
                accepted_length=sum(acceptance[e][ALL]["matches"]) if windows else None,
                acceptance=acceptance[e],
            )
            for e, (loss, right, exact, samples) in zip(self.of_exits, exits.tolist(), strict=True)
        }


class _Batch:
    """The hidden states of one batch at its labels, and their comparison."""

    def __init__(self, sums: _Sums, labels: torch.Tensor) -> None:
        self.sums = sums
        self.counts = labels != CROSS_ENTROPY_IGNORE_IDX
        self.rows = self.counts.flatten().nonzero()[:, 0]  # computed once, because it synchronises a GPU
        self.labels = labels.flatten()[self.rows]
        self.states: dict[int, list[torch.Tensor]] = {}

    def keep(self, exit_layer: int, states: list[torch.Tensor]) -> None:
        """Keep an exit's states [b, s, d] for the first drafted token and, if they differ, for later drafted tokens."""
        self.states[exit_layer] = [x.flatten(0, 1)[self.rows] for x in states]

    def compare(self, head: Head, last: int) -> None:
        """Compare the kept exits with the last layer, and add to the sums."""
        # Per exit and label: is it right? Per draft, step and label: does it agree with the last layer?
        final_states = self.states[last][0]
        right = torch.empty(len(self.sums.of_exits), len(self.labels), dtype=torch.bool, device=final_states.device)
        size, computing = chunk_tokens(final_states.device.type), compute_dtype(final_states)
        agrees = [
            [torch.empty_like(self.labels, dtype=torch.bool) for _ in self.states[draft.exit_layer]]
            for draft in self.sums.of_drafts
        ]
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
                            self.sums.exits[index, 0] += F.cross_entropy(logits, labels, reduction="sum")
                            right[index, part] = logits.argmax(-1) == labels
                        for number, draft in by_exit[e]:
                            z = logits[:, draft.ids]
                            agrees[number][later][part] = draft.best(z) == top
                            if not later:
                                self.sums.drafts[number, 0] += torch.minimum(p[:, draft.ids], z.softmax(-1)).sum()
        # Counts over samples and positions.
        self.sums.exits[:, 1] += right.sum(-1)
        has_labels = self.counts.any(-1)
        for index, flags in enumerate(right):
            wrong = self._by_position(~flags).any(-1)
            self.sums.exits[index, 2] += (has_labels & ~wrong).sum()
            self.sums.exits[index, 3] += has_labels.sum()
        for number, flags in enumerate(agrees):
            self.sums.drafts[number, 1:] += self._positions(flags)

    def _positions(self, agrees: list[torch.Tensor]) -> torch.Tensor:
        """[2 d]: for each k, the number of positions where the first k tokens agree; then for each k, the number where
        the k-th token could agree: the first k - 1 agree, and there are k labels in a row."""
        first, later = (self._by_position(flags) for flags in (agrees[0], agrees[-1]))
        agreed, possible, run = [], [], self.counts
        for k in range(self.sums.num_speculations):
            run = run & _ahead(self.counts, k)
            possible.append(run.sum())
            run = run & _ahead(later if k else first, k)
            agreed.append(run.sum())
        return torch.stack(agreed + possible)

    def _by_position(self, flags: torch.Tensor) -> torch.Tensor:
        """[labels] -> [b, s], False where no label counts."""
        by_position = torch.zeros_like(self.counts)
        by_position.view(-1)[self.rows] = flags
        return by_position


def _ahead(flags: torch.Tensor, k: int) -> torch.Tensor:
    """Flags [b, s] shifted left by k positions, False past the end."""
    return F.pad(flags[:, k:], (0, min(k, flags.shape[1])))
