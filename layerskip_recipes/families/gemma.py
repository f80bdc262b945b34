"""Gemma 1: embeddings are multiplied by the root of the width, and norms multiply by 1 + weight."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.hf_config import MLP_MATRICES, Activation, HFConfig


class Gemma(HFConfig):
    max_position_embeddings: PositiveInt = 8192
    num_key_value_heads: PositiveInt | None = 16
    head_dim: PositiveInt | None = 256
    hidden_act: Activation = "gelu_pytorch_tanh"
    tie_word_embeddings: bool = True
    attention_bias: bool = False

    @classmethod
    def values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        values = super().values(raw)
        if values.get("hidden_act") == "gelu":
            values["hidden_act"] = "gelu_pytorch_tanh"  # as transformers does for the first releases
        return values

    def embedding(self) -> nn.Embedding:
        return GemmaNormEmbeddings(self.vocab_size, self.hidden_size)

    def norm(self) -> nn.Module:
        return GemmaRMSNorm(self.hidden_size, eps=self.rms_norm_eps)

    def has_bias(self, name: str) -> bool:
        return self.attention_bias and name not in MLP_MATRICES
