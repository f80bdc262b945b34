"""Generation over token ids: autoregressive, early exit, and self-speculative decoding. Knows nothing of text."""

from layerskip_recipes.generation.api import GenerationOutput, generate
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.generation.speculation import Speculation
from layerskip_recipes.generation.stats import GenerationStats, is_looping

__all__ = ["Generation", "GenerationOutput", "GenerationStats", "Speculation", "generate", "is_looping"]
