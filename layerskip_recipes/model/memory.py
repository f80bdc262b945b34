"""Memory of weights, training and generation: one set of formulas, for automatic choices and for checks."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import torch
from torchtune.modules import TransformerDecoder

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
    """Bytes of the weights that each process holds: the first `kept_layers` layers whole, the others sharded over
    `shards` processes, and each matrix over `parallel` processes."""
    late = sum(parameter.numel() for parameter in model.layers[kept_layers:].parameters())
    early = sum(parameter.numel() for parameter in model.parameters()) - late
    return (early + late // shards) // parallel * dtype.itemsize


def machine_memory(root: Path = Path("/")) -> int:
    """Bytes that processes may take here: the machine's memory, or less in a container or a Slurm job."""
    limits = [limit for group in _control_groups(root) if (limit := _limit(group)) is not None]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *limits])


def free_memory(device: torch.device, root: Path = Path("/")) -> int:
    """Free bytes of a GPU, torch's unused cache included; for a CPU the bytes that no process takes.

    Cached files count as free. Where the system does not tell, it is the machine's whole memory.
    """
    if device.type != "cuda":
        free = [machine_memory(root), 1024 * _table(root / "proc/meminfo").get("MemAvailable:", 2**60)]
        for group in _control_groups(root):
            limit, used = _limit(group), _least(group, "memory.current", "memory.usage_in_bytes")
            if limit is not None and used is not None:
                stat = _table(group / "memory.stat")
                kinds = ("inactive_file", "active_file")  # in version 1, "total_" includes the groups below
                free.append(limit - used + sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in kinds))
        return max(min(free), 0)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _control_groups(root: Path) -> Iterator[Path]:
    """The folders of this process's control groups for memory, of version 1 or 2, and of the groups above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounts = ["memory"] if "memory" in controllers.split(",") else [] if controllers else ["", "unified"]
        # A container may see the path outside of it; then its own group is at the mount.
        for place in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield from (root / "sys/fs/cgroup" / mount / str(place).lstrip("/") for mount in mounts)


def _limit(group: Path) -> int | None:
    return _least(group, "memory.max", "memory.high", "memory.limit_in_bytes")


def _least(group: Path, *names: str) -> int | None:
    """The least number in these files of a control group; None if there is none, or all are "max"."""
    numbers = []
    for name in names:
        with suppress(OSError, ValueError):
            numbers.append(int((group / name).read_text()))
    return min(numbers, default=None)


def _table(file: Path) -> dict[str, int]:
    """The numbers of a file with a name and a number in each line."""
    try:
        rows = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def mlp_width(model: TransformerDecoder) -> int:
    """The width of the feed-forward network, the largest dimension of a layer's matrices."""
    return max(max(parameter.shape) for parameter in model.layers[0].parameters() if parameter.dim() == 2)


# ---- training ----


def training_bytes(
    model: TransformerDecoder, itemsize: int, trained: int, quantised: bool, gradients: bool = True
) -> int:
    """Bytes of weights, gradients and AdamW's two averages; after a step there are no `gradients`. A `quantised` matrix
    of a layer takes half a byte per weight, and a sixteenth of that for its scales."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    packed = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) if quantised else 0
    return itemsize * (weights - packed) + packed * 17 // 32 + (2 + gradients) * itemsize * trained


def layer_bytes(model: TransformerDecoder, itemsize: int, trains_norms: bool = True, autocast: bool = False) -> int:
    """Bytes per token that a layer keeps for its backward pass; the largest layer's. With `autocast`, products are in
    bf16 and all else in fp32.

    - norms: the input in fp32, and if their weights are trained, the normed input in fp32 before them
    - inputs of the products behind the norms; autocast makes a copy for each of the five matrices
    - attention: queries, keys and values of all heads, and the result
    - feed-forward network: both products, the activation, and its product with the second one

    On a GPU, torch 2.9 and later keep less of norms with fp32 weights: one kernel computes the normed input again.
    """
    width, inner = model.tok_embeddings.embedding_dim, mlp_width(model)
    in_product = torch.bfloat16.itemsize if autocast else itemsize
    in_norm = 4 * (2 if trains_norms else 1)
    inputs = in_product * width * (5 if autocast else 2)
    sizes = []
    for layer in model.layers:
        attn = layer.attn
        # How many numbers are normed: states by the layer, and queries and keys by attention, where it has norms.
        dims = [{parameter.dim() for parameter in part.parameters()} for part in layer.children()]
        normed = width * dims.count({1})
        for name, heads in (("q_norm", attn.num_heads), ("k_norm", attn.num_kv_heads)):
            normed += heads * attn.head_dim if getattr(attn, name, None) is not None else 0
        sizes.append(in_norm * normed + inputs + in_product * 4 * (attn.num_heads * attn.head_dim + inner))
    return max(sizes)


def token_bytes(
    model: TransformerDecoder,
    layer_passes: int,
    itemsize: int,
    recompute: bool,
    trains_norms: bool = True,
    autocast: bool = False,
    on_heap: bool = False,
) -> int:
    """Bytes of the activations that `layer_passes` runs of trained layers keep per token until the backward pass; for
    the other arguments see `layer_bytes`.

    With activation checkpointing (`recompute`) the layers keep their inputs, and `layer_bytes` are added for the one
    layer that the backward pass is at.

    `on_heap`: on a CPU, a process then holds more than torch allocates. Freed activations between two kept inputs leave
    holes on the heap that do not fit the next ones, about one vector of the feed-forward network's width per layer.
    """
    if recompute:
        layer_input = model.tok_embeddings.embedding_dim + (mlp_width(model) if on_heap else 0)
        return layer_passes * itemsize * layer_input
    return layer_passes * layer_bytes(model, itemsize, trains_norms, autocast)


def adapter_gradient_bytes(model: TransformerDecoder, itemsize: int) -> int:
    """Bytes per token of the gradients that a layer's backward pass adds if it has adapters: the input of the last
    matrix of the feed-forward network has a gradient by the frozen matrix and one by the adapter, and their sum."""
    return 2 * itemsize * mlp_width(model)


def exit_state_bytes(model: TransformerDecoder, exits: int, itemsize: int) -> int:
    """Bytes per token of the states that have a loss, and of their gradients."""
    return exits * 2 * itemsize * model.tok_embeddings.embedding_dim


def draft_state_bytes(model: TransformerDecoder, passes: int, joins: bool, itemsize: int) -> int:
    """Bytes per token that a draft keeps besides its layers for `passes` of them: what its last norm keeps, its states
    and their gradients. An adapter `joins` two states: it keeps both, in fp32 for their norms, and for the product."""
    width = model.tok_embeddings.embedding_dim
    joined = (2 * itemsize + 2 * 4 + 2 * itemsize) * width if joins else 0
    return passes * (joined + 2 * 4 * width) + exit_state_bytes(model, passes, itemsize)


def logits_bytes(tokens: int, vocabulary: int, teacher: bool = False) -> int:
    """Bytes of a chunk's logits, and of their copy in fp32 if the loss is not compiled. A `teacher` has logits too, and
    both have probabilities in fp32."""
    return (16 if teacher else 8) * tokens * vocabulary


def cast_bytes(model: TransformerDecoder, layer_passes: int, recompute: bool) -> int:
    """Bytes of the layers' matrices in bf16 that autocast keeps until the backward pass, if the weights are fp32.

    `layer_passes` and `recompute` as in `token_bytes`; with activation checkpointing one layer's matrices are there at
    a time.
    """
    matrices = sum(parameter.numel() for parameter in model.layers.parameters() if parameter.dim() == 2)
    return torch.bfloat16.itemsize * matrices * (1 if recompute else layer_passes) // len(model.layers)


def forward_values(model: TransformerDecoder) -> int:
    """Numbers per token that exist at a time while a layer runs without gradients: three tensors of the feed-forward
    network's width, and about six of the model's width."""
    return 3 * mlp_width(model) + 6 * model.tok_embeddings.embedding_dim


def measuring_bytes(
    model: TransformerDecoder, chunk: int, tokens: int, itemsize: int, exits: int, draft: bool = False
) -> int:
    """Bytes of the measurement of `exits` or of a `draft` at a save, with batches of so many `tokens`.

    First the layers run, beside the states of an exit, and in a draft beside eight more states and the matrices of its
    layer in bf16. Then the states, and those at the labels, are compared: with six fp32 values for each token of a
    chunk and vocabulary entry.
    """
    state = tokens * itemsize * model.tok_embeddings.embedding_dim
    running = tokens * itemsize * forward_values(model) + state * (10 if draft else 2)
    running += cast_bytes(model, 1, recompute=True) if draft else 0
    comparing = state * (8 if draft else 2 * exits) + 6 * 4 * chunk * model.tok_embeddings.num_embeddings
    return max(running, comparing)


# ---- generation ----


def row_bytes(
    model: TransformerDecoder,
    length: int,
    dtype: torch.dtype,
    prompt: int,
    draft_layers: int = 0,
    verified: int = 1,
    parallel: int = 1,
) -> int:
    """Bytes of a batch row: a KV cache of `length` slots, activations of a prompt of `prompt` tokens, and logits of a
    verification of `verified` tokens. Each matrix is shared by `parallel` processes, but not the logits.

    `draft_layers` more layers have slots too; more than the model has are those of another cache.
    """
    per_slot = [
        2 * (layer.attn.num_kv_heads if is_plain_attention(layer) else layer.attn.num_heads) * layer.attn.head_dim
        for layer in model.layers
    ]
    values = (sum(per_slot) + sum(per_slot[i % len(per_slot)] for i in range(draft_layers))) * length
    values += prompt * forward_values(model)  # prefill of one layer
    # Three fp32 values per token and vocabulary entry: the logits, the sampler's probabilities, and noise.
    return values * dtype.itemsize // parallel + verified * 3 * 4 * model.tok_embeddings.num_embeddings
