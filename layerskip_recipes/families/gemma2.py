"""Gemma 2: norms after attention and MLP too, caps of logits, a scale of its own, a window in every second layer."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.gemma import Gemma
from layerskip_recipes.families.rope import Positive


class Gemma2(Gemma):
    num_key_value_heads: PositiveInt | None = 4
    sliding_window: PositiveInt | None = 4096
    query_pre_attn_scalar: Positive | None = 256.0
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0

    BUILDS_WINDOWS: ClassVar[bool] = True
    LAYER_NAMES: ClassVar[dict[str, str]] = Gemma.LAYER_NAMES | {
        "sa_scale.scale": "post_attention_layernorm.weight",
        "mlp_norm.scale": "pre_feedforward_layernorm.weight",
        "mlp_scale.scale": "post_feedforward_layernorm.weight",
    }

    OUTER_NAMES: ClassVar[dict[str, str]] = Gemma.OUTER_NAMES | {"norm.rms_norm.scale": "model.norm.weight"}

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        # transformers reads another key than for Gemma 1.
        return super().values(raw) | {"hidden_act": raw.get("hidden_activation") or "gelu_pytorch_tanh"}

    def slides(self, layer: int) -> bool:
        return layer % 2 == 0

    def norm_after(self) -> nn.Module:
        return self.norm()

    def final_norm(self) -> nn.Module:
        """torchtune's norm with the cap, which `LayerSkipDecoder` applies to the logits (model/head.py)."""
        cap = self.final_logit_softcapping
        return self.norm() if cap is None else Gemma2FinalNorm(cap, self.hidden_size, eps=self.rms_norm_eps)

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        return Gemma2Attention(
            **parts,
            sliding_window_size=self.window(layer),
            softcapping=self.attn_logit_softcapping,
            query_pre_attn_scalar=self.query_pre_attn_scalar,
        )
