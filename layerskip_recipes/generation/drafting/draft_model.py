"""The draft model, which really drafts. It is built from a `Speculation` and a loaded model."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from layerskip_recipes.checkpoint.drafts import read_draft
from layerskip_recipes.checkpoint.weights import linear_head, quantise
from layerskip_recipes.config.components import Component
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.speculation import KEY, Speculation
from layerskip_recipes.model.decoder import LayerSkipDecoder, as_layerskip_decoder
from layerskip_recipes.model.draft import Draft
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


@dataclass(frozen=True)
class DraftModel:
    """A decoder whose early layers and head draft.

    decoder: such as a quantised copy, or a trained draft's; None: the model itself.
    head: the head of the draft vocabulary; None: rows of the decoder's head.
    """

    decoder: LayerSkipDecoder | None = None
    head: DraftHead | None = None

    def fitted(self, model: LayerSkipDecoder, speculation: Speculation) -> tuple[LayerSkipDecoder, DraftHead | None]:
        """Its decoder, and the head of the draft vocabulary, if any."""
        decoder, head = as_layerskip_decoder(self.decoder or model), self.head
        if head is None and speculation.draft_vocabulary is not None:
            head = draft_head_of(decoder if decoder.own_layers else model, speculation.draft_vocabulary)
        return decoder, head


class DraftModels:
    """Builds the draft models of one loaded model. Speculations that draft with the same weights share one.

    `trained_draft`: that of all speculations, if it has been read.
    """

    def __init__(self, trained_draft: Draft | None = None) -> None:
        self.trained_draft = trained_draft
        self.built: dict[Hashable, DraftModel] = {}

    def of(self, speculation: Speculation | None, model: LayerSkipDecoder, key: str = KEY) -> DraftModel:
        """The draft model of a speculation; `key` names its section in messages."""
        if speculation is None:
            return DraftModel()
        draft, ids = speculation.draft, speculation.draft_vocabulary
        vocabulary = None if ids is None else tuple(ids)
        weights = (draft and draft.folder, speculation.exit_layer, vocabulary, speculation.draft_int8)
        if weights in self.built:
            return self.built[weights]
        decoder, head, layers = None, None, range(speculation.exit_layer)
        if draft is not None:
            decoder = (self.trained_draft or read_draft(draft, model, f"{key}.draft")).decoder(model)
            layers = decoder.own_layers
        if ids is not None:
            # Quantising changes a head in place, so it must not be the one that is kept for the model.
            make = DraftHead if speculation.draft_int8 else draft_head_of
            head = make(decoder or model, ids)
        if speculation.draft_int8:
            # VNNI instructions multiply int8 numbers fastest. That helps most where a copy reads the prompt.
            on_vnni = model.tok_embeddings.weight.device.type == "cpu" and torch.cpu._is_vnni_supported()
            kind = "Int8DynamicActivationInt8WeightConfig" if on_vnni else "Int8WeightOnlyConfig"
            int8 = Component({"_component_": f"torchao.quantization.{kind}"}, f"{key}.draft_int8")
            head = None if head is None else quantise(head, int8)
            decoder = quantised_layers(decoder or model, layers, int8, head is None)
        self.built[weights] = DraftModel(decoder, head)
        return self.built[weights]


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
