"""LFM2 and LFM2.5: most layers have a short convolution, the others attention like Qwen 3's."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn
from torchtune.modules import RMSNorm, TransformerSelfAttentionLayer

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.attention import NormFirstAttention
from layerskip_recipes.families.hf_config import HFConfig, Linear
from layerskip_recipes.model.short_convolution import ShortConvolution


class LFM2(HFConfig):
    max_position_embeddings: PositiveInt = 128000
    num_key_value_heads: PositiveInt | None = 8
    tie_word_embeddings: bool = True
    kernel: PositiveInt = 3
    full_attn_idxs: list[int] | None = None

    IN_TRANSFORMERS_LOOP: ClassVar[bool] = False  # there a convolution keeps its last products only
    UNSUPPORTED: ClassVar[tuple[str, ...]] = (*HFConfig.UNSUPPORTED, "conv_bias")
    LAYER_NAMES: ClassVar[dict[str, str]] = {
        "attn.in_proj": "conv.in_proj",
        "attn.conv": "conv.conv",
        "attn.out_proj": "conv.out_proj",
        "attn.output_proj": "self_attn.out_proj",
        "attn.q_norm.scale": "self_attn.q_layernorm.weight",
        "attn.k_norm.scale": "self_attn.k_layernorm.weight",
        "attn": "self_attn",
        "sa_norm.scale": "operator_norm.weight",
        "mlp_norm.scale": "ffn_norm.weight",
        "mlp": "feed_forward",
    }
    OUTER_NAMES: ClassVar[dict[str, str]] = HFConfig.OUTER_NAMES | {"norm.scale": "model.embedding_norm.weight"}

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        values = super().values(raw) | {"rms_norm_eps": raw.get("norm_eps", 1e-5)}
        names = {
            "tie_embedding": "tie_word_embeddings",
            "block_ff_dim": "intermediate_size",
            "conv_L_cache": "kernel",
        }
        values |= {name: raw[key] for key, name in names.items() if key in raw}
        inner, multiple = values.get("intermediate_size", 12288), raw.get("block_multiple_of", 256)
        if raw.get("block_auto_adjust_ff_dim", True):
            inner = int(2 * inner / 3)
            if (factor := raw.get("block_ffn_dim_multiplier", 1.0)) is not None:
                inner = -(-int(factor * inner) // multiple) * multiple
        return values | {"intermediate_size": inner, "hidden_act": "silu"}

    @classmethod
    def rope_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope_theta": 1e6} | super().rope_values(raw)

    def mistakes(self, raw: Mapping[str, Any]) -> Iterator[str]:
        yield from super().mistakes(raw)
        if self.hidden_size % 2:
            yield f"hidden_size: {self.hidden_size} is not supported. Allowed: an even number"

    def has_attention(self, layer: int) -> bool:
        if self.layer_types is not None:
            return self.layer_types[layer] != "conv"
        return self.full_attn_idxs is None or layer in self.full_attn_idxs

    def layer(self, index: int, positions: nn.Module | None, max_seq_len: int, linear: Linear) -> nn.Module:
        layer = super().layer(index, positions, max_seq_len, linear)
        if self.has_attention(index):
            return layer
        width = self.hidden_size
        convolution = ShortConvolution(
            linear("in_proj", width, 3 * width, False),
            linear("out_proj", width, width, False),
            width,
            self.kernel,
        )
        return TransformerSelfAttentionLayer(
            attn=convolution, mlp=layer.mlp, sa_norm=layer.sa_norm, mlp_norm=layer.mlp_norm
        )

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        q_norm, k_norm = (RMSNorm(self.heads[2], eps=self.rms_norm_eps) for _ in range(2))
        return NormFirstAttention(q_norm=q_norm, k_norm=k_norm, **parts)
