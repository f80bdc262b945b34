"""LayerSkipDecoder: the one class that owns the walk through a torchtune decoder's layers.

It leaves layers out for some samples (layer dropout), looks at the hidden state between layers (early-exit loss) and
runs a part of the stack (draft and verification). The parameters keep the base decoder's names, so checkpoints of
both are the same files.

Numbering, here and everywhere: layers are 0 .. L-1; x_0 is the embedding, x_{l+1} the output of layer l;
`exit_layer` E means that E layers ran (1 .. L), so exit E looks at x_E.
Shapes: b batch, s sequence, d embedding, v vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torchtune import config
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.families import capped, norm_and_cap
from layerskip_recipes.model.layer_dropout import IDLE, Kept, LayerDropout


class LayerSkipDecoder(TransformerDecoder):
    """A torchtune decoder that can skip, exit early and walk in parts.

    Args:
        base: the decoder to take over. Its modules are shared, not copied, and not renamed. (Of Gemma 2, whose logits
            torchtune caps in the wrong place, the final norm's parameters are; see gemma2.py.)
        layer_dropout: draws the samples that stay in each layer in training mode; None drops nothing.

    Raises:
        ValueError: if base is not a plain `TransformerDecoder`, such as a `DeepFusionModel` around one.
    """

    def __init__(self, base: TransformerDecoder, layer_dropout: LayerDropout | None = None) -> None:
        if type(base) is not TransformerDecoder:
            raise ConfigError(
                f"model: {type(base).__name__} is not supported. Allowed: a torchtune TransformerDecoder, as the "
                "builders of llama2/3, mistral, qwen2, gemma, phi3 and phi4 make it"
            )
        norm, cap = norm_and_cap(base.norm)
        super().__init__(
            tok_embeddings=base.tok_embeddings,
            layers=base.layers,
            max_seq_len=base.max_seq_len,
            num_heads=base.num_heads,
            head_dim=base.head_dim,
            norm=norm,
            output=base.output,
        )
        self.logit_cap = cap
        self.taken_over = tuple(getattr(base, part) for part in PARTS)
        self.num_output_chunks = base.num_output_chunks
        self.encoder_max_cache_seq_len = base.encoder_max_cache_seq_len
        self.decoder_max_cache_seq_len = base.decoder_max_cache_seq_len
        self.training = base.training
        # QLoRA builders hang the hook that unpacks NF4 weights on the decoder itself, and always unpack to bf16.
        self._state_dict_hooks.update(base._state_dict_hooks)
        for hook in self._state_dict_hooks.values():
            if isinstance(hook, partial):
                hook.keywords["dtype"] = base.tok_embeddings.weight.dtype
        self.layer_dropout = layer_dropout
        # True while a generation engine has its own caches in the attention layers (kv_cache.py).
        self.decoding = False

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)

    def forward(
        self,
        tokens: torch.Tensor | None = None,
        *,
        mask: Any = None,
        encoder_input: Any = None,
        encoder_mask: torch.Tensor | None = None,
        input_pos: torch.Tensor | None = None,
        exit_layer: int | None = None,
        exits: Iterable[int] | None = None,
        hidden: torch.Tensor | None = None,
        start_layer: int = 0,
        unembed: bool = True,
        then: Callable[[torch.Tensor, dict[int, torch.Tensor]], Any] | None = None,
        passing: Callable[[int, torch.Tensor], None] | None = None,
    ) -> Any:
        """Walk from layer `start_layer` up to, not including, layer `exit_layer`, then apply the head g.

        With the defaults this is the base decoder (but for Gemma 2, see gemma2.py). Every partial walk goes through
        here, never through the layers directly, so that a sharded model gathers its parameters.

        Args:
            tokens: [b, s] token ids. Left out when `hidden` is given.
            mask, encoder_input, encoder_mask, input_pos: as in torchtune's `TransformerDecoder.forward`.
            exit_layer: E, the layers to stop after; None means L.
            exits: exits to look at on the way (each in 1 .. exit_layer); changes the result, see below.
            hidden: [b, s, d], x_{start_layer}, to go on from instead of tokens.
            start_layer: the first layer to run; more than 0 only with `hidden`. `start_layer=L` applies only the head.
            unembed: False returns x_E instead of g(x_E).
            then: with `exits`: called on the pair that would be returned, and its result is returned instead. It runs
                within this forward, where a sharded model's own parameters (norm, head) are whole.
            passing: with `exits`: called with e and x_e when the walk is there, within this forward too. The pair's
                second part is empty then: no more than one x_e exists at a time.

        Returns:
            [b, s, v] logits in fp32 (a list of chunks after `set_num_output_chunks`, as in torchtune), or x_E
            [b, s, d] if `unembed` is False, or the pair (x_E, {e: x_e for e in exits}), all before the norm, if
            `exits` is given.

        Raises:
            ValueError: if exit_layer or one of the exits is outside of the model.
        """
        exit_layer = self.check_exit(self.num_layers if exit_layer is None else exit_layer)
        wanted = set() if exits is None else {self.check_exit(e, "exits") for e in exits}
        if max(wanted, default=0) > exit_layer:
            raise ConfigError(f"exits: {max(wanted)} is never reached, the walk ends at exit_layer {exit_layer}")
        assert 0 <= start_layer <= exit_layer and (hidden is not None or start_layer == 0)
        if hidden is None:
            if not self.decoding:
                self._validate_inputs(
                    tokens.shape[1],
                    mask=mask,
                    encoder_input=encoder_input,
                    encoder_mask=encoder_mask,
                    input_pos=input_pos,
                )
            h = self.tok_embeddings(tokens)
        else:
            h = hidden

        if mask is None and not self.decoding and isinstance(self.layers[0].attn, Gemma2Attention):
            # It would make it in each layer, on the host.
            mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        of_sample = {
            "mask": mask,
            "encoder_input": encoder_input,
            "encoder_mask": encoder_mask,
            "input_pos": input_pos,
        }
        kept = self._draw(h) if self.training and self.layer_dropout else [None] * self.num_layers
        seen = {}
        for layer in range(start_layer, exit_layer):
            h = self._run_layer(self.layers[layer], h, kept[layer], of_sample)
            if layer + 1 in wanted and passing is not None:
                passing(layer + 1, h)
            elif layer + 1 in wanted:
                seen[layer + 1] = h
        if exits is not None:
            return (h, seen) if then is None else then(h, seen)
        return self.unembed(h) if unembed else h

    def unembed(self, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """g(h): [b, s, d] -> [b, s, v] logits, or a list of chunks."""
        logits = super().unembed(h)
        if isinstance(logits, list):
            return [capped(chunk, self.logit_cap) for chunk in logits]
        return capped(logits, self.logit_cap)

    def hidden_states(
        self, tokens: torch.Tensor, exits: Iterable[int], **kwargs: Any
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """x_L and the x_E of the chosen exits, before the final norm.

        Args:
            tokens: [b, s].
            exits: the E to return.
            **kwargs: mask, input_pos, ... of `forward`.

        Returns:
            x_L [b, s, d] and {E: x_E [b, s, d]}.

        Raises:
            ValueError: if an exit is outside of 1 .. L.
        """
        return self(tokens, exits=exits, **kwargs)

    def check_exit(self, exit_layer: int, key: str = "exit_layer") -> int:
        """`exit_layer` itself, if it is one; `key` is the name that an error message shows.

        Raises:
            ValueError: if it is no integer in 1 .. L.
        """
        if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or not 1 <= exit_layer <= self.num_layers:
            raise ConfigError(
                f"{key}: {exit_layer!r} is not an exit of this model. Allowed: 1..{self.num_layers} "
                f"(number of layers run); for example {key}={max(self.num_layers // 4, 1)}"
            )
        return exit_layer

    def _draw(self, h: torch.Tensor) -> list[torch.Tensor | Kept]:
        """The samples that stay in each layer, those that some drop as row numbers on h's device: one copy for all."""
        kept = self.layer_dropout.draw(h.shape[0])
        partial = [layer for layer, rows in enumerate(kept) if isinstance(rows, list) and rows]
        flat = on_device([row for layer in partial for row in kept[layer]], h.device)
        rows = flat.split([len(kept[layer]) for layer in partial])
        return list((dict(enumerate(kept)) | dict(zip(partial, rows, strict=True))).values())

    def _run_layer(self, layer: nn.Module, h: torch.Tensor, kept: torch.Tensor | Kept, of_sample: dict) -> torch.Tensor:
        """x_{l+1} = x_l + M f_l(x_l) (paper, eq. 1): f_l runs on the kept samples only.

        Args:
            layer: l.
            h: [b, s, d], x_l.
            kept: the rows that stay, [k] on h's device; None for all, an empty list for none, `IDLE`.
            of_sample: the layer's other inputs, of which each row belongs to a sample.
        """
        if kept is None:
            return layer(h, **of_sample)
        if isinstance(kept, list):  # an empty one
            return h
        idle = kept is IDLE
        rows = torch.zeros(1, dtype=torch.long, device=h.device) if idle else kept
        inputs = {name: take_rows(value, rows, h.shape[0]) for name, value in of_sample.items()}
        if isinstance(of_sample["mask"], torch.Tensor) and of_sample["mask"].dim() == 2:
            inputs["mask"] = of_sample["mask"]  # [s, s], for all samples
        x = h.index_select(0, rows)
        out = layer(x, **inputs)
        # Idle: the gradient has to pass too, since the other ranks gather and reduce this layer in their backward.
        return h.index_copy(0, rows, x + 0 * (out - x) if idle else out)


BLOCK_TABLES = [
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]


def take_rows(value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    """The rows of what belongs to the samples; what all samples share (None, a first dimension of 1) stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows) if value.dim() > 1 and value.shape[0] == batch_size else value
    if isinstance(value, BlockMask):
        if value.shape[0] == 1 or batch_size == 1:
            return value
        # Not value[rows], which works out anew, in some sixty steps for each layer, what here can be taken.
        taken, whole = copy(value), value.mask_mod
        for name in BLOCK_TABLES:
            table = getattr(value, name, None)
            setattr(taken, name, table if table is None or table.shape[0] == 1 else table.index_select(0, rows))
        # Partial blocks ask mask_mod again, by the row number within the taken batch.
        taken.mask_mod = lambda b, h, q_idx, kv_idx: whole(rows[b], h, q_idx, kv_idx)
        return taken
    if isinstance(value, Mapping):
        return {key: take_rows(part, rows, batch_size) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(take_rows(part, rows, batch_size) for part in value)
    return value


def on_device(numbers: Sequence, device: torch.device) -> torch.Tensor:
    """Integers, or lists of them, as a tensor there; the host does not wait for a GPU to have them."""
    cuda = device.type == "cuda"  # elsewhere a copy that nobody waits for may read memory that is free by then
    return torch.tensor(numbers, dtype=torch.long, pin_memory=cuda).to(device, non_blocking=cuda)


def is_plain_attention(layer: nn.Module) -> bool:
    """Whether a layer has torchtune's own attention, which needs no mask to be causal."""
    return type(layer.attn) is MultiHeadAttention


PARTS = ("tok_embeddings", "layers", "norm", "output")
_WALKED: WeakKeyDictionary[TransformerDecoder, LayerSkipDecoder] = WeakKeyDictionary()


def walked(model: TransformerDecoder) -> LayerSkipDecoder:
    """The model, or the `LayerSkipDecoder` around a plain one: always the same, compiled graphs stay with it."""
    if isinstance(model, LayerSkipDecoder):
        return model
    kept = _WALKED.get(model)
    if kept is None or any(part is not getattr(model, name) for name, part in zip(PARTS, kept.taken_over, strict=True)):
        kept = _WALKED[model] = LayerSkipDecoder(model)
    kept.training = model.training
    return kept


def layerskip_decoder(
    base: TransformerDecoder | Mapping[str, Any], layer_dropout: Mapping[str, Any] | LayerDropout | None = None
) -> LayerSkipDecoder:
    """A `LayerSkipDecoder` around any torchtune decoder; usable as a `_component_` in YAML.

    Args:
        base: a torchtune `TransformerDecoder`, or how to build one: {"_component_": dotpath, **arguments}.
        layer_dropout: the arguments of `LayerDropout` but num_layers, for example
            {"prob": 0.1, "layers_scale": "exp"}.

    Returns:
        The decoder, with the state_dict keys of base.

    Raises:
        ValueError: if base is no plain decoder, or a dropout argument is out of range.

    Example:
        >>> with torch.device("meta"):  # without memory for its weights
        ...     model = layerskip_decoder({"_component_": "torchtune.models.llama3_2.llama3_2_1b"}, {"prob": 0.1})
        >>> model.num_layers
        16
    """
    if isinstance(base, LayerSkipDecoder):
        model = base
    else:
        model = LayerSkipDecoder(
            config.instantiate(OmegaConf.create(dict(base))) if isinstance(base, Mapping) else base
        )
    if layer_dropout is not None:
        if isinstance(layer_dropout, Mapping):
            layer_dropout = LayerDropout(model.num_layers, **layer_dropout)
        model.layer_dropout = layer_dropout
    return model
