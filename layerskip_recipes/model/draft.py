"""Draft: layers and a norm that draft for a model which stays as it is, between its embedding and its head."""

import hashlib
from collections.abc import Mapping
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from layerskip_recipes.model.decoder import LayerSkipDecoder

Kind = Literal["copy", "adapter"]

# An adapter learns to draft two tokens in a row: the first from the model's state of the token before, the second from
# its own, as all later ones.
IN_A_ROW = 2


class JoiningLayer(nn.Module):
    """A layer of the model's kind over two hidden states side by side, [b, s, 2 d] -> [b, s, d].

    Its input is W [n(x), n(y)] of the states x and y, each divided by its root mean square.
    """

    EPSILON = 1e-6

    def __init__(self, layer: nn.Module, like: torch.Tensor) -> None:
        super().__init__()
        width = like.shape[-1]
        self.join = nn.Linear(2 * width, width, bias=False, device=like.device, dtype=like.dtype)
        self.layer: Any = layer

    @property
    def attn(self) -> nn.Module:
        """The layer's attention, where a generation puts its cache."""
        return self.layer.attn

    def forward(self, x: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        both = [F.rms_norm(half, half.shape[-1:], eps=self.EPSILON) for half in x.chunk(2, -1)]
        return self.layer(self.join(torch.cat(both, -1)), **layer_inputs)


class Draft(nn.Module):
    """Layers of a model's own kind and a norm, in front of the model's head.

    A `copy` begins at the embedding, as the model's first E layers do. An `adapter` goes on from x_E, the hidden state
    after the model's own first E layers (Kangaroo, arXiv 2404.18911), joined with the model's last state of the token
    before (EAGLE, arXiv 2401.15077). The model has not yet read drafted tokens: from the second one on, the draft's own
    last state stands in for it.

    Args:
        model: the model, not yet sharded, wrapped or compiled. A copy begins as its first E layers, an adapter as the
            next ones, both with its norm.
        kind: "copy" or "adapter".
        exit_layer: E.
        num_layers: of an adapter.

    Attributes:
        start: the layer at which the draft begins: 0 for a copy, E for an adapter.
        vocabulary: the tokens that the draft chooses among; None: all.
    """

    vocabulary: list[int] | None = None

    def __init__(self, model: LayerSkipDecoder, kind: Kind, exit_layer: int, num_layers: int = 1) -> None:
        super().__init__()
        self.kind, self.exit_layer = kind, exit_layer
        self.start = 0 if kind == "copy" else exit_layer
        end = exit_layer if kind == "copy" else exit_layer + num_layers
        layers = model.copied_layers(range(self.start, end))
        if kind == "adapter":
            layers[0] = JoiningLayer(layers[0], model.tok_embeddings.weight)
        self.layers = nn.ModuleList(layers)
        self.norm = deepcopy(model.norm)
        self.requires_grad_(True)

    @property
    def num_layers(self) -> int:
        """The draft's own layers."""
        return len(self.layers)

    def forward(self, x: torch.Tensor, **layer_inputs: Any) -> torch.Tensor:
        """The normed states for the model's head, [b, s, d], from the embedding [b, s, d], or for an adapter from x_E
        and the model's last state of the token before, [b, s, 2 d]; `layer_inputs` are mask and input_pos."""
        dtype = x.dtype
        # Beside a model in bf16 a draft that is trained has weights in fp32.
        with torch.autocast(x.device.type, dtype) if dtype == torch.bfloat16 else nullcontext():
            for layer in self.layers:
                x = layer(x, **layer_inputs)
            return self.norm(x).to(dtype)

    def teacher_states(
        self, model: LayerSkipDecoder, tokens: torch.Tensor, **inputs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the draft learns from, without a gradient: the state that it begins with, which is the embedding or
        x_E, and the last layer's normed state; [b, s, d].
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
            model(tokens, on_exit=on_exit, unembed=False, **inputs)
        return kept[self.start], kept[model.num_layers]

    def states(self, x: torch.Tensor, last: torch.Tensor, **inputs: Any) -> list[torch.Tensor]:
        """The normed states for the head, [b, s, d], from `teacher_states`: of a copy one, of an adapter those of the
        first and the second drafted token."""
        layer_inputs = {name: value for name, value in inputs.items() if name in ("mask", "input_pos")}
        if self.kind == "copy":
            return [self(x, **layer_inputs)]
        states = [last]
        for _ in range(IN_A_ROW):
            states.append(
                self(torch.cat([x, previous_states(states[-1], inputs.get("input_pos"))], -1), **layer_inputs)
            )
        return states[1:]

    def decoder(self, model: LayerSkipDecoder) -> LayerSkipDecoder:
        """A decoder that holds what the draft decodes with: the model's layers below `start`, then the draft's, its
        norm, and the model's head. Its modules are shared."""
        layers = nn.ModuleList([*model.layers[: self.start], *self.layers])
        drafter = model.with_modules(layers=layers, norm=self.norm)
        drafter.own_layers = range(self.start, self.start + self.num_layers)
        return drafter


def previous_states(states: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """The state one position before each, 0 where a text begins: [b, s, d] -> [b, s, d].

    Where several texts are packed into a row, `positions` [b, s] say where each of them begins.
    """
    shifted = F.pad(states[:, :-1], (0, 0, 1, 0))
    return shifted if positions is None else shifted * (positions > 0)[..., None]


def weights_hash(weights: Mapping[str, torch.Tensor], most_values: int = 4096) -> str:
    """A hash that names weights, the same in fp32 and in bf16, of at most so many values of each tensor."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        value = weights[name].detach().flatten()
        some = value[:: -(-value.numel() // most_values)].to(torch.bfloat16).cpu()
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(some.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
