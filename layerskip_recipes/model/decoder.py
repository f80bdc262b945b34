"""LayerSkipDecoder: the one class that runs the layers of a torchtune decoder.

The decoder can skip a layer for some samples (layer dropout), expose the hidden states between layers (early-exit loss)
and run part of the stack (draft and verification). Parameters keep the base decoder's names, so both models have the
same checkpoints.

Numbering, here and everywhere: layers are 0 .. L-1; x_0 is the embedding, x_{l+1} the output of layer l;
`exit_layer` E means that E layers ran (1 .. L), so exit E reads x_E.
Shapes: b batch, s sequence, d embedding, v vocabulary.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune import config
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from layerskip_recipes.config.layer_strings import default_exit
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.head import capped, norm_and_cap
from layerskip_recipes.model.layer_dropout import KeptRows, LayerDropout
from layerskip_recipes.model.short_convolution import ShortConvolution
from layerskip_recipes.model.windows import Narrowed, masks_of_layers

OnExit = Callable[[int, torch.Tensor], None]


class LayerSkipDecoder(TransformerDecoder):
    """A torchtune decoder that can skip layers, exit early and run in parts.

    Args:
        base: the decoder to wrap. Its modules are shared, neither copied nor renamed. (For Gemma 2 the final norm is a
            new module with the same parameters, because torchtune caps the logits in the wrong place; see head.py.)
        layer_dropout: draws the samples that stay in each layer in training mode; None drops nothing.
    """

    def __init__(self, base: TransformerDecoder, layer_dropout: LayerDropout | None = None) -> None:
        if type(base) is not TransformerDecoder:
            raise ConfigError(
                f"model: {type(base).__name__} is not supported. Allowed: a torchtune TransformerDecoder from the "
                "builders of llama2/3, mistral, qwen2, gemma, phi3 or phi4"
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
        self.num_output_chunks = base.num_output_chunks
        self.encoder_max_cache_seq_len = base.encoder_max_cache_seq_len
        self.decoder_max_cache_seq_len = base.decoder_max_cache_seq_len
        self.training = base.training
        # QLoRA builders register a hook on the decoder that unpacks NF4 weights, always to bf16. Use the model's dtype.
        self._state_dict_hooks.update(base._state_dict_hooks)
        for hook in self._state_dict_hooks.values():
            if isinstance(hook, partial):
                hook.keywords["dtype"] = base.tok_embeddings.weight.dtype
        self.layer_dropout = layer_dropout
        self.decoding = False  # True while a generation engine's own KV caches are in the attention layers

    trained_layers = range(0)  # in a draft model, the layers that belong to a trained draft (draft.py)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def forward(
        self,
        tokens: torch.Tensor | None = None,
        *,
        mask: Any = None,
        input_pos: torch.Tensor | None = None,
        exit_layer: int | None = None,
        hidden: torch.Tensor | None = None,
        start_layer: int = 0,
        unembed: bool = True,
        on_exit: OnExit | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """Run the layers `start_layer` .. `exit_layer` - 1, then apply the head g.

        With the defaults this is the base decoder (except for Gemma 2, see head.py). Every partial run goes through
        this method, never through the layers directly, so that a sharded model gathers its parameters.

        Args:
            tokens: [b, s] token ids; not needed with `hidden`.
            mask, input_pos: as in torchtune's `TransformerDecoder.forward`.
            exit_layer: E, the number of layers after which to stop; None means L.
            hidden: x_{start_layer} [b, s, d], to continue from instead of tokens.
            start_layer: the first layer to run; above 0 only with `hidden`. `start_layer=L` applies only the head.
            unembed: False returns x_E instead of g(x_E).
            on_exit: called after each layer with E, the number of layers run so far, and x_E [b, s, d] before the norm.
                During the call a sharded model's norm and head are gathered.

        Returns:
            [b, s, v] logits in fp32 (a list of chunks after `set_num_output_chunks`, as in torchtune). If `unembed` is
            False, x_E [b, s, d] before the norm.
        """
        # The first hidden state: the embedding, or the given one.
        exit_layer = self.check_exit(self.num_layers if exit_layer is None else exit_layer)
        assert 0 <= start_layer <= exit_layer and (hidden is not None or start_layer == 0)
        if hidden is None and not self.decoding:
            self._validate_inputs(tokens.shape[1], mask=mask, input_pos=input_pos)
        h = self.tok_embeddings(tokens) if hidden is None else hidden

        # Each layer runs on the samples that it keeps.
        if mask is None and not self.decoding and not is_plain_attention(self.layers[0]):
            # Build the mask once; Gemma 2 would rebuild it in every layer, on the CPU.
            mask = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool, device=h.device).tril()
        layers = [self.layers[layer] for layer in range(start_layer, exit_layer)]
        masks = masks_of_layers(layers, mask, h)
        rows_to_run: list[torch.Tensor | KeptRows] = [None] * self.num_layers
        factors = [1.0] * self.num_layers
        if self.training and self.layer_dropout:
            rows_to_run, factors = self._draw(h), self.layer_dropout.factors()
        for layer, (module, mask) in enumerate(zip(layers, masks, strict=True), start_layer):
            layer_inputs = {"mask": mask, "input_pos": input_pos}
            h = self._run_layer(module, h, rows_to_run[layer], factors[layer], layer_inputs)
            if on_exit is not None:
                if layer + 1 == exit_layer:
                    # FSDP hooks the gradients of the model's output and of the layer's output. If both were the same
                    # tensor, the order of the hooks would depend on the dropped rows: ranks could gather in different
                    # orders and hang.
                    h = h.clone()
                on_exit(layer + 1, h)
        return self.unembed(h) if unembed else h

    def with_modules(self, **modules: nn.Module) -> "LayerSkipDecoder":
        """A decoder that shares all modules with this one, except for the given ones."""
        other = copy(self)
        other.decoding = False
        other._modules = dict(self._modules)  # copy() shares this dict
        for name, module in modules.items():
            setattr(other, name, module)
        return other

    def copied_layers(self, layers: Iterable[int]) -> list[nn.Module]:
        """Copies of layers. They are not packed, and share one RoPE table, which can be as large as an int8 layer."""
        replaced: dict[int, Any] = {id(layer.attn.pos_embeddings): layer.attn.pos_embeddings for layer in self.layers}
        for layer in (layers := [*layers]):
            for parameter in self.layers[layer].parameters():
                if isinstance(parameter, NF4Tensor):  # torchtune copies it in blocks of another size
                    replaced[id(parameter)] = nn.Parameter(parameter.get_original_weight(), requires_grad=False)
        return [deepcopy(self.layers[layer], dict(replaced)) for layer in layers]

    def unembed(self, h: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """g(h): [b, s, d] -> [b, s, v] logits, or a list of chunks."""
        logits = super().unembed(h)
        if isinstance(logits, list):
            return [capped(chunk, self.logit_cap) for chunk in logits]
        return capped(logits, self.logit_cap)

    def hidden_states(
        self, tokens: torch.Tensor, exits: Iterable[int], **kwargs: Any
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """x_L [b, s, d] and {E: x_E} for the chosen exits, before the final norm; kwargs as in `forward`."""
        wanted = {self.check_exit(e, "exits") for e in exits}
        hidden = {}

        def keep(exit_layer: int, x: torch.Tensor) -> None:
            if exit_layer in wanted:
                hidden[exit_layer] = x

        return self(tokens, on_exit=keep, unembed=False, **kwargs), hidden

    def check_exit(self, exit_layer: int, key: str = "exit_layer") -> int:
        """Returns `exit_layer` if it is an integer in 1 .. L; `key` is its name in the error message."""
        if isinstance(exit_layer, bool) or not isinstance(exit_layer, int) or not 1 <= exit_layer <= self.num_layers:
            raise ConfigError(
                f"{key}: {exit_layer!r} is not an exit of this model. Allowed: 1..{self.num_layers} "
                f"(number of layers run); for example {key}={default_exit(self.num_layers)}"
            )
        return exit_layer

    def _draw(self, h: torch.Tensor) -> list[torch.Tensor | KeptRows]:
        """The rows kept in each layer; partial lists are tensors on h's device, copied there all at once."""
        drawn: list[Any] = self.layer_dropout.draw(h.shape[0])
        partly = {layer: rows for layer, rows in enumerate(drawn) if rows}
        flat = on_device([row for rows in partly.values() for row in rows], h.device)
        for layer, rows in zip(partly, flat.split([len(rows) for rows in partly.values()]), strict=True):
            drawn[layer] = rows
        return drawn

    def _run_layer(
        self, layer: nn.Module, h: torch.Tensor, rows: torch.Tensor | KeptRows, factor: float, layer_inputs: dict
    ) -> torch.Tensor:
        """x_{l+1} = x_l + r M f_l(x_l) (paper, eq. 1, with r = `factor`).

        `rows`: [k] on h's device, None for all, [] for none.
        """
        if isinstance(rows, list):
            return h
        if rows is None:
            x, inputs = h, layer_inputs
        else:
            x = h.index_select(0, rows)
            inputs = {name: take_rows(value, rows, h.shape[0]) for name, value in layer_inputs.items()}
            if isinstance(layer_inputs["mask"], torch.Tensor) and layer_inputs["mask"].dim() == 2:
                inputs["mask"] = layer_inputs["mask"]  # [s, s], shared by all samples
        out = layer(x, **inputs)
        if factor != 1:
            out = x.lerp(out, factor)  # x + r (out - x), because layers return x + f(x)
        return out if rows is None else h.index_copy(0, rows, out)


BLOCK_TABLES = [
    f"{full}{side}_{what}" for full in ("", "full_") for side in ("kv", "q") for what in ("num_blocks", "indices")
]


def take_rows(value: Any, rows: torch.Tensor, batch_size: int) -> Any:
    """Rows [k] of an input with one row per sample. A shared input (None, a vector, or [1, ..]) stays unchanged."""
    if isinstance(value, Narrowed):
        return Narrowed(take_rows(value.mask, rows, batch_size))
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows) if value.dim() > 1 and value.shape[0] == batch_size else value
    if isinstance(value, BlockMask):
        if value.shape[0] == 1 or batch_size == 1:
            return value
        # `value[rows]` would rebuild the block tables with about 60 operations per layer. Select their rows instead.
        taken, mask_of_batch = copy(value), value.mask_mod
        for name in BLOCK_TABLES:
            table = getattr(value, name, None)
            setattr(taken, name, table if table is None or table.shape[0] == 1 else table.index_select(0, rows))
        # Within partial blocks attention calls mask_mod with row numbers of the selection.
        taken.mask_mod = lambda b, h, q_idx, kv_idx: mask_of_batch(rows[b], h, q_idx, kv_idx)
        return taken
    return value


def on_device(numbers: Sequence, device: torch.device) -> torch.Tensor:
    """Integers, or lists of them, as a tensor on a device, without a device synchronisation."""
    # Only CUDA keeps the source's memory until a non-blocking copy has read it.
    cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.long, pin_memory=cuda).to(device, non_blocking=cuda)


def move_batch(batch: dict[str, Any], device: torch.device) -> None:
    """Move a batch's tensors and masks to a device in place, without a device synchronisation."""
    cuda = device.type == "cuda"
    for name, value in batch.items():
        if isinstance(value, torch.Tensor):
            batch[name] = (value.pin_memory() if cuda else value).to(device, non_blocking=cuda)
        else:
            batch[name] = value.to(device)


def is_plain_attention(layer: nn.Module) -> bool:
    """Whether a layer is causal without a mask: torchtune's own attention, or a convolution."""
    return isinstance(layer.attn, MultiHeadAttention | ShortConvolution)


def layerskip_decoder(
    base: TransformerDecoder | Mapping[str, Any], layer_dropout: Mapping[str, Any] | LayerDropout | None = None
) -> LayerSkipDecoder:
    """A `LayerSkipDecoder` around any torchtune decoder; usable as a `_component_` in YAML.

    Args:
        base: a torchtune `TransformerDecoder`, or how to build one: {"_component_": dotpath, **arguments}.
        layer_dropout: the arguments of `LayerDropout` without num_layers, for example
            {"prob": 0.1, "layers_scale": "exp"}.

    Returns:
        A decoder with the state_dict keys of base.

    Example:
        >>> with torch.device("meta"):  # without memory for its weights
        ...     model = layerskip_decoder({"_component_": "torchtune.models.llama3_2.llama3_2_1b"}, {"prob": 0.1})
        >>> model.num_layers
        16
    """
    if isinstance(base, Mapping):
        base = config.instantiate(OmegaConf.create(dict(base)))
    model = base if isinstance(base, LayerSkipDecoder) else LayerSkipDecoder(base)
    if isinstance(layer_dropout, Mapping):
        layer_dropout = LayerDropout(model.num_layers, **layer_dropout)
    if layer_dropout is not None:
        model.layer_dropout = layer_dropout
    return model
