"""The quickstart's data by the path that configs name; the code is data/standard_library.py."""

from layerskip_recipes.data.standard_library import StdlibDataset, heldout_prompts, stdlib_texts, stdlib_tokenizer

__all__ = ["StdlibDataset", "heldout_prompts", "stdlib_texts", "stdlib_tokenizer"]
