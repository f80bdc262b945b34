"""Qwen 3: Qwen 2's windows, and norms of each head's queries and keys before the rotation instead of biases."""

from typing import Any

from torch import nn
from torchtune.modules import RMSNorm

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.attention import NormFirstAttention
from layerskip_recipes.families.hf_config import MLP_MATRICES
from layerskip_recipes.families.qwen2 import Qwen2


class Qwen3(Qwen2):
    head_dim: PositiveInt | None = 128
    attention_bias: bool = False

    def has_bias(self, name: str) -> bool:
        return self.attention_bias and name not in MLP_MATRICES

    def attention(self, layer: int, **parts: Any) -> nn.Module:
        q_norm, k_norm = (RMSNorm(self.heads[2], eps=self.rms_norm_eps) for _ in range(2))
        return NormFirstAttention(q_norm=q_norm, k_norm=k_norm, **parts)
