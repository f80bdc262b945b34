"""The draft model, which really drafts. It is built from a `Speculation` and a loaded model."""

from collections.abc import Hashable
from dataclasses import dataclass

import torch

from layerskip_recipes.checkpoint.drafts import read_draft
from layerskip_recipes.checkpoint.weights import linear_head, quantise
from layerskip_recipes.config.components import Component
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.drafting.draft_head import DraftHead, draft_head_of
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.model.decoder import LayerSkipDecoder, as_layerskip_decoder
from layerskip_recipes.model.draft import Draft


@dataclass(frozen=True)
class DraftModel:
    """A decoder whose early layers and head draft.

    decoder: such as a quantised copy, or a trained draft's; None: the model itself.
    head: the head of the draft vocabulary; None: rows of the decoder's head.
    """

    decoder: LayerSkipDecoder | None = None
    head: DraftHead | None = None

    def fitted(self, model: LayerSkipDecoder, speculation: Speculation) -> tuple[LayerSkipDecoder, DraftHead | None]:
        """Its decoder, and the head of the draft vocabulary, if there is one.

        Raises:
            ConfigError: unless it has the speculation's exit, and the model's cache shapes, vocabulary and dtype.
        """
        decoder, exit_layer = model, speculation.exit_layer
        if self.decoder is not None:
            decoder = as_layerskip_decoder(self.decoder)
            own, layers = decoder.own_layers, len(decoder.layers)
            if own and exit_layer != (own.start or own.stop):
                raise ConfigError(
                    f"exit_layer: {exit_layer} is not the draft model's. Allowed: {own.start or own.stop}"
                )
            if not exit_layer <= layers <= model.num_layers:
                raise ConfigError(
                    f"draft_model: it has {layers} layers. Allowed: {exit_layer} (exit_layer) to {model.num_layers}"
                )
            theirs, ours = _shape(decoder), _shape(model)
            if theirs != ours:
                raise ConfigError(
                    f"draft_model: its key heads, head_dim, vocabulary and dtype are {theirs}, and the model's {ours}. "
                    "Allowed: a decoder that shares cache and vocabulary, such as a quantised copy"
                )
        if self.head is not None or speculation.draft_vocabulary is None:
            return decoder, self.head
        return decoder, draft_head_of(decoder if decoder.own_layers else model, speculation.draft_vocabulary)


def _shape(decoder: LayerSkipDecoder) -> tuple:
    attn, embedding = decoder.layers[0].attn, decoder.tok_embeddings
    return attn.num_kv_heads, attn.head_dim, embedding.num_embeddings, embedding.weight.dtype


def build_draft_model(
    model: LayerSkipDecoder, speculation: Speculation, key: str = "self_speculation", trained: Draft | None = None
) -> DraftModel:
    """The draft model of a loaded model. `trained` is the draft of `speculation.draft`, if it has been read.

    `key` names the section in messages.
    """
    decoder, head, layers = None, None, range(speculation.exit_layer)
    if speculation.draft is not None:
        decoder = (trained or read_draft(speculation.draft, model, f"{key}.draft")).decoder(model)
        layers = decoder.own_layers
    if speculation.draft_vocabulary is not None:
        # Quantising changes a head in place, so it must not be the one that is kept for the model.
        make = DraftHead if speculation.draft_int8 else draft_head_of
        head = make(decoder or model, speculation.draft_vocabulary)
    if speculation.draft_int8:
        int8 = Component({"_component_": "torchao.quantization.Int8WeightOnlyConfig"}, f"{key}.draft_int8")
        head = None if head is None else quantise(head, int8)
        decoder = quantised_layers(decoder or model, layers, int8, head is None)
    return DraftModel(decoder, head)


def quantised_layers(
    model: LayerSkipDecoder, layers: range, quantizer: Component, with_head: bool = True
) -> LayerSkipDecoder:
    """The model's first layers and its head, with quantised copies of `layers` and, `with_head`, of the head."""
    parts = model.copied_layers(layers)
    if with_head:
        parts.append(linear_head(model))
    packed = quantise(torch.nn.ModuleList(parts), quantizer)
    decoder = model.with_modules(layers=torch.nn.ModuleList([*model.layers[: layers.start], *packed[: len(layers)]]))
    return decoder.with_modules(output=packed[len(layers)]) if with_head else decoder


class DraftModels:
    """The draft models of one loaded model. Speculations that draft with the same weights share a draft model.

    `trained`: the trained draft of all speculations, if it has been read.
    """

    def __init__(self, trained: Draft | None = None) -> None:
        self.trained = trained
        self.built: dict[Hashable, DraftModel] = {}

    def of(
        self, speculation: Speculation | None, model: LayerSkipDecoder, key: str = "self_speculation"
    ) -> DraftModel | None:
        """The draft model of a speculation; `key` names its section in messages."""
        if speculation is None:
            return None
        draft, ids = speculation.draft and speculation.draft.folder, speculation.draft_vocabulary
        weights = (draft, speculation.exit_layer, None if ids is None else tuple(ids), speculation.draft_int8)
        if weights not in self.built:
            self.built[weights] = build_draft_model(model, speculation, key, self.trained)
        return self.built[weights]
