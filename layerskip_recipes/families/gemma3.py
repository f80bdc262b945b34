"""Gemma 3's text models: norms of heads, a window in five of six layers, and other positions in those layers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torchtune.models.gemma.rms_norm import GemmaRMSNorm

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.attention import NormFirstAttention
from layerskip_recipes.families.gemma2 import Gemma2
from layerskip_recipes.families.rope import Positive


class Gemma3(Gemma2):
    # The folders of larger models name few values, and no vocab_size.
    vocab_size: PositiveInt = 262208
    hidden_size: PositiveInt = 2304
    intermediate_size: PositiveInt = 9216
    num_hidden_layers: PositiveInt = 26
    num_attention_heads: PositiveInt = 8
    max_position_embeddings: PositiveInt = 131072
    final_logit_softcapping: Positive | None = None
    sliding_window_pattern: PositiveInt = 6

    UNSUPPORTED: ClassVar[tuple[str, ...]] = (*Gemma2.UNSUPPORTED, "attn_logit_softcapping")

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        values = super().values(raw)
        base = raw.get("rope_local_base_freq") or 10_000.0
        return values | {"sliding_rope": {"rope_theta": base} | (values["sliding_rope"] or {})}

    @classmethod
    def rope_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope_theta": 1e6} | super().rope_values(raw)

    def slides(self, layer: int) -> bool:
        return (layer + 1) % self.sliding_window_pattern != 0

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        q_norm, k_norm = (GemmaRMSNorm(self.heads[2], eps=self.rms_norm_eps) for _ in range(2))
        scaling = None if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar**-0.5
        return NormFirstAttention(q_norm=q_norm, k_norm=k_norm, scaling=scaling, window=self.window(layer), **parts)
