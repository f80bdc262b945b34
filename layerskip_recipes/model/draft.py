"""Draft: trained layers and a norm that draft for a model, with the model's embedding and head."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from layerskip_recipes.model.decoder import LayerSkipDecoder, OnExit
from layerskip_recipes.model.windows import masks_of_layers

Kind = Literal["copy", "adapter"]

# Unroll length of an adapter's training. It drafts the first token from the model's last state, and the second one from
# its own last state, as it does for all later tokens.
IN_A_ROW = 2


class JoiningLayer(nn.Module):
    """A decoder layer over two concatenated hidden states, [b, s, 2 d] -> [b, s, d].

    Its input is W [n(x), n(y)]: n divides the states x and y by their root mean square.
    """

    EPSILON = 1e-6

    def __init__(self, layer: nn.Module, like: torch.Tensor) -> None:
        super().__init__()
        width = like.shape[-1]
        self.join = nn.Linear(2 * width, width, bias=False, device=like.device, dtype=like.dtype)
        self.layer: Any = layer

    @property
    def attn(self) -> nn.Module:
        """The layer's attention, where generation puts its KV cache."""
        return self.layer.attn

    def forward(self, x: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        both = [F.rms_norm(half, half.shape[-1:], eps=self.EPSILON) for half in x.chunk(2, -1)]
        return self.layer(self.join(torch.cat(both, -1)), **layer_inputs)


class Draft(nn.Module):
    """Layers like the model's own and a norm, followed by the model's head.

    A `copy` starts from the embedding. It is initialised with the model's first E layers.

    An `adapter` starts from x_E, the hidden state after the model's first E layers (Kangaroo, arXiv 2404.18911), joined
    with the model's last hidden state of the previous token (EAGLE, arXiv 2401.15077). It is one layer, initialised
    with the model's next one. The model has not processed drafted tokens yet, so from the second drafted token on, the
    adapter's own last state replaces the model's.

    `model` must not be sharded, wrapped or compiled yet. `start` is the layer where the draft begins: 0 or E.
    """

    vocabulary: list[int] | None = None  # the tokens that it can draft; None for all

    def __init__(self, model: LayerSkipDecoder, kind: Kind, exit_layer: int) -> None:
        super().__init__()
        self.kind, self.exit_layer = kind, exit_layer
        self.start = 0 if kind == "copy" else exit_layer
        layers = model.copied_layers(range(self.start, exit_layer if kind == "copy" else exit_layer + 1))
        if kind == "adapter":
            layers[0] = JoiningLayer(layers[0], model.tok_embeddings.weight)
        self.layers = nn.ModuleList(layers)
        self.norm = deepcopy(model.norm)
        self.requires_grad_(True)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def forward(self, x: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        """The normed states [b, s, d] for the model's head.

        x is the embedding [b, s, d]; for an adapter, x_E and the last state of the previous token, [b, s, 2 d].
        """
        dtype = x.dtype
        # In training the draft has fp32 weights, even if the model is in bf16.
        with torch.autocast(x.device.type, dtype) if dtype == torch.bfloat16 else nullcontext():
            masks = masks_of_layers(self.layers, layer_inputs.pop("mask", None), x)
            for layer, mask in zip(self.layers, masks, strict=True):
                x = layer(x, mask=mask, **layer_inputs)
            return self.norm(x).to(dtype)

    def teacher_states(
        self, model: LayerSkipDecoder, tokens: torch.Tensor, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft's input (embedding or x_E) and the model's last normed state, [b, s, d], without gradient."""
        states = dict[int, torch.Tensor]()
        with torch.no_grad():  # not inference mode: autograd cannot use its tensors
            model(tokens, on_exit=self.keeper(model, tokens, states), unembed=False, **inputs)
        return states[self.start], states[model.num_layers]

    def keeper(self, model: LayerSkipDecoder, tokens: torch.Tensor, states: dict[int, torch.Tensor]) -> OnExit:
        """An `on_exit` for the model's forward that fills `states` with the `teacher_states`, by number of layers."""

        @torch.no_grad()
        def on_exit(exit_layer: int, x: torch.Tensor) -> None:
            # Within the model's forward, a sharded model's embedding and norm are gathered.
            if exit_layer == 1 and self.start == 0:
                states[0] = model.tok_embeddings(tokens)
            if exit_layer == self.start:
                states[self.start] = x.detach()
            if exit_layer == model.num_layers:
                states[exit_layer] = model.norm(x)

        return on_exit

    def states(self, x: torch.Tensor, last: torch.Tensor, **inputs: Any) -> list[torch.Tensor]:
        """The normed states [b, s, d] for the head, given `teacher_states`.

        A copy has one; an adapter has one for the first drafted token and one for the second.
        """
        layer_inputs = {name: value for name, value in inputs.items() if name in ("mask", "input_pos")}
        if self.kind == "copy":
            return [self(x, **layer_inputs)]
        states = [last]
        for _ in range(IN_A_ROW):
            previous = previous_states(states[-1], inputs.get("input_pos"))
            states.append(self(torch.cat([x, previous], -1), **layer_inputs))
        return states[1:]

    def decoder(self, model: LayerSkipDecoder) -> LayerSkipDecoder:
        """The decoder that drafts: the model's layers below `start`, the draft's layers and norm, the model's head."""
        layers = nn.ModuleList([*model.layers[: self.start], *self.layers])
        decoder = model.with_modules(layers=layers, norm=self.norm)
        decoder.trained_layers = range(self.start, self.start + self.num_layers)
        return decoder


def previous_states(states: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """States [b, s, d] shifted right by one position, with 0 where a packed text begins (`positions` [b, s] is 0)."""
    shifted = F.pad(states[:, :-1], (0, 0, 1, 0))
    return shifted if positions is None else shifted * (positions > 0)[..., None]


def weights_hash(weights: Mapping[str, torch.Tensor], most_values: int = 4096) -> str:
    """A hash of at most `most_values` values per tensor. It is the same in fp32 and in bf16."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().flatten()
        some = value[:: -(-value.numel() // most_values)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
