"""Short import path for configs; the code is in data/standard_library.py."""

from layerskip_recipes.data.standard_library import StdlibDataset, heldout_prompts, stdlib_texts, stdlib_tokenizer

__all__ = ["StdlibDataset", "heldout_prompts", "stdlib_texts", "stdlib_tokenizer"]
