"""LayerSkip (arXiv 2404.16710) for torchtune: train for early exit, then decode with self-speculation."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip_recipes.checkpoint.hf_checkpointer import hf_checkpointer
    from layerskip_recipes.data.tokenizer import hf_tokenizer
    from layerskip_recipes.families.hf_decoder import hf_decoder
    from layerskip_recipes.generation.api import generate
    from layerskip_recipes.generation.drafting.speculation import Speculation
    from layerskip_recipes.generation.engine import Generation
    from layerskip_recipes.generation.llm import LLM
    from layerskip_recipes.model.decoder import LayerSkipDecoder, layerskip_decoder
    from layerskip_recipes.model.layer_dropout import dropout_rates, schedule_scale
    from layerskip_recipes.training.early_exit import EarlyExitLoss, enabled_exits, exit_weights

__all__ = [
    "LLM",
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

# Modules are imported at first use: torch takes seconds to import, and `layerskip ls` does not need it.
_MODULES = {
    "checkpoint.hf_checkpointer": ("hf_checkpointer",),
    "data.tokenizer": ("hf_tokenizer",),
    "families.hf_decoder": ("hf_decoder",),
    "generation.api": ("generate",),
    "generation.drafting.speculation": ("Speculation",),
    "generation.engine": ("Generation",),
    "generation.llm": ("LLM",),
    "model.decoder": ("LayerSkipDecoder", "layerskip_decoder"),
    "model.layer_dropout": ("dropout_rates", "schedule_scale"),
    "training.early_exit": ("EarlyExitLoss", "enabled_exits", "exit_weights"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
