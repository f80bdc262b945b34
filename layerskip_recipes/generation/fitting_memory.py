"""Whether weights, drafts and caches fit into the memory. Recipes ask before they load any weight."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from layerskip_recipes.checkpoint.weights import quantised_bytes
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.generation.config import DecodingConfig
from layerskip_recipes.generation.drafting.speculation import Speculation
from layerskip_recipes.generation.kernels.compiling import cache_length
from layerskip_recipes.model.decoder import layerskip_decoder
from layerskip_recipes.model.memory import free_memory, machine_memory, row_bytes, weight_bytes
from layerskip_recipes.processes import num_processes


@dataclass(frozen=True)
class DecodingMemory:
    """Bytes that a process takes to decode."""

    loaded: int  # weights and drafts while they are loaded: drafts are read before the model is quantised
    weights: int  # weights and drafts from then on
    row: int  # a batch row: caches, its prompt's activations, and a step's results
    slot: int  # a slot more of a row's caches
    slots: int  # of a row: as many as it needs, or as a compiled step has
    needed_slots: int  # for prompt, new tokens and draft

    def needed(self, rows: int) -> int:
        return self.weights + rows * self.row


def decoding_memory(
    cfg: DecodingConfig,
    speculations: Sequence[Speculation],
    prompt: int,
    new_tokens: int,
    compares: bool = False,
    kept_layers: int = 0,
    parallel: int = 1,
) -> DecodingMemory:
    """The plan of the memory; for the arguments see `check_memory`."""
    model, dtype, quantizer = layerskip_decoder(cfg.meta_model), cfg.torch_dtype, cfg.quantizer
    of_model = weight_bytes(model, dtype, kept_layers, num_processes() // parallel, parallel)
    of_drafts = [speculation.own_bytes(model, dtype) for speculation in speculations]
    trained = (size for plan, size in zip(speculations, of_drafts, strict=True) if plan.draft is not None)
    draft_layers = max((speculation.draft_layers for speculation in speculations), default=0)
    draft_layers += model.num_layers if draft_layers and compares and cfg.compile else 0
    verified = 1 + max((speculation.num_speculations for speculation in speculations), default=0)
    needed_slots = prompt + new_tokens + verified
    slots = cache_length(needed_slots) if cfg.compile else needed_slots
    row, shorter = (row_bytes(model, n, dtype, prompt, draft_layers, verified, parallel) for n in (slots, slots - 1))
    return DecodingMemory(
        loaded=of_model + sum(trained),
        weights=sum(of_drafts) + (of_model if quantizer is None else quantised_bytes(model, quantizer)),
        row=row,
        slot=row - shorter,
        slots=slots,
        needed_slots=needed_slots,
    )


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
    plan = decoding_memory(cfg, speculations, prompt, new_tokens, compares, kept_layers, parallel)
    free = free_memory(device) if device.type == "cuda" else machine_memory()
    # The largest batch, and for one row the longest sequence, that fits.
    most_rows, most_slots = (free - plan.weights) // plan.row, plan.slots + (free - plan.needed(1)) // plan.slot
    while_loading = " until they are quantised" if plan.loaded > plan.weights else ""
    weights = max(plan.loaded, plan.weights)
    takes = f"weights take {weights / 2**30:.1f} GiB{while_loading}, and {free / 2**30:.1f} GiB are free"
    if plan.loaded > max(plan.weights, free) or most_slots < 1:
        raise ConfigError(
            f"model: its {takes}. Allowed here: a model that leaves room for caches; for example dtype=bf16, "
            "a quantizer, or more processes"
        )
    if rows > most_rows:
        key, allowed = "batch_size", f"up to {most_rows}; for example batch_size={most_rows}"
        if most_rows < 1:
            key = "max_new_tokens"
            allowed = (
                f"up to {most_slots} positions (prompt, new tokens and drafts) with batch_size=1; for example a "
                "smaller max_new_tokens (with compile=true, caches have 128 positions more than 256, 512, 1024, ...)"
            )
        raise ConfigError(
            f"{key}: caches, prompts and steps of {rows} rows of {plan.slots} positions take "
            f"{rows * plan.row / 2**30:.1f} GiB, {takes}. Allowed here: {allowed}"
        )
    return plan.needed_slots
