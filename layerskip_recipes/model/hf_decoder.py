"""hf_decoder: a torchtune decoder of the model in a Hugging Face folder, built from its config.json.

The parameters have torchtune's names, and their rows have Hugging Face's order: positions are rotated as transformers
does it (halves of a head, not neighbours), so that a checkpoint is renamed only, never permuted.
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

from layerskip_recipes.config.schema import Fraction, PositiveInt, Section
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.hf_config import HFConfig, Rope, read_hf_config, rotary_width
from layerskip_recipes.model.hf_folder import model_folder
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
    """The matrices of attention that have an update."""
    apply_lora_to_mlp: bool = True
    """The feed-forward layers have updates too."""
    dropout: Fraction = 0.0
    """Of the update's input, in training."""
    use_dora: bool = False
    """DoRA (arXiv 2402.09353): the update has a magnitude for each row."""
    quantize_base: bool = False
    """QLoRA (arXiv 2305.14314): the matrices of the layers are kept in NF4."""


def hf_decoder(path: str, max_seq_len: int | None = None, lora: Mapping[str, Any] | None = None) -> TransformerDecoder:
    """The decoder of a Hugging Face folder, without its weights; usable as a `_component_` in YAML.

    Args:
        path: a folder with config.json, a run of layerskip_finetune (its newest checkpoint), or a name on the hub.
        max_seq_len: the longest text in tokens; None takes what the model was made for.
        lora: the keys of `Lora`; None trains the weights themselves.

    Returns:
        A decoder of torchtune's modules, on torch's default device and in its default dtype.

    Raises:
        ConfigError: if the folder is none, its model is not supported, or max_seq_len is longer than it allows.
    """
    folder = model_folder(path)
    config = read_hf_config(folder)
    longest, key = config.longest
    if max_seq_len is not None and max_seq_len > longest:
        raise ConfigError(
            f"model.max_seq_len: {max_seq_len} is more than {key} {longest} in {str(folder / 'config.json')!r}. "
            f"Allowed: 1..{longest}; for example model.max_seq_len={longest}"
        )
    return build_decoder(config, max_seq_len or longest, None if lora is None else Lora.parse(dict(lora), "model.lora"))


def build_decoder(config: HFConfig, max_seq_len: int, lora: Lora | None = None) -> TransformerDecoder:
    """The decoder of a config, for texts of up to max_seq_len tokens."""
    heads, _, head_dim = config.heads
    embed = GemmaNormEmbeddings if config.is_gemma else nn.Embedding
    embedding = embed(config.vocab_size, config.hidden_size)
    positions = RotaryPositions(rotary_width(config), max_seq_len, config.rope, config.max_position_embeddings)
    layers = [_layer(config, layer, positions, max_seq_len, lora) for layer in range(config.num_hidden_layers)]
    cap = config.final_logit_softcapping
    model = TransformerDecoder(
        tok_embeddings=embedding,
        layers=nn.ModuleList(layers),
        max_seq_len=max_seq_len,
        num_heads=heads,
        head_dim=head_dim,
        norm=_norm(config) if cap is None else Gemma2FinalNorm(cap, config.hidden_size, eps=config.rms_norm_eps),
        output=TiedLinear(embedding)
        if config.tie_word_embeddings
        else nn.Linear(config.hidden_size, config.vocab_size, bias=False),
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
    attention: Any = Gemma2Attention if gemma2 else NormFirstAttention if config.norms_queries else MultiHeadAttention
    extra: dict[str, Any] = {}
    if gemma2:
        extra = {
            "sliding_window_size": config.window(layer),
            "softcapping": config.attn_logit_softcapping,
            "query_pre_attn_scalar": config.query_pre_attn_scalar,
        }
    if config.norms_queries:
        extra = {name: RMSNorm(head_dim, eps=config.rms_norm_eps) for name in ("q_norm", "k_norm")}

    def linear(name: str, inputs: int, outputs: int) -> nn.Module:
        return _linear(name, inputs, outputs, config.has_bias(name), lora)

    return TransformerSelfAttentionLayer(
        attn=attention(
            embed_dim=heads
            * head_dim,  # torchtune's attention asks for a multiple of heads, which the width need not be
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
    """A linear layer, with an update if `lora` wants one there; `name` is torchtune's."""
    if lora is None:
        return nn.Linear(inputs, outputs, bias=bias)
    packing = {"scaler_block_size": scales_per_block(outputs, inputs)} if lora.quantize_base else {}
    if name in lora.attn_modules or (name in ("w1", "w2", "w3") and lora.apply_lora_to_mlp):
        kind = DoRALinear if lora.use_dora else LoRALinear
        return kind(
            inputs,
            outputs,
            rank=lora.rank,
            alpha=lora.alpha,
            dropout=lora.dropout,
            use_bias=bias,
            quantize_base=lora.quantize_base,
            **packing,
        )
    if lora.quantize_base:
        return FrozenNF4Linear(inputs, outputs, bias=bias, **packing)
    return nn.Linear(inputs, outputs, bias=bias)


def is_hf_decoder(model: TransformerDecoder) -> bool:
    """Whether a decoder has the order of heads' rows of Hugging Face's files, as `hf_decoder` builds it."""
    return any(isinstance(layer.attn.pos_embeddings, RotaryPositions) for layer in model.layers)


class RotaryPositions(nn.Module):
    """Rotary positions (arXiv 2104.09864) as transformers applies them: channel i of a head turns with i + dim / 2.

    Args:
        dim: channels of each head that turn; those behind them stay.
    """

    def __init__(self, dim: int, max_seq_len: int, rope: Rope, max_positions: int) -> None:
        super().__init__()
        self.dim, self.max_seq_len, self.rope, self.max_positions = dim, max_seq_len, rope, max_positions
        self.rope_init()

    def rope_init(self) -> None:
        """Make the tables [max_seq_len, dim / 2], on torch's default device; they are in no checkpoint."""
        angles = torch.outer(torch.arange(self.max_seq_len).float(), self.rope.frequencies(self.dim))
        scale = self.rope.scale(self.max_positions)
        self.register_buffer("cos", angles.cos() * scale, persistent=False)
        self.register_buffer("sin", angles.sin() * scale, persistent=False)

    @property
    def tables(self) -> tuple[Any, Any]:
        """Cosines and sines, [max_seq_len, dim / 2]."""
        return self.cos, self.sin

    def forward(self, x: torch.Tensor, input_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Rotate queries or keys [b, s, heads, head_dim]; input_pos [b or 1, s], None for the positions 0 .. s-1."""
        at = slice(0, x.shape[1]) if input_pos is None else input_pos
        cos, sin = (table[at].to(x.dtype).unsqueeze(-2) for table in self.tables)
        first, second = x[..., : self.dim].chunk(2, dim=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return torch.cat([*turned, x[..., self.dim :]] if self.dim < x.shape[-1] else turned, dim=-1)


class NormFirstAttention(MultiHeadAttention):
    """Attention with queries and keys normalised before they are rotated, as in Qwen3; torchtune's does it after."""

    def forward(
        self,
        x: torch.Tensor,
        y: torch.Tensor | None = None,
        *,
        mask: Any = None,
        input_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Self-attention of x [b, s, d]; y is x, and the rest as in torchtune's `MultiHeadAttention`."""

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, self.head_dim))  # [b, s, heads, head_dim]

        q, k = self.q_norm(heads(self.q_proj(x))), self.k_norm(heads(self.k_proj(x)))
        v = heads(self.v_proj(x)).transpose(1, 2)
        if self.pos_embeddings is not None:
            q, k = self.pos_embeddings(q, input_pos=input_pos), self.pos_embeddings(k, input_pos=input_pos)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        if self.num_heads != self.num_kv_heads:
            k, v = (t.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for t in (k, v))
        attended = self._attention_call(
            q,
            k,
            v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=self.kv_cache is None and mask is None and self.is_causal,
        )
        return self.output_proj(attended.transpose(1, 2).flatten(-2))
