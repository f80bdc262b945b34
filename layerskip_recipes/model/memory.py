"""Memory of weights, training and generation: one set of formulas, for automatic choices and for checks."""

import os

import torch
from torchtune.modules import TransformerDecoder

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import is_plain_attention


def tensor_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor in this process. A quantised or sharded tensor counts as the sum of its parts."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return sum(tensor_bytes(part) for part in parts if isinstance(part, torch.Tensor))
    return tensor.numel() * tensor.element_size()


def weight_bytes(
    model: TransformerDecoder, dtype: torch.dtype, kept_layers: int = 0, shards: int = 1, parallel: int = 1
) -> int:
    """Bytes of the weights that each process holds, see `generation/parallel.py`.

    Every process holds the first `kept_layers` layers whole. The other layers are sharded over `shards` processes, and
    each matrix over `parallel` processes.
    """
    late = sum(parameter.numel() for parameter in model.layers[kept_layers:].parameters())
    early = sum(parameter.numel() for parameter in model.parameters()) - late
    return (early + late // shards) // parallel * dtype.itemsize


def machine_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def free_memory(device: torch.device) -> int:
    """Free bytes of a GPU, torch's unused cache included; for a CPU the machine's whole memory."""
    if device.type != "cuda":
        return machine_memory()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def mlp_width(model: TransformerDecoder) -> int:
    """The width of the feed-forward network, the largest dimension of a layer's matrices."""
    return max(max(parameter.shape) for parameter in model.layers[0].parameters() if parameter.dim() == 2)


# ---- training ----


def training_bytes(model: TransformerDecoder, itemsize: int, trained: int, quantised: bool, chunk: int) -> int:
    """Bytes of weights, gradients and optimizer state, and of the fp32 logits of a chunk of tokens and their gradient.

    Each of the `trained` weights has a gradient and AdamW's two averages. A `quantised` matrix of a layer takes half a
    byte per weight, and a sixteenth of that for its scales.
    """
    weights = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) if quantised else 0
    kept = itemsize * (weights - packed) + packed * 17 // 32 + 3 * itemsize * trained
    return kept + chunk * model.tok_embeddings.num_embeddings * 2 * 4


def token_bytes(model: TransformerDecoder, itemsize: int, recompute: bool) -> int:
    """Bytes of the activations that a training step keeps per token until the backward pass.

    A layer keeps about 16 vectors of the model's width and 4 of the feed-forward network's. With activation
    checkpointing (`recompute`) only one layer keeps them at a time, and the other layers keep their inputs.
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
    """Bytes of a batch row in generation: KV cache, activations of the prompt, and logits of a verification pass.

    The cache has `length` slots, the prompt `prompt` tokens, the verification `nodes` tokens. A trained draft adds
    `draft_layers` layers. Each matrix is shared by `parallel` processes, but every process has the whole logits.
    """
    attn = model.layers[0].attn
    heads = attn.num_kv_heads if is_plain_attention(model.layers[0]) else attn.num_heads
    values = 2 * (len(model.layers) + draft_layers) * heads * attn.head_dim * length
    # Prefill of one layer: three tensors of the feed-forward network's width, and about six of the model's width.
    values += prompt * (3 * mlp_width(model) + 6 * model.tok_embeddings.embedding_dim)
    # Three fp32 values per token and vocabulary entry: the logits, the sampler's probabilities, and noise.
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
    """Check that `rows` batch rows (see `row_bytes`) and the weights fit into the free memory.

    This process will hold `weights` bytes of weights, and `loaded` bytes of them before they are quantised.
    """
    # Weights before quantisation.
    free = free_memory(device)
    if loaded > max(weights, free):
        raise ConfigError(
            f"model: its weights take {loaded / 2**30:.1f} GiB until they are quantised, and {free / 2**30:.1f} "
            "GiB are free. Allowed here: a model that fits; for example dtype=bf16, or a smaller model"
        )
    # Weights and batch rows.
    row, shorter = (row_bytes(model, n, dtype, prompt, draft_layers, nodes, parallel) for n in (length, length - 1))
    left = free - weights
    if rows * row <= left:
        return
    # The largest batch, or for one row the longest sequence, that fits.
    fits, positions = left // row, length + (left - row) // (row - shorter)
    if positions < 1:
        raise ConfigError(
            f"model: its weights take {weights / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. Allowed here: a "
            "model that leaves room for caches; for example dtype=bf16, a quantizer, or more processes"
        )
    takes = (
        f"caches, prompts and steps of {rows} rows of {length} positions take {rows * row / 2**30:.1f} GiB, "
        f"weights take {weights / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    )
    if fits < 1:
        raise ConfigError(
            f"max_new_tokens: {takes}. Allowed here: up to {positions} positions (prompt, new tokens and drafts) with "
            "batch_size=1; for example a smaller max_new_tokens (with compile=true, caches have 128 positions more "
            "than 256, 512, 1024, ...)"
        )
    raise ConfigError(f"batch_size: {takes}. Allowed here: up to {fits}; for example batch_size={fits}")
