"""LayerSkip (arXiv 2404.16710) for torchtune: train for early exit, then decode with self-speculation."""

from layerskip_recipes.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.early_exit import EarlyExitLoss
from layerskip_recipes.generation import Generation, Speculation, generate
from layerskip_recipes.tokenizer import hf_tokenizer

__all__ = [
    "EarlyExitLoss",
    "Generation",
    "LayerSkipDecoder",
    "Speculation",
    "generate",
    "hf_tokenizer",
    "layerskip_decoder",
]
