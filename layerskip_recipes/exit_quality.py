"""How good is each exit? Loss, perplexity, accuracy and agreement with the last layer, in one pass over the data."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torchtune import utils

from layerskip_recipes.decoder import LayerSkipDecoder
from layerskip_recipes.head import Head
from layerskip_recipes.settings import check_batch


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
) -> dict[int, dict[str, float]]:
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
        d tokens after each other they agree on before they first differ, on the mean over the data's positions}}.

    Raises:
        ValueError: if no label counts, or a sample is longer than the model takes.
    """
    exits = sorted(exits)
    sums = torch.zeros(len(exits), 6, dtype=_exact(device), device=device)
    for batch in batches:
        check_batch(batch["tokens"], model, key)
        utils.batch_to_device(batch, device)
        labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=ignore_index)
        measure = partial(_sums, model, labels, ignore_index, chunk_tokens, num_speculations)
        sums += model(batch.pop("tokens"), exits=exits, then=measure, **batch)
    sums = add_up(sums)
    if not sums[0, 3] > 0:
        raise ValueError(f"{key}: no label counts, so there is nothing to measure")
    quality = {}
    for e, (loss, right, agreed, count, accepted, windows) in zip(exits, sums.tolist(), strict=True):
        quality[e] = {
            "loss": loss / count,
            "perplexity": math.exp(min(loss / count, 700)),
            "accuracy": right / count,
            "agreement": agreed / count,
            "accepted_length": accepted / max(windows, 1),
        }
    return quality


def _exact(device: torch.device) -> torch.dtype:
    """The longest floating-point numbers of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _sums(
    model: LayerSkipDecoder,
    labels: torch.Tensor,
    ignore_index: int,
    chunk_tokens: int,
    num_speculations: int,
    final: torch.Tensor,
    hidden: dict[int, torch.Tensor],
) -> torch.Tensor:
    """[exits, 6]: of each exit its loss, right choices, choices of the last layer, how many labels count, drafts'
    accepted tokens, and how many drafts."""
    counts = labels != ignore_index
    at = counts.flatten().nonzero()[:, 0]  # once: on a GPU the host waits for it
    labels, final = labels.flatten()[at], final.flatten(0, 1)
    states = [x.flatten(0, 1) for x in hidden.values()]
    sums = torch.zeros(len(states), 6, dtype=_exact(labels.device), device=labels.device)
    sums[:, 3] = len(labels)
    agrees = torch.zeros(len(states), *counts.shape, dtype=torch.bool, device=labels.device)
    flat = torch.zeros(len(states), len(labels), dtype=torch.bool, device=labels.device)
    head = Head(model)
    with head.using(head.parameters):
        for start in range(0, len(labels), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chosen = head(final[at[rows]]).argmax(-1)
            for exit_sums, agreed, x in zip(sums, flat, states, strict=True):
                logits = head(x[at[rows]])
                top = logits.argmax(-1)
                exit_sums[0] += F.cross_entropy(logits, labels[rows], reduction="sum")
                exit_sums[1] += (top == labels[rows]).sum()
                agreed[rows] = top == chosen
    sums[:, 2] = flat.sum(1)
    # A draft from each position whose next d labels count.
    if counts.shape[1] >= num_speculations:
        agrees.flatten(1)[:, at] = flat
        whole = counts.unfold(1, num_speculations, 1).all(-1)
        sums[:, 4] = (agrees.unfold(2, num_speculations, 1).cumprod(-1).sum(-1) * whole).sum((1, 2))
        sums[:, 5] = whole.sum()
    return sums
