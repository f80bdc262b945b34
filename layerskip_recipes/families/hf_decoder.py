"""hf_decoder: builds a torchtune decoder from the config.json of a Hugging Face folder.

The parameters have torchtune's names and Hugging Face's row order. As in transformers, RoPE rotates the halves of a
head; torchtune rotates neighbouring channels. So reading a checkpoint renames its weights and never permutes them.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.common_utils import _register_reparametrize_state_dict_hooks
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear

from layerskip_recipes.config.schema import Fraction, PositiveInt, Section, check
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_config import HFConfig, Rope, read_hf_config, rotary_width
from layerskip_recipes.folders.model_folder import base_folder, model_folder
from layerskip_recipes.model.nf4 import scales_per_block

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
}


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
    heads, _, head_dim = config.heads
    embedding = (GemmaNormEmbeddings if config.is_gemma else nn.Embedding)(config.vocab_size, config.hidden_size)
    positions = RotaryPositions(rotary_width(config), max_seq_len, config.rope, config.max_position_embeddings)
    layers = [_layer(config, layer, positions, max_seq_len, lora) for layer in range(config.num_hidden_layers)]
    cap = config.final_logit_softcapping
    tied = config.tie_word_embeddings
    model = TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=heads,
        head_dim=head_dim,
        norm=_norm(config) if cap is None else Gemma2FinalNorm(cap, config.hidden_size, eps=config.rms_norm_eps),
        output=TiedLinear(embedding) if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False),
    )
    if lora is not None and lora.quantize_base:
        _register_reparametrize_state_dict_hooks(model, dtype=embedding.weight.dtype)
    return model


def _layer(
    config: HFConfig, layer: int, positions: nn.Module, max_seq_len: int, lora: Lora | None
) -> TransformerSelfAttentionLayer:
    heads, key_heads, head_dim = config.heads
    width, inner = config.hidden_size, config.intermediate_size
    gemma2 = config.architecture == "Gemma2ForCausalLM"
    # The family's attention.
    attention: Any = MultiHeadAttention
    extra: dict[str, Any] = {}
    if gemma2:
        attention = Gemma2Attention
        extra = {
            "sliding_window_size": config.window(layer),
            "softcapping": config.attn_logit_softcapping,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
        }
    if config.architecture == "Qwen3ForCausalLM":
        attention = NormFirstAttention
        extra = {name: RMSNorm(head_dim, eps=config.rms_norm_eps) for name in ("q_norm", "k_norm")}

    def linear(name: str, inputs: int, outputs: int) -> nn.Module:
        return _linear(name, inputs, outputs, config.has_bias(name), lora)

    return TransformerSelfAttentionLayer(
        attn=attention(
            embed_dim=heads * head_dim,  # torchtune requires a multiple of heads, which the model's width need not be
            num_heads=heads,
            num_kv_heads=key_heads,
            head_dim=head_dim,
            q_proj=linear("q_proj", width, heads * head_dim),
            k_proj=linear("k_proj", width, key_heads * head_dim),
            v_proj=linear("v_proj", width, key_heads * head_dim),
            output_proj=linear("output_proj", heads * head_dim, width),
            pos_embeddings=positions if config.has_positions(layer) else None,
            max_seq_len=max_seq_len,
            attn_dropout=config.attention_dropout,
            **extra,
        ),
        mlp=FeedForward(
            gate_proj=linear("w1", width, inner),
            down_proj=linear("w2", inner, width),
            up_proj=linear("w3", width, inner),
            activation=ACTIVATIONS[config.hidden_act](),
        ),
        sa_norm=_norm(config),
        mlp_norm=_norm(config),
        sa_scale=_norm(config) if gemma2 else None,
        mlp_scale=_norm(config) if gemma2 else None,
    )


def _norm(config: HFConfig) -> nn.Module:
    return (GemmaRMSNorm if config.is_gemma else RMSNorm)(config.hidden_size, eps=config.rms_norm_eps)


def _linear(name: str, inputs: int, outputs: int, bias: bool, lora: Lora | None) -> nn.Module:
    """A linear layer, with an update if `lora` has one for torchtune's `name`."""
    if lora is None:
        return nn.Linear(inputs, outputs, bias=bias)
    packing = {"scaler_block_size": scales_per_block(outputs, inputs)} if lora.quantize_base else {}
    if name in lora.attn_modules or (name in ("w1", "w2", "w3") and lora.apply_lora_to_mlp):
        kind = DoRALinear if lora.use_dora else LoRALinear
        options = {"rank": lora.rank, "alpha": lora.alpha, "dropout": lora.dropout, "use_bias": bias}
        return kind(inputs, outputs, quantize_base=lora.quantize_base, **options, **packing)
    if lora.quantize_base:
        return FrozenNF4Linear(inputs, outputs, bias=bias, **packing)
    return nn.Linear(inputs, outputs, bias=bias)


def is_hf_decoder(model: TransformerDecoder) -> bool:
    """Whether a decoder's q and k rows have Hugging Face's order, as `hf_decoder` builds them."""
    return any(isinstance(layer.attn.pos_embeddings, RotaryPositions) for layer in model.layers)


class RotaryPositions(nn.Module):
    """RoPE (arXiv 2104.09864) as in transformers: rotates channels i and i + dim / 2 of a head, i < dim / 2.

    Channels from `dim` on are not rotated.
    """

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, dim: int, max_seq_len: int, rope: Rope, max_positions: int) -> None:
        super().__init__()
        self.dim, self.max_seq_len, self.rope, self.max_positions = dim, max_seq_len, rope, max_positions
        self.rope_init()

    def rope_init(self) -> None:
        """Compute the tables [max_seq_len, dim / 2] on torch's default device; checkpoints do not contain them."""
        angles = torch.outer(torch.arange(self.max_seq_len).float(), self.rope.frequencies(self.dim))
        scale = self.rope.scale(self.max_positions)
        self.register_buffer("cos", angles.cos() * scale, persistent=False)
        self.register_buffer("sin", angles.sin() * scale, persistent=False)

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate queries or keys [b, s, heads, head_dim]; input_pos is [b or 1, s], or None for 0 .. s-1.

        torchtune's `generate` drops a dimension of size 1, so input_pos may also be [s], or [b] if s is 1.
        """
        at = slice(0, x.shape[1]) if input_pos is None else input_pos.view(-1, x.shape[1])
        cos, sin = (table[at].to(x.dtype).unsqueeze(-2) for table in (self.cos, self.sin))
        first, second = x[..., : self.dim].chunk(2, dim=-1)
        rotated = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*rotated, x[..., self.dim :]] if self.dim < x.shape[-1] else rotated, dim=-1)


class NormFirstAttention(MultiHeadAttention):
    """Attention that normalises queries and keys before the rotation, as in Qwen3; torchtune does so after it."""

    def forward(
        self, x: torch.Tensor, y: torch.Tensor | None = None, *, mask: Any = None, input_pos: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Self-attention of x [b, s, d]; y is x, and the other arguments are as in `MultiHeadAttention`."""
        # Project, normalise and rotate: [b, s, heads, head_dim].
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if self.pos_embeddings is not None:
            q, k = self.pos_embeddings(q, input_pos=input_pos), self.pos_embeddings(k, input_pos=input_pos)
        # Attend, with the KV cache: [b, heads, s, head_dim].
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        if self.num_heads != self.num_kv_heads:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        dropout = self.attn_dropout if self.training else 0.0
        causal = self.kv_cache is None and mask is None and self.is_causal
        attended = self._attention_call(q, k, v, mask=mask, dropout_p=dropout, is_causal=causal)
        return self.output_proj(attended.transpose(1, 2).flatten(-2))
