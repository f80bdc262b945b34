"""Granite 3 and the dense models of Granite 4: four multipliers; Granite 4 joins two matrices of the MLP."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from layerskip_recipes.families.attention import NormFirstAttention
from layerskip_recipes.families.llama import Llama
from layerskip_recipes.families.multipliers import DividedNorm, Scale, ScaledEmbedding
from layerskip_recipes.families.rope import Positive


class Granite(Llama):
    embedding_multiplier: Positive = 1.0
    attention_multiplier: Positive = 1.0
    residual_multiplier: Positive = 1.0
    logits_scaling: Positive = 1.0

    def embedding(self) -> nn.Embedding:
        return ScaledEmbedding(self.vocab_size, self.hidden_size, self.embedding_multiplier)

    def norm_after(self) -> nn.Module:
        return Scale(self.residual_multiplier)

    def final_norm(self) -> nn.Module:
        return DividedNorm(self.hidden_size, self.rms_norm_eps, self.logits_scaling)

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        return NormFirstAttention(scaling=self.attention_multiplier, **parts)


class GraniteHybrid(Granite):
    """Granite 4 with attention in all layers, and without experts."""

    num_local_experts: int = 8
    position_embedding_type: str | None = None

    LAYER_NAMES: ClassVar[dict[str, str]] = Granite.LAYER_NAMES | {
        "mlp.w1": "shared_mlp.gate_proj",
        "mlp.w2": "shared_mlp.output_linear",
        "mlp.w3": "shared_mlp.up_proj",
    }
    JOINED: ClassVar[dict[str, tuple[str, ...]]] = {"input_linear": ("gate_proj", "up_proj")}

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        return super().values(raw) | {"intermediate_size": raw.get("shared_intermediate_size", 1024)}

    def mistakes(self, raw: Mapping[str, Any]) -> Iterator[str]:
        yield from super().mistakes(raw)
        if self.num_local_experts:
            yield f"num_local_experts: {self.num_local_experts} is not supported. Allowed: 0, a dense model"
        if {*(self.layer_types or ["mamba"])} - {"attention", "full_attention"}:
            yield (
                "layer_types: layers of Mamba are not supported, as their state cannot go back to before a rejected "
                "draft. Allowed: attention in all layers, such as granite-4.0-1b"
            )

    def positions(self, max_seq_len: int) -> list[nn.Module | None]:
        rotates = self.position_embedding_type == "rope"
        return super().positions(max_seq_len) if rotates else [None] * self.num_hidden_layers
