"""The weights that draft, built from a `Speculation` and a loaded model."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torchao.utils import TorchAOBaseTensor

from layerskip_recipes.checkpoint.weights import linear_head, quantise
from layerskip_recipes.config.components import Component
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import SECTION_KEY, Speculation
from layerskip_recipes.model.changes import plain_tensors
from layerskip_recipes.model.decoder import LayerSkipDecoder
from layerskip_recipes.model.draft import Draft
from layerskip_recipes.model.head import capped, head_of, linear_of_rows


class DraftHead(nn.Module):
    """A copy of the head matrix's rows for the token ids `vocabulary` [v'], behind the model's own norm."""

    def __init__(self, model: LayerSkipDecoder, vocabulary: torch.Tensor | Sequence[int]) -> None:
        super().__init__()
        output = head_of(model)
        if not isinstance(output, nn.Linear | nn.Embedding) or isinstance(output.weight, DTensor):
            raise ConfigError(
                f"draft_vocabulary: the head {type(model.output).__name__} cannot be cut. Allowed: a linear or tied "
                "head, not split over processes; leave draft_vocabulary out"
            )
        self.norm, self.cap = model.norm, model.logit_cap
        self.vocabulary = torch.as_tensor(vocabulary, device=output.weight.device).long().unique()
        parameters = dict(output.named_parameters(recurse=False))
        try:
            self.output = linear_of_rows(parameters, self.vocabulary)
        except (NotImplementedError, RuntimeError):  # some of torchao's matrices give no single rows
            weight = output.weight
            unit_vectors = torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)
            unpacked = F.linear(unit_vectors, weight).T
            self.output = linear_of_rows({**parameters, "weight": unpacked}, self.vocabulary)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[b, s, d] -> [b, s, v'] logits in fp32."""
        return capped(self.output(self.norm(hidden)).float(), self.cap)

    @torch.no_grad()
    def refresh(self, model: LayerSkipDecoder) -> None:
        """Take the rows of an unquantised head anew, in place, as CUDA graphs hold their address."""
        if not (_is_quantised(self.output) or _is_quantised(head_of(model))):
            for name, parameter in self.output.named_parameters():
                parameter.copy_(getattr(head_of(model), name)[self.vocabulary])


def _is_quantised(output: Any) -> bool:
    return isinstance(output.weight, TorchAOBaseTensor)


DraftWeights = tuple[LayerSkipDecoder, DraftHead | None]  # the decoder that drafts, and the head of a draft vocabulary


@torch.inference_mode(False)  # a tensor made in inference mode cannot be written outside of it
@torch.no_grad()
def draft_weights(
    plan: Speculation, model: LayerSkipDecoder, trained_draft: Draft | None = None, key: str = SECTION_KEY
) -> DraftWeights:
    """The weights that draft for a loaded model: its early layers, the plan's trained draft, or int8 copies of them.

    `key` names the plan's section in messages.
    """
    decoder, head, layers = model, None, range(plan.model_layers)
    if trained_draft is not None:
        decoder = trained_draft.decoder(model)
        layers = decoder.trained_layers
    if plan.draft_vocabulary is not None:
        head = DraftHead(decoder, plan.draft_vocabulary)
    if plan.draft_int8 and layers:
        # VNNI instructions multiply int8 numbers fastest. That helps most where a copy reads the prompt.
        on_vnni = model.tok_embeddings.weight.device.type == "cpu" and torch.cpu._is_vnni_supported()
        config = "Int8DynamicActivationInt8WeightConfig" if on_vnni else "Int8WeightOnlyConfig"
        int8 = Component({"_component_": f"torchao.quantization.{config}"}, f"{key}.draft_int8")
        packed = _is_quantised(head_of(model))  # by the model's quantizer
        if head is not None and not packed:
            head = quantise(head, int8)
        decoder = quantised_layers(decoder, layers, int8, with_head=head is None and not packed)
    return decoder, head


@torch.no_grad()
def renewed(old: DraftWeights, new: DraftWeights) -> DraftWeights:
    """The old weights with the numbers of the new ones, since graphs are kept by decoder and hold addresses; or the new
    ones, if they are of another kind."""
    before, after = (
        [
            part
            for module in weights
            if module is not None
            for parameter in module.parameters()
            for part in plain_tensors(parameter)
        ]
        for weights in (old, new)
    )
    kinds = [[(part.shape, part.dtype, part.device) for part in parts] for parts in (before, after)]
    if kinds[0] != kinds[1]:
        return new
    for part, other in zip(before, after, strict=True):
        if part.data_ptr() != other.data_ptr():  # not the model's own
            part.copy_(other)
    return old


def quantised_layers(
    model: LayerSkipDecoder, layers: range, quantizer: Component, with_head: bool = True
) -> LayerSkipDecoder:
    """The model's first layers and its head, with quantised copies of `layers` and, `with_head`, of the head."""
    parts = model.copied_layers(layers)
    if with_head:
        parts.append(linear_head(model))
    packed = quantise(nn.ModuleList(parts), quantizer)
    decoder = model.with_modules(layers=nn.ModuleList([*model.layers[: layers.start], *packed[: len(layers)]]))
    return decoder.with_modules(output=packed[len(layers)]) if with_head else decoder
