"""How good is each exit? Loss, perplexity, accuracy and agreement with the last layer, in one pass over the data."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.head import Head
from layerskip_recipes.model.limits import check_batch


@torch.no_grad()  # not inference mode, whose tensors FSDP could not use again in training
def exit_quality(
    model: LayerSkipDecoder,
    batches: Iterable[dict[str, Any]],
    exits: list[int],
    device: torch.device,
    ignore_index: int = -100,
    chunk_tokens: int = 512,
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    num_speculations: int = 6,
    key: str = "dataset",
) -> dict[int, dict[str, float | None]]:
    """Quality of each exit over the labels that count.

    Args:
        model: the decoder, in eval mode.
        batches: dicts with tokens [b, s], labels [b, s] (not shifted), and what else the decoder takes.
        exits: the E to measure.
        device: of the model.
        ignore_index: the label that counts nowhere.
        chunk_tokens: the tokens whose logits exist at a time.
        add_up: the sum of a tensor over the processes that have batches of their own.
        num_speculations: d of "accepted_length".
        key: of the data in the config, for messages.

    Returns:
        {E: {"loss": nats per token, "perplexity", "accuracy": top-1 against the labels,
        "agreement": share of tokens on which exit E and the last layer choose the same, "accepted_length": how many of
        d tokens after each other they agree on before they first differ, on the mean over the data's positions, None if
        d labels in a row count nowhere}}.

    Raises:
        ValueError: if no label counts, or a sample is longer than the model takes.
    """
    exits = sorted(exits)
    sums = torch.zeros(len(exits), 6, dtype=_exact(device), device=device)
    for batch in batches:
        check_batch(batch["tokens"], model, key)
        utils.batch_to_device(batch, device)
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=ignore_index)
        of_batch = _Batch(model, labels, exits, ignore_index, chunk_tokens, num_speculations)
        model(batch.pop("tokens"), exits={*exits, model.num_layers}, passing=of_batch.passing, **batch)
        sums += of_batch.compare()
    sums = add_up(sums)
    if not sums[0, 3] > 0:
        raise ConfigError(f"{key}: no label counts, so there is nothing to measure")
    quality = {}
    for e, (loss, right, agreed, count, accepted, windows) in zip(exits, sums.tolist(), strict=True):
        quality[e] = {
            "loss": loss / count,
            "perplexity": math.exp(min(loss / count, 700)),
            "accuracy": right / count,
            "agreement": agreed / count,
            "accepted_length": accepted / windows if windows else None,
        }
    return quality


def _exact(device: torch.device) -> torch.dtype:
    """The longest floating-point numbers of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Batch:
    """What a batch adds to the sums: each exit is measured as the walk passes it, and only what it chose is kept.

    Args:
        model: the decoder, whose walk this is called within.
        labels: [b, s], shifted.
        exits: in order.
        ignore_index, chunk_tokens, num_speculations: as in `exit_quality`.
    """

    def __init__(
        self,
        model: LayerSkipDecoder,
        labels: torch.Tensor,
        exits: list[int],
        ignore_index: int,
        chunk_tokens: int,
        num_speculations: int,
    ) -> None:
        self.model, self.exits, self.chunk_tokens, self.num_speculations = model, exits, chunk_tokens, num_speculations
        self.counts = labels != ignore_index
        self.at = self.counts.flatten().nonzero()[:, 0]  # once: on a GPU the host waits for it
        self.labels = labels.flatten()[self.at]
        self.sums = torch.zeros(len(exits), 6, dtype=_exact(labels.device), device=labels.device)
        self.chosen: dict[int, torch.Tensor] = {}  # [labels that count], the tokens that an exit says

    def passing(self, e: int, x: torch.Tensor) -> None:
        """Loss, right choices and choices of exit e, of x_e [b, s, d]."""
        x, sums = x.flatten(0, 1), self.sums[self.exits.index(e)] if e in self.exits else None
        self.chosen[e] = torch.empty_like(self.labels)
        head = Head(self.model)
        with head.using(head.parameters):
            for start in range(0, len(self.labels), self.chunk_tokens):
                rows = slice(start, start + self.chunk_tokens)
                logits, labels = head(x[self.at[rows]]), self.labels[rows]
                top = self.chosen[e][rows] = logits.argmax(-1)
                if sums is not None:
                    sums[0] += F.cross_entropy(logits, labels, reduction="sum")
                    sums[1] += (top == labels).sum()

    def compare(self) -> torch.Tensor:
        """[exits, 6]: of each exit its loss, right choices, choices of the last layer, how many labels count, drafts'
        accepted tokens, and how many drafts."""
        n, final = self.num_speculations, self.chosen[self.model.num_layers]
        whole = self.counts.unfold(1, n, 1).all(-1) if self.counts.shape[1] >= n else None
        for e, sums in zip(self.exits, self.sums, strict=True):
            agrees = self.chosen[e] == final
            sums[2], sums[3] = agrees.sum(), len(self.labels)
            if whole is not None:  # a draft from each position whose next n labels count
                everywhere = torch.zeros(self.counts.shape, dtype=torch.bool, device=agrees.device)
                everywhere.view(-1)[self.at] = agrees
                sums[4] = (everywhere.unfold(1, n, 1).cumprod(-1).sum(-1) * whole).sum()
                sums[5] = whole.sum()
        return self.sums
