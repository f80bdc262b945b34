"""LayerSkip (arXiv 2404.16710) for torchtune: train for early exit, then decode with self-speculation."""

from layerskip_recipes import defaults
from layerskip_recipes.checkpoint.hf_checkpointer import hf_checkpointer
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.generation.api import generate
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.engine import Generation
from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
from layerskip_recipes.model.hf_decoder import hf_decoder
from layerskip_recipes.model.layer_dropout import dropout_rates, schedule_scale
from layerskip_recipes.training.early_exit import EarlyExitLoss, enabled_exits, exit_weights

__all__ = [
    "EarlyExitLoss",
    "Generation",
    "LayerSkipDecoder",
    "Speculation",
    "dropout_rates",
    "enabled_exits",
    "exit_weights",
    "generate",
    "hf_checkpointer",
    "hf_decoder",
    "hf_tokenizer",
    "layerskip_decoder",
    "schedule_scale",
]

defaults.register()
