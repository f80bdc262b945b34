"""Qwen 2 and 2.5: biases of queries, keys and values. The last layers can have a window, which a key must turn on."""

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.hf_config import HFConfig


class Qwen2(HFConfig):
    num_key_value_heads: PositiveInt | None = 32
    sliding_window: PositiveInt | None = 4096
    use_sliding_window: bool = False
    max_window_layers: int = 28

    def window(self, layer: int) -> int | None:
        return super().window(layer) if self.use_sliding_window else None

    def slides(self, layer: int) -> bool:
        return layer >= self.max_window_layers

    def has_bias(self, name: str) -> bool:
        return name in ("q_proj", "k_proj", "v_proj")
