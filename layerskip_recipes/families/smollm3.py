"""SmolLM3: every fourth layer has no rotary positions, and only such layers can have a window."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from layerskip_recipes.config.schema import PositiveInt
from layerskip_recipes.families.llama import Llama


class SmolLM3(Llama):
    max_position_embeddings: PositiveInt = 32768
    num_key_value_heads: PositiveInt | None = 4
    tie_word_embeddings: bool = True
    use_sliding_window: bool = False
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: PositiveInt = 4

    @classmethod
    def rope_values(cls, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {"rope_theta": 2e6} | super().rope_values(raw)

    def mistakes(self, raw: Mapping[str, Any]) -> Iterator[str]:
        yield from super().mistakes(raw)
        yield from self.not_one_per_layer("no_rope_layers")

    def has_positions(self, layer: int) -> bool:
        """Whether a layer rotates queries and keys; the list's name notwithstanding, its ones mean that it does."""
        if self.no_rope_layers is not None:
            return bool(self.no_rope_layers[layer])
        return (layer + 1) % self.no_rope_layer_interval != 0

    def positions(self, max_seq_len: int) -> list[nn.Module | None]:
        rotations = enumerate(super().positions(max_seq_len))
        return [rotation if self.has_positions(layer) else None for layer, rotation in rotations]

    def window(self, layer: int) -> int | None:
        return super().window(layer) if self.use_sliding_window else None

    def slides(self, layer: int) -> bool:
        return not self.has_positions(layer)
