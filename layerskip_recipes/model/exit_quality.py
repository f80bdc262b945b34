"""How good is each exit? Loss, perplexity, accuracy and agreement with the last layer, in one pass over the data."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder, on_device
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.head import Head
from layerskip_recipes.model.limits import check_batch

CHUNK_TOKENS = 512  # the most tokens whose logits exist at a time


@torch.no_grad()  # not inference mode, whose tensors FSDP could not use again in training
def exit_quality(
    model: LayerSkipDecoder,
    batches: Iterable[dict[str, Any]],
    exits: list[int],
    device: torch.device,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    num_speculations: int = 6,
    key: str = "dataset",
    draft: Draft | None = None,
) -> dict[int, dict[str, float | None]]:
    """Quality of each exit over the labels that count.

    Args:
        batches: dicts with tokens [b, s], labels [b, s] (not shifted), and what else the decoder takes.
        exits: the E to measure, the last layer's among them.
        add_up: sums a tensor over the data-parallel processes.
        num_speculations: d of "accepted_length".
        key: of the data in the config, for messages.
        draft: measured as exit 0; of the model's exits only the last can be measured beside it.

    Returns:
        For each E a dict of
        - "loss": nats per token, and "perplexity";
        - "accuracy": the share of labels that the exit's most likely token is;
        - "exact_match": the share of samples (or packs) at whose every label it is: there, greedy decoding from this
          exit writes the whole reference;
        - "agreement": the share of labels at which exit E and the last layer choose the same token;
        - "accepted_length": of d tokens in a row, how many agree with the last layer before the first that does not;
          the mean over all positions with d labels in a row, None if there is no such position.
    """
    exits = sorted(exits)
    sums = torch.zeros(len(exits), 8, dtype=_widest_float(device), device=device)
    for batch in batches:
        check_batch(batch["tokens"], model, key)
        utils.batch_to_device(batch, device)
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=CROSS_ENTROPY_IGNORE_IDX)
        measured = _Batch(model, labels, exits, num_speculations)
        if draft is None:
            model(batch.pop("tokens"), on_exit=measured.measure, unembed=False, **batch)
        else:
            x, last = draft.teacher_states(model, batch.pop("tokens"), **batch)
            measured.measure(model.num_layers, last, normed=True)
            # The draft's second token in a row counts in the accepted length only.
            for state in reversed(draft.states(x, last, **batch)):
                measured.later = measured.chosen.get(0)
                measured.measure(0, state, normed=True, vocabulary=draft.vocabulary)
        sums += measured.compare()
    sums = add_up(sums)
    if not sums[0, 3] > 0:
        raise ConfigError(f"{key}: no label counts, so there is nothing to measure")
    quality = {}
    for e, (loss, right, agreed, count, accepted, windows, exact, samples) in zip(exits, sums.tolist(), strict=True):
        quality[e] = {
            "loss": loss / count,
            "perplexity": math.exp(min(loss / count, 700)),
            "accuracy": right / count,
            "exact_match": exact / samples,
            "agreement": agreed / count,
            "accepted_length": accepted / windows if windows else None,
        }
    return quality


def _widest_float(device: torch.device) -> torch.dtype:
    """The most exact floating-point dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Batch:
    """The sums of one batch. Each exit is measured within the model's forward, and only its chosen tokens are kept."""

    def __init__(self, model: LayerSkipDecoder, labels: torch.Tensor, exits: list[int], num_speculations: int) -> None:
        self.model, self.exits, self.num_speculations = model, exits, num_speculations
        self.counts = labels != CROSS_ENTROPY_IGNORE_IDX
        self.rows = self.counts.flatten().nonzero()[:, 0]  # once: on a GPU this synchronises
        self.labels = labels.flatten()[self.rows]
        self.sums = torch.zeros(len(exits), 8, dtype=_widest_float(labels.device), device=labels.device)
        self.chosen: dict[int, torch.Tensor] = {}  # for each exit its most likely tokens, [labels that count]
        self.later: torch.Tensor | None = None  # those of a draft for the second token in a row

    def measure(
        self, exit_layer: int, x: torch.Tensor, normed: bool = False, vocabulary: list[int] | None = None
    ) -> None:
        """Take the loss and the right choices of x_E [b, s, d], normed or not; the decoder's hook `on_exit`. A draft
        that chooses among a part of the tokens, `vocabulary`, has no loss."""
        if exit_layer not in self.exits:
            return
        x = x.flatten(0, 1)
        sums = self.sums[self.exits.index(exit_layer)]
        sums.zero_()
        self.chosen[exit_layer] = torch.empty_like(self.labels)
        head = Head(self.model, norm=nn.Identity() if normed else None)
        ids = None if vocabulary is None else on_device(vocabulary, x.device)
        head = head if ids is None else head.cut(ids)
        with head.using(head.parameters):
            for start in range(0, len(self.labels), CHUNK_TOKENS):
                part = slice(start, start + CHUNK_TOKENS)
                logits, labels = head(x[self.rows[part]]), self.labels[part]
                top = logits.argmax(-1)
                if ids is None:
                    sums[0] += F.cross_entropy(logits, labels, reduction="sum")
                else:
                    sums[0], top = torch.nan, ids[top]
                self.chosen[exit_layer][part] = top
                sums[1] += (top == labels).sum()

    def compare(self) -> torch.Tensor:
        """[exits, 8]: of each exit its loss, right choices, choices of the last layer, number of labels, accepted
        tokens of drafts, number of drafts, exact samples, and number of samples."""
        n, final = self.num_speculations, self.chosen[self.model.num_layers]
        # A draft starts at each position whose next n labels count.
        starts = self.counts.unfold(1, n, 1).all(-1) if self.counts.shape[1] >= n else None
        for e, sums in zip(self.exits, self.sums, strict=True):
            agrees = self.chosen[e] == final
            sums[2], sums[3] = agrees.sum(), len(self.labels)
            wrong = self._by_position(self.chosen[e] != self.labels).any(-1)
            has_labels = self.counts.any(-1)
            sums[6], sums[7] = (has_labels & ~wrong).sum(), has_labels.sum()
            if starts is not None:
                first = self._windows(agrees)
                later = first if self.later is None or e != 0 else self._windows(self.later == final)
                in_a_row = torch.cat([first[..., :1], later[..., 1:]], -1).cumprod(-1)
                sums[4] = (in_a_row.sum(-1) * starts).sum()
                sums[5] = starts.sum()
        return self.sums

    def _by_position(self, flags: torch.Tensor) -> torch.Tensor:
        """[labels that count] -> [b, s], False where no label counts."""
        positions = torch.zeros_like(self.counts)
        positions.view(-1)[self.rows] = flags
        return positions

    def _windows(self, agrees: torch.Tensor) -> torch.Tensor:
        """[labels that count] -> [b, s - n + 1, n], for each position whether it and the next ones agree."""
        return self._by_position(agrees).unfold(1, self.num_speculations, 1)
