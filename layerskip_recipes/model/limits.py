"""What a model takes: its vocabulary and its lengths."""

from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any

import torch
from pydantic import Field
from torchtune.modules import TransformerCrossAttentionLayer, TransformerDecoder
from torchtune.modules.model_fusion import FusionLayer

from layerskip_recipes.config.schema import check
from layerskip_recipes.errors import ConfigError


def check_vocabulary(tokenizer: Any, model: TransformerDecoder) -> None:
    """Raises a ConfigError if a tokenizer has more tokens than the model's embedding."""
    vocabulary, tokens = model.tok_embeddings.weight.shape[0], getattr(tokenizer, "vocab_size", 0)
    if getattr(tokenizer, "image_id", None) == tokens - 1:
        tokens -= 1  # Llama 3's has a last token that only models of images embed
    if tokens > vocabulary:
        raise ConfigError(
            f"tokenizer: its {tokens} tokens do not fit the model's embedding of {vocabulary}. Take the model's own "
            "tokenizer"
        )


def check_batch(tokens: torch.Tensor, model: TransformerDecoder, key: str = "dataset") -> None:
    """Raises a ConfigError if tokens [b, s] of a dataset, still on the CPU, are more or others than the model takes."""
    check_length(tokens.shape[1], model, key)
    largest, vocabulary = int(tokens.max()), model.tok_embeddings.num_embeddings
    if largest >= vocabulary:
        raise ConfigError(
            f"{key}: a sample has token {largest}, and the model embeds {vocabulary}, of text only. Take a dataset "
            "without images, and the model's own tokenizer"
        )


def check_length(length: int, model: TransformerDecoder, key: str = "dataset") -> None:
    """Raises a ConfigError if a sample of a dataset is longer than the model takes."""
    if length > model.max_seq_len:
        raise ConfigError(
            f"{key}: a sample has {length} tokens, more than the model's max_seq_len {model.max_seq_len}; for "
            f"example tokenizer.max_seq_len={model.max_seq_len}"
        )


def most_positions(model: TransformerDecoder) -> tuple[int, str]:
    """How many positions of text and new tokens a model decodes with a cache, and what limits them."""
    # torchtune's gemma2 attention places its sliding window by the query's row, which is wrong with a cache: up to
    # the window's size nothing is cut, so there it does no harm.
    windows = [getattr(layer.attn, "sliding_window_size", None) for layer in model.layers]
    limits = [(w, "the attention's sliding window") for w in windows if w]
    return min([*limits, (model.max_seq_len, "max_seq_len")])


def check_prompt_lengths(
    model: TransformerDecoder,
    prompt_lengths: Sequence[int],
    max_generated_tokens: int,
    key: str = "max_generated_tokens",
) -> None:
    """Raises a ConfigError unless each prompt has a token and fits the model together with the new tokens."""
    check(key, max_generated_tokens, Annotated[int, Field(ge=1, examples=[128])])
    if not prompt_lengths or min(prompt_lengths) == 0:
        raise ConfigError("prompt: it has no token. Allowed: at least one token in each prompt")
    if any(isinstance(module, FusionLayer | TransformerCrossAttentionLayer) for module in model.modules()):
        raise ConfigError("model: generation supports decoders of self-attention layers only, no fusion layers")
    limit, what = most_positions(model)
    longest = max(prompt_lengths)
    if longest + 1 > limit:
        raise ConfigError(f"prompt: its {longest} tokens leave no room in the model's {limit} ({what})")
    if longest + max_generated_tokens > limit:
        raise ConfigError(
            f"{key}: a prompt of {longest} tokens and {max_generated_tokens} new ones make "
            f"{longest + max_generated_tokens}, more than the model's {limit} ({what}). Allowed here: up to "
            f"{limit - longest}, for example {key}={limit - longest}"
        )


def check_prompt_tokens(model: TransformerDecoder, prompts: Sequence[Sequence[int]]) -> None:
    """Raises a ConfigError for a token that the model does not know: on a GPU it would end the process."""
    known = model.tok_embeddings.num_embeddings
    for token in (token for prompt in prompts for token in prompt):
        if not isinstance(token, Integral) or not 0 <= token < known:
            raise ConfigError(f"prompt: {token} is no token of this model. Allowed: 0..{known - 1}")
