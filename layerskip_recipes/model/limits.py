"""What a model takes: its vocabulary, its lengths, and the memory of its weights and caches."""

import os
from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any

import torch
from pydantic import Field
from torchtune.modules import TransformerCrossAttentionLayer, TransformerDecoder
from torchtune.modules.model_fusion import FusionLayer

from layerskip_recipes.config.schema import check
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


def tensor_bytes(tensor: torch.Tensor) -> int:
    """The memory that a tensor takes here; of a quantised or sharded one the sum of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(tensor_bytes(part) for part in parts if isinstance(part, torch.Tensor))
    return tensor.numel() * tensor.element_size()


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


def machine_memory() -> int:
    """The bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """The bytes that are free on a GPU, with those that torch keeps for new tensors; of a CPU all of the machine's."""
    if device.type != "cuda":
        return machine_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def row_bytes(
    model: TransformerDecoder,
    length: int,
    dtype: torch.dtype,
    prompt: int,
    draft_layers: int = 0,
    nodes: int = 1,
    parallel: int = 1,
) -> int:
    """The bytes that a row of a generation takes: its cache of so many positions, what its prompt needs, and the
    results of a step.

    Args:
        prompt: tokens of the prompt, all of which a layer reads at once.
        draft_layers: a trained draft's own.
        nodes: the tokens of a verification.
        parallel: processes that share each matrix; all of them have the whole results.
    """
    attn = model.layers[0].attn
    heads = attn.num_kv_heads if is_plain_attention(model.layers[0]) else attn.num_heads
    values = 2 * (len(model.layers) + draft_layers) * heads * attn.head_dim * length
    # Of a layer that reads the prompt: three tensors of the feed-forward network's width, and some six of the model's.
    widths = [max(parameter.shape) for parameter in model.layers[0].parameters() if parameter.dim() == 2]
    values += prompt * (3 * max(widths) + 6 * model.tok_embeddings.embedding_dim)
    # Of each token's vocabulary, in fp32: logits, what the sampler makes of them, and noise.
    return values * dtype.itemsize // parallel + nodes * 3 * 4 * model.tok_embeddings.num_embeddings


def check_cache_fits(
    model: TransformerDecoder,
    rows: int,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    parallel: int = 1,
    weights: int = 0,
    prompt: int = 0,
    draft_layers: int = 0,
    nodes: int = 1,
    loaded: int = 0,
) -> None:
    """Raises a ConfigError if weights, caches, the prompts' activations and the results of a step are larger than
    memory: what is free on a GPU, all of a CPU's.

    Args:
        parallel: processes that share each matrix.
        weights: bytes that this process will load there, see `weight_bytes`.
        prompt, draft_layers, nodes: as of `row_bytes`.
        loaded: bytes of the weights until a quantizer makes them smaller.
    """
    row, shorter = (
        row_bytes(model, size, dtype, prompt, draft_layers, nodes, parallel) for size in (length, length - 1)
    )
    free = free_memory(device)
    left = free - weights
    if loaded > max(weights, free):
        raise ConfigError(
            f"model: its weights take {loaded / 2**30:.1f} GiB until they are quantised, and there are "
            f"{free / 2**30:.1f}. Allowed here: a model that fits; for example dtype=bf16, or a smaller one"
        )
    if rows * row <= left:
        return
    there = f"there are {free / 2**30:.1f}" + (f", of which weights take {weights / 2**30:.1f}" if weights else "")
    takes = (
        f"caches, prompts and steps of {rows} rows of {length} positions take {rows * row / 2**30:.1f} GiB, and {there}"
    )
    fits, positions = left // row, length + (left - row) // (row - shorter)
    if positions < 1:
        raise ConfigError(
            f"model: its weights take {weights / 2**30:.1f} GiB, and there are {free / 2**30:.1f}. Allowed here: a "
            "model that leaves room for caches; for example dtype=bf16, a quantizer, or more processes"
        )
    if fits < 1:
        raise ConfigError(
            f"max_new_tokens: {takes}. Allowed here: up to "
            f"{positions} positions (prompt, new tokens and drafts) with batch_size=1; for example a smaller "
            "max_new_tokens (with compile=true, caches have 128 positions more than 256, 512, 1024, ...)"
        )
    raise ConfigError(f"batch_size: {takes}. Allowed here: up to {fits}; for example batch_size={fits}")
