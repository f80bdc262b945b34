"""Checks of tokens and lengths against a model's vocabulary and context length."""

from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any

import torch
from pydantic import Field
from torchtune.modules import TransformerDecoder

from layerskip_recipes.config.schema import check
from layerskip_recipes.errors import ConfigError


def check_vocabulary(tokenizer: Any, model: TransformerDecoder) -> None:
    """Check that a tokenizer has no more tokens than the model's embedding."""
    vocabulary, tokens = model.tok_embeddings.weight.shape[0], getattr(tokenizer, "vocab_size", 0)
    if getattr(tokenizer, "image_id", None) == tokens - 1:
        tokens -= 1  # the last token of Llama 3's tokenizer is embedded by vision models only
    if tokens > vocabulary:
        raise ConfigError(
            f"tokenizer: its {tokens} tokens do not fit the model's embedding of {vocabulary}. Use the model's own "
            "tokenizer"
        )


def check_batch(tokens: torch.Tensor, model: TransformerDecoder, key: str = "dataset") -> None:
    """Check that the model takes tokens [b, s] of a dataset, which are still on the CPU."""
    check_length(tokens.shape[1], model, key)
    largest, vocabulary = int(tokens.max()), model.tok_embeddings.num_embeddings
    if largest >= vocabulary:
        raise ConfigError(
            f"{key}: a sample has token {largest}, and the model embeds {vocabulary} text tokens. Use a dataset "
            "without images, and the model's own tokenizer"
        )


def check_length(length: int, model: TransformerDecoder, key: str = "dataset") -> None:
    """Check that a sample of `length` tokens fits the model's context."""
    if length > model.max_seq_len:
        raise ConfigError(
            f"{key}: a sample has {length} tokens, more than the model's max_seq_len {model.max_seq_len}; for "
            f"example tokenizer.max_seq_len={model.max_seq_len}"
        )


def most_positions(model: TransformerDecoder) -> tuple[int, str]:
    """The longest sequence, prompt included, that the model decodes with a KV cache; and the name of this limit."""
    # torchtune's Gemma 2 attention places its sliding window by the query's row, which is wrong with a KV cache.
    # Sequences that fit into the window are not affected.
    windows = [getattr(layer.attn, "sliding_window_size", None) for layer in model.layers]
    limits = [(w, "the attention's sliding window") for w in windows if w]
    return min([*limits, (model.max_seq_len, "max_seq_len")])


def check_prompt_lengths(
    model: TransformerDecoder,
    prompt_lengths: Sequence[int],
    max_generated_tokens: int,
    key: str = "max_generated_tokens",
) -> None:
    """Check that no prompt is empty, and that the longest one and the new tokens fit the model's context."""
    check(key, max_generated_tokens, Annotated[int, Field(ge=1, examples=[128])])
    if not prompt_lengths or min(prompt_lengths) == 0:
        raise ConfigError("prompt: it has no token. Allowed: at least one token in each prompt")
    limit, what = most_positions(model)
    longest = max(prompt_lengths)
    room = limit - longest
    if room < 1:
        raise ConfigError(f"prompt: its {longest} tokens leave no room in the model's {limit} ({what})")
    if max_generated_tokens > room:
        raise ConfigError(
            f"{key}: {longest} prompt tokens and {max_generated_tokens} new ones are more than the model's {limit} "
            f"({what}). Allowed here: up to {room}, for example {key}={room}"
        )


def check_prompt_tokens(model: TransformerDecoder, prompts: Sequence[Sequence[int]], key: str = "prompt") -> None:
    """Check that the model embeds each token. On a GPU an unknown token would end the process."""
    known = model.tok_embeddings.num_embeddings
    for token in (token for prompt in prompts for token in prompt):
        if not isinstance(token, Integral) or not 0 <= token < known:
            raise ConfigError(f"{key}: {token} is no token of this model. Allowed: 0..{known - 1}")
