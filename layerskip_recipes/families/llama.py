"""Llama 2 to 3.3, and models of the same architecture, such as SmolLM2 and DeepSeek's distillations."""

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.hf_config import MLP_MATRICES, HFConfig


class Llama(HFConfig):
    max_position_embeddings: PositiveInt = 2048
    attention_bias: bool = False
    mlp_bias: bool = False

    def has_bias(self, name: str) -> bool:
        return self.mlp_bias if name in MLP_MATRICES else self.attention_bias
