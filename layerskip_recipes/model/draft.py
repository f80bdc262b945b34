"""Draft: layers and a norm that draft for a model which stays as it is, between its embedding and its head."""

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn

from layerskip_recipes.model.decoder import LayerSkipDecoder

Kind = Literal["copy", "adapter"]


class Draft(nn.Module):
    """Layers of a model's own kind and a norm, in front of the model's head.

    A `copy` begins at the embedding, as the model's first E layers do. An `adapter` goes on from x_E, the hidden state
    after the model's own first E layers (Kangaroo, arXiv 2404.18911).

    Args:
        model: the model, not yet sharded, wrapped or compiled. Of its layers and norm the draft has copies: of the
            first E, or of the last ones.
        kind: "copy" or "adapter".
        exit_layer: E.
        num_layers: of an adapter.

    Attributes:
        start: the layer at which the draft begins: 0 for a copy, E for an adapter.
    """

    def __init__(self, model: LayerSkipDecoder, kind: Kind, exit_layer: int, num_layers: int = 1) -> None:
        super().__init__()
        self.kind, self.exit_layer = kind, exit_layer
        self.start = 0 if kind == "copy" else exit_layer
        end = model.num_layers
        sources = range(exit_layer) if kind == "copy" else range(end - num_layers, end)
        self.layers = nn.ModuleList(model.copied_layers(sources))
        self.norm = deepcopy(model.norm)
        self.requires_grad_(True)

    @property
    def num_layers(self) -> int:
        """The draft's own layers."""
        return len(self.layers)

    def forward(self, x: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        """What the model's head unembeds: x_start [b, s, d] -> [b, s, d], after the draft's norm.

        Args:
            x: the embedding for a copy, x_E for an adapter.
            **layer_inputs: mask and input_pos.
        """
        for layer in self.layers:
            x = layer(x, **layer_inputs)
        return self.norm(x)

    def hidden_states(
        self, model: LayerSkipDecoder, tokens: torch.Tensor, to_end: bool = True, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed states that the head unembeds: the draft's, and the last layer's without a gradient; [b, s, d].

        Args:
            model: the model.
            tokens: [b, s].
            to_end: False stops the model where the draft begins; the second result is x_start then.
            **inputs: mask, input_pos, ... of the model.
        """
        kept = dict[int, torch.Tensor]()

        def on_exit(exit_layer: int, x: torch.Tensor) -> None:
            # Within the model's forward, where a sharded model's own parameters are whole.
            if exit_layer == 1 and self.start == 0:
                kept[0] = model.tok_embeddings(tokens)
            if exit_layer == self.start:
                kept[self.start] = x
            if exit_layer == model.num_layers:
                kept[exit_layer] = model.norm(x)

        with torch.no_grad():  # not inference mode, whose tensors autograd cannot use
            depth = model.num_layers if to_end else max(self.start, 1)
            model(tokens, on_exit=on_exit, exit_layer=depth, unembed=False, **inputs)
        layer_inputs = {name: value for name, value in inputs.items() if name in ("mask", "input_pos")}
        return self(kept[self.start], **layer_inputs), kept.get(model.num_layers, kept[self.start])

    def decoder(self, model: LayerSkipDecoder) -> LayerSkipDecoder:
        """A decoder that decodes as the draft does: the model's layers below `start`, then the draft's, its norm, and
        the model's head. Its modules are shared."""
        layers = nn.ModuleList([*model.layers[: self.start], *self.layers])
        drafter = model.with_modules(layers=layers, norm=self.norm)
        drafter.own_layers = range(self.start, self.start + self.num_layers)
        return drafter


def weights_hash(weights: Mapping[str, torch.Tensor], most_values: int = 4096) -> str:
    """A hash that names weights, the same in fp32 and in bf16.

    Args:
        weights: a state_dict.
        most_values: of each tensor so many values, evenly spread, go into the hash.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().flatten()
        some = value[:: -(-value.numel() // most_values)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
