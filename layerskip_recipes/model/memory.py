"""The memory of weights, of a training and of a generation: one set of formulas, for choices and for checks."""

import os

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import is_plain_attention


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

    The first `kept_layers` layers are whole on every process, the others sharded over `shards` processes; `parallel`
    processes share each matrix.
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


def mlp_width(model: TransformerDecoder) -> int:
    """The width of the feed-forward network, the largest one of a layer."""
    return max(max(parameter.shape) for parameter in model.layers[0].parameters() if parameter.dim() == 2)


# ---- training ----


def training_bytes(model: TransformerDecoder, itemsize: int, trained: int, quantised: bool, chunk: int) -> int:
    """What a training keeps from step to step, and the logits of a chunk of tokens with their gradient in fp32.

    Each of the `trained` weights has a gradient and two averages of AdamW beside it. A `quantised` matrix of a layer
    has half a byte for each weight, and a sixteenth of that for its scales.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) if quantised else 0
    kept = itemsize * (weights - packed) + packed * 17 // 32 + 3 * itemsize * trained
    return kept + chunk * model.tok_embeddings.num_embeddings * 2 * 4


def token_bytes(model: TransformerDecoder, itemsize: int, recompute: bool) -> int:
    """What a training step keeps for each token until the backward pass.

    About 16 vectors of the model's width and 4 of the feed-forward network's in each layer. With activation
    checkpointing (`recompute`) one layer has these, and the others keep their inputs.
    """
    width, depth = model.tok_embeddings.embedding_dim, len(model.layers)
    layer = 16 * width + 4 * mlp_width(model)
    return itemsize * (layer + depth * width if recompute else depth * layer)


# ---- generation ----


def row_bytes(
    model: TransformerDecoder,
    length: int,
    dtype: torch.dtype,
    prompt: int,
    draft_layers: int = 0,
    nodes: int = 1,
    parallel: int = 1,
) -> int:
    """The bytes of a row of a generation: its cache of `length` positions, the activations of its prompt of `prompt`
    tokens, and the logits of a verification of `nodes` tokens.

    A trained draft has `draft_layers` of its own. `parallel` processes share each matrix; each has the whole logits.
    """
    attn = model.layers[0].attn
    heads = attn.num_kv_heads if is_plain_attention(model.layers[0]) else attn.num_heads
    values = 2 * (len(model.layers) + draft_layers) * heads * attn.head_dim * length
    # Of a layer that reads the prompt: three tensors of the feed-forward network's width, and some six of the model's.
    values += prompt * (3 * mlp_width(model) + 6 * model.tok_embeddings.embedding_dim)
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
    """Raises a ConfigError if `rows` rows (see `row_bytes`) and the weights do not fit into the free memory.

    This process will hold `weights` bytes of weights, and `loaded` bytes until a quantizer makes them smaller.
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
