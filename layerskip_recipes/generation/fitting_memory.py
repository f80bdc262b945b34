"""Whether weights, drafts and caches fit into the memory. Recipes ask before they load any weight."""

from collections.abc import Sequence

import torch

from layerskip_recipes.checkpoint.weights import quantised_bytes
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import DecodingConfig
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels.compiling import cache_length
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.memory import free_memory, machine_memory, row_bytes, weight_bytes
from layerskip_recipes.processes import num_processes


def check_memory(
    cfg: DecodingConfig,
    device: torch.device,
    speculations: Sequence[Speculation],
    rows: int,
    prompt: int,
    new_tokens: int,
    compares: bool = False,
    kept_layers: int = 0,
    parallel: int = 1,
) -> int:
    """Check that the weights, the draft models, and `rows` batch rows fit into the free memory; on a CPU, into the
    machine's memory, as other programs may make room.

    Args:
        prompt: tokens of the longest prompt.
        compares: decode without drafts too. Compiled, that takes another cache beside a trained draft's.
        kept_layers, parallel: how the processes share the weights, see `weight_bytes`.

    Returns:
        the slots that prompt, new tokens and draft need.
    """
    model, dtype, quantizer = layerskip_decoder(cfg.meta_model), cfg.torch_dtype, cfg.quantizer
    whole = weight_bytes(model, dtype, kept_layers, num_processes() // parallel, parallel)
    own = [speculation.own_bytes(model, dtype) for speculation in speculations]
    # Trained drafts are read before the model is quantised.
    loaded = whole + sum(size for one, size in zip(speculations, own, strict=True) if one.draft is not None)
    weights = sum(own) + (whole if quantizer is None else quantised_bytes(model, quantizer))
    extra = max((speculation.draft_layers for speculation in speculations), default=0)
    extra += model.num_layers if extra and compares and cfg.compile else 0
    verified = 1 + max((speculation.num_speculations for speculation in speculations), default=0)
    needed = prompt + new_tokens + verified
    slots = cache_length(needed) if cfg.compile else needed
    row, shorter = (row_bytes(model, n, dtype, prompt, extra, verified, parallel) for n in (slots, slots - 1))
    # The largest batch, and for one row the longest sequence, that fits.
    free = free_memory(device) if device.type == "cuda" else machine_memory()
    fits, positions = (free - weights) // row, slots + (free - weights - row) // (row - shorter)
    while_loading = " until they are quantised" if loaded > weights else ""
    takes = f"weights take {max(loaded, weights) / 2**30:.1f} GiB{while_loading}, and {free / 2**30:.1f} GiB are free"
    if loaded > max(weights, free) or positions < 1:
        raise ConfigError(
            f"model: its {takes}. Allowed here: a model that leaves room for caches; for example dtype=bf16, "
            "a quantizer, or more processes"
        )
    if rows > fits:
        key, allowed = "batch_size", f"up to {fits}; for example batch_size={fits}"
        if fits < 1:
            key = "max_new_tokens"
            allowed = (
                f"up to {positions} positions (prompt, new tokens and drafts) with batch_size=1; for example a smaller "
                "max_new_tokens (with compile=true, caches have 128 positions more than 256, 512, 1024, ...)"
            )
        raise ConfigError(
            f"{key}: caches, prompts and steps of {rows} rows of {slots} positions take {rows * row / 2**30:.1f} GiB, "
            f"{takes}. Allowed here: {allowed}"
        )
    return needed
