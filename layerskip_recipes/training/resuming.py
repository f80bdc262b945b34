"""What a run takes over from one that was stopped: its newest checkpoint, its choices and the random states."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torchtune.utils import get_logger

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.folders.run_folder import RECIPE_STATE, complete_checkpoints, newest_intact
from layerskip_recipes.processes import from_every_rank, from_rank_zero, is_rank_zero
from layerskip_recipes.training.checkpoints import restore_set_aside

log = get_logger("INFO")


def find_checkpoint(output_dir: Path) -> Path:
    """The newest intact checkpoint under output_dir, found by rank 0 for all ranks; a ConfigError if there is none."""
    folder = None
    if is_rank_zero():
        restore_set_aside(output_dir)
        folder = newest_intact(output_dir)
        if folder is None:
            raise ConfigError(
                f"resume_from_checkpoint: no intact checkpoint (epoch_* or step_*) under output_dir "
                f"{str(output_dir)!r}. Set resume_from_checkpoint=false to start anew"
            )
    return from_rank_zero(folder)


def stored_choices(checkpoint: Path) -> dict[str, Any]:
    """The stopped run's values of keys that may be `auto`, except for those that change no result."""
    state = torch.load(checkpoint / RECIPE_STATE, map_location="cpu", weights_only=True, mmap=True)
    left = ("device", "enable_activation_checkpointing", "gradient_accumulation_steps", "chunk_tokens")
    return {key: value for key, value in state.get("chosen", {}).items() if key.rpartition(".")[2] not in left}


def check_earlier_runs(output_dir: Path, keep: int | None) -> None:
    """Refuse a fresh run that would delete an earlier run's checkpoints because it only keeps `keep` of them."""
    names = ", ".join(folder.name for folder in complete_checkpoints(output_dir))
    if names and keep:
        raise ConfigError(
            f"keep_last_n_checkpoints: {keep} would throw away an earlier run's checkpoints under output_dir "
            f"{str(output_dir)!r}, {names}. Allowed: another output_dir, or resume_from_checkpoint=true"
        )
    if names:
        log.warning(f"{output_dir} has an earlier run's checkpoints, {names}: this run replaces those of the same name")


def random_states(device: torch.device) -> list[dict[str, torch.Tensor]]:
    """The states of all ranks' random generators by device type. Collective."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return from_every_rank(states)


def restore_random_state(states: list[dict[str, torch.Tensor]], device: torch.device) -> None:
    """Restore this rank's generators. Ranks that the stopped run did not have keep their own seed."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    saved = states[rank] if rank < len(states) else {}
    if "cpu" in saved:
        torch.set_rng_state(saved["cpu"])
    if device.type != "cpu" and device.type in saved:
        torch.get_device_module(device).set_rng_state(saved[device.type])
