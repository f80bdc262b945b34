"""EXAONE 4: OLMo 2's norms around the parts of a layer, norms of each head, and windows in the larger model."""

from typing import Any, ClassVar

from torch import nn
from torchtune.modules import RMSNorm

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.attention import NormFirstAttention
from layerskip_recipes.families.olmo2 import Olmo2


class Exaone4(Olmo2):
    num_key_value_heads: PositiveInt | None = 32
    sliding_window: PositiveInt | None = 4096

    BUILDS_WINDOWS: ClassVar[bool] = True

    def positions(self, max_seq_len: int) -> list[nn.Module | None]:
        """With windows, only the layers that have one rotate queries and keys."""
        rotations = enumerate(super().positions(max_seq_len))
        return [
            rotation if self.sliding_window is None or self.window(layer) else None for layer, rotation in rotations
        ]

    def slides(self, layer: int) -> bool:
        return (layer + 1) % 4 != 0

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        q_norm, k_norm = (RMSNorm(self.heads[2], eps=self.rms_norm_eps) for _ in range(2))
        return NormFirstAttention(q_norm=q_norm, k_norm=k_norm, window=self.window(layer), **parts)
