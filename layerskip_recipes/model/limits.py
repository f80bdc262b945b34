"""What a model takes: its vocabulary, its lengths, and the memory of its weights and caches."""

import os
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import is_plain_attention


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


def weight_bytes(
    model: TransformerDecoder, dtype: torch.dtype, kept_layers: int = 0, shards: int = 1, parallel: int = 1
) -> int:
    """The bytes of the weights that each process holds, see `generation/parallel.py`.

    Args:
        model: the decoder, on any device, not yet split.
        dtype: of the weights.
        kept_layers: the layers below it are whole on every process.
        shards: processes over which the others are sharded.
        parallel: processes that share each matrix.
    """
    late = sum(parameter.numel() for parameter in model.layers[kept_layers:].parameters())
    early = sum(parameter.numel() for parameter in model.parameters()) - late
    return (early + late // shards) // parallel * dtype.itemsize


def check_cache_fits(
    model: TransformerDecoder,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    parallel: int = 1,
    weights: int = 0,
) -> None:
    """Raises a ConfigError if weights and caches are larger than memory: what is free on a GPU, all of a CPU's.

    Args:
        model: the decoder, on any device.
        rows: b.
        length: slots of each row: prompt, new tokens, drafts.
        dtype: of the caches.
        device: where they will be.
        parallel: ranks that share each layer's heads.
        weights: bytes that this process will load there, see `weight_bytes`.
    """
    attn = model.layers[0].attn
    heads = attn.num_kv_heads if is_plain_attention(model.layers[0]) else attn.num_heads
    row = 2 * len(model.layers) * heads * attn.head_dim * length * dtype.itemsize // parallel
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    elif "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    left = free - weights
    if rows * row <= left:
        return
    there = f"there are {free / 2**30:.1f}" + (f", of which weights take {weights / 2**30:.1f}" if weights else "")
    takes = f"take {rows * row / 2**30:.1f} GiB, and {there}"
    fits, positions = left // row, left * length // row
    if positions < 1:
        raise ConfigError(
            f"model: its weights take {weights / 2**30:.1f} GiB, and {there}. Allowed here: a model that leaves room "
            "for caches; for example dtype=bf16, a quantizer, or more processes"
        )
    if fits < 1:
        raise ConfigError(
            f"max_new_tokens: the caches of {rows} rows of {length} positions {takes}. Allowed here: up to {positions} "
            "positions (prompt, new tokens and drafts) with batch_size=1; for example a smaller max_new_tokens"
        )
    raise ConfigError(
        f"batch_size: the caches of {rows} rows of {length} positions {takes}. Allowed here: up to {fits}; for example "
        f"batch_size={fits}"
    )
