"""hf_decoder: builds a torchtune decoder from the config.json of a Hugging Face folder.

The parameters have torchtune's names and Hugging Face's row order. As in transformers, RoPE rotates the halves of a
head; torchtune rotates neighbouring channels. So reading a checkpoint renames its weights and never permutes them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn
from torchtune.modules import TiedLinear, TransformerDecoder
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear

from layerskip_recipes.config.schema import Fraction, PositiveInt, Section, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_config import MLP_MATRICES, HFConfig
from layerskip_recipes.families.reading import read_hf_config
from layerskip_recipes.families.rope import RotaryPositions
from layerskip_recipes.folders.model_folder import base_folder, model_folder
from layerskip_recipes.model.nf4 import scales_per_block


class Lora(Section):
    """LoRA layers (arXiv 2106.09685) in place of linear ones."""

    rank: PositiveInt = 16
    """The rank r of the update B A of a matrix."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / rank."""
    attn_modules: list[Literal["q_proj", "k_proj", "v_proj", "output_proj"]] = Field(["q_proj", "v_proj"])
    """The attention matrices that get an update."""
    apply_lora_to_mlp: bool = True
    """The feed-forward layers get updates too."""
    dropout: Fraction = 0.0
    """Dropout rate of the update's input in training."""
    use_dora: bool = False
    """DoRA (arXiv 2402.09353): the update has a magnitude for each row."""
    quantize_base: bool = False
    """QLoRA (arXiv 2305.14314): the matrices of the layers are stored in NF4."""


def hf_decoder(path: str, max_seq_len: int | None = None, lora: Mapping[str, Any] | None = None) -> TransformerDecoder:
    """A decoder for the model in a Hugging Face folder, without its weights; usable as a `_component_` in YAML.

    Args:
        path: a folder with config.json, a run of layerskip_finetune (its newest checkpoint), or a name on the hub. A
            trained draft or a folder of adapters gives the decoder of its base model.
        max_seq_len: the longest text in tokens; None takes the model's context length.
        lora: the keys of `Lora`; None trains all weights.

    Returns:
        A decoder of torchtune's modules, on torch's default device and in its default dtype.
    """
    folder = base_folder(model_folder(path))
    config = read_hf_config(folder)
    longest, key = config.longest
    check("model.max_seq_len", max_seq_len, Annotated[PositiveInt, Field(examples=[longest])] | None)
    if max_seq_len is not None and max_seq_len > longest:
        raise ConfigError(
            f"model.max_seq_len: {max_seq_len} is more than {key} {longest} in {str(folder / 'config.json')!r}. "
            f"Allowed: 1..{longest}; for example model.max_seq_len={longest}"
        )
    return build_decoder(config, max_seq_len or longest, None if lora is None else Lora.parse(dict(lora), "model.lora"))


def build_decoder(config: HFConfig, max_seq_len: int, lora: Lora | None = None) -> TransformerDecoder:
    """The decoder of a config.json on torch's default device, without its weights."""
    heads, _, head_dim = config.heads
    embedding = config.embedding()
    layers = [
        config.layer(index, positions, max_seq_len, partial(_linear, lora))
        for index, positions in enumerate(config.positions(max_seq_len))
    ]
    tied = config.tie_word_embeddings
    model = TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=heads,
        head_dim=head_dim,
        norm=config.final_norm(),
        output=TiedLinear(embedding) if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False),
    )
    if lora is not None and lora.quantize_base:
        _register_reparametrize_state_dict_hooks(model, dtype=embedding.weight.dtype)
    return model


def _linear(lora: Lora | None, name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
    """A linear layer, with an update if `lora` has one for torchtune's `name`."""
    if lora is None:
        return nn.Linear(inputs, outputs, bias=bias)
    packing = {"scaler_block_size": scales_per_block(outputs, inputs)} if lora.quantize_base else {}
    if name in lora.attn_modules or (name in MLP_MATRICES and lora.apply_lora_to_mlp):
        layer = DoRALinear if lora.use_dora else LoRALinear
        options = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "use_bias": bias}
        return layer(inputs, outputs, quantize_base=lora.quantize_base, **options, **packing)
    if lora.quantize_base:
        return FrozenNF4Linear(inputs, outputs, bias=bias, **packing)
    return nn.Linear(inputs, outputs, bias=bias)


def is_hf_decoder(model: TransformerDecoder) -> bool:
    """Whether a decoder's q and k rows have Hugging Face's order, as `hf_decoder` builds them."""
    return any(isinstance(layer.attn.pos_embeddings, RotaryPositions) for layer in model.layers)
