"""The draft head: the model's head restricted to a draft vocabulary."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.head import capped, head_of, linear_of_rows


class DraftHead(nn.Module):
    """A copy of the head matrix's rows for the token ids `vocabulary` [v'], behind the model's own norm."""

    def __init__(self, model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> None:
        super().__init__()
        # A tied head has the embedding's rows, even if a quantised copy has replaced the head.
        output = model.tok_embeddings if model.tied and isinstance(model.output, nn.Linear) else head_of(model)
        # Quantised and split weights are tensor subclasses, which do not support taking rows.
        if not isinstance(output, nn.Linear | nn.Embedding) or type(output.weight) is not nn.Parameter:
            raise ConfigError(
                f"draft_vocabulary: the head {type(output).__name__} cannot be cut. Allowed: a linear or tied head, "
                "neither quantised nor split over processes; leave draft_vocabulary out"
            )
        self.norm, self.cap = model.norm, model.logit_cap
        self.vocabulary = vocabulary = torch.as_tensor(vocabulary, device=output.weight.device).long().unique()
        self.output = linear_of_rows(dict(output.named_parameters(recurse=False)), self.vocabulary)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, d] -> [b, s, v'] logits in fp32."""
        return capped(self.output(self.norm(hidden)).float(), self.cap)


_DRAFT_HEADS: WeakKeyDictionary[LayerSkipDecoder, DraftHead] = WeakKeyDictionary()


@torch.inference_mode(False)  # a tensor made in inference mode cannot be written outside of it
@torch.no_grad()
def draft_head_of(model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> DraftHead:
    """The draft head with the model's current weights, updated in place if possible: CUDA graphs hold its address."""
    new, kept = DraftHead(model, vocabulary), _DRAFT_HEADS.get(model)
    weight = new.output.weight
    if kept is None or not (
        (kept.output.weight.device, kept.output.weight.dtype) == (weight.device, weight.dtype)
        and torch.equal(kept.vocabulary, new.vocabulary)
    ):
        _DRAFT_HEADS[model] = new
        return new
    for ours, rows in zip(kept.output.parameters(), new.output.parameters(), strict=True):
        ours.copy_(rows)
    return kept
