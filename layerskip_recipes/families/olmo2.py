"""OLMo 2: norms only behind attention and MLP, and norms over all heads of queries and keys."""

from typing import Any, ClassVar

from torch import nn

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.attention import NormFirstAttention, NormOfAllHeads
from layerskip_recipes.families.hf_config import MLP_MATRICES, HFConfig
from layerskip_recipes.families.rope import Positive


class Olmo2(HFConfig):
    max_position_embeddings: PositiveInt = 2048
    rms_norm_eps: Positive = 1e-5
    attention_bias: bool = False

    LAYER_NAMES: ClassVar[dict[str, str]] = HFConfig.LAYER_NAMES | {
        "sa_scale.scale": "post_attention_layernorm.weight",
        "mlp_scale.scale": "post_feedforward_layernorm.weight",
    }

    def has_bias(self, name: str) -> bool:
        return self.attention_bias and name not in MLP_MATRICES

    def norm_before(self) -> nn.Module | None:
        return None

    def norm_after(self) -> nn.Module:
        return self.norm()

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        heads, key_heads, head_dim = self.heads
        q_norm, k_norm = (NormOfAllHeads(count * head_dim, eps=self.rms_norm_eps) for count in (heads, key_heads))
        return NormFirstAttention(q_norm=q_norm, k_norm=k_norm, window=self.window(layer), **parts)
