"""Mistral 7B and newer dense models of its makers."""

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.hf_config import HFConfig


class Mistral(HFConfig):
    max_position_embeddings: PositiveInt = 131072
    num_key_value_heads: PositiveInt | None = 8
    sliding_window: PositiveInt | None = 4096
