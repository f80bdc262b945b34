"""What a run records about itself: metrics, and the settings that a resumed run must share."""

import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.early_exit import EarlyExitLoss

log = utils.get_logger("INFO")
# A resumed run must have the same values for these keys. Other keys may change, such as lr, logging or the number of
# ranks, and within these sections the memory settings of FREE_SETTINGS.
SAME_KEYS = {
    "model",
    "dtype",
    "compute_dtype",
    "dataset",
    "collate_fn",
    "shuffle",
    "layer_dropout",
    "early_exit_loss",
    "draft",
    "loss",
    "optimizer_in_bwd",
}
FREE_SETTINGS = {
    "early_exit_loss": ("chunk_tokens",),
    "draft": ("chunk_tokens", "keep_states"),
    "loss": ("num_output_chunks",),
}
STEPS = "steps of the run"
CHECKOUT = Path(__file__).parents[2]


class RunLog:
    """The config's metric logger, on rank 0 only. It first logs config, versions and curriculum."""

    def __init__(self, cfg: FinetuneConfig, total_steps: int) -> None:
        self._logger = None
        if is_rank_zero():
            self._logger = cfg.metric_logger.build()
            extra: dict[str, Any] = {"versions": versions()}
            if cfg.draft is None:
                extra["curriculum"] = curriculum(cfg.exit_loss, cfg.num_layers, total_steps)
            logged: Any = OmegaConf.to_container(cfg.source)
            self._logger.log_config(OmegaConf.create(logged | extra))

    def write(self, metrics: dict[str, Any], step: int) -> None:
        if self._logger is not None and metrics:
            self._logger.log_dict(metrics, step=step)

    def close(self) -> None:
        if self._logger is not None:
            self._logger.close()


class LossMeans:
    """The mean of each loss since the last log line, over the steps that computed it. Sums stay on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps: dict[str, int] = {}

    def add(self, names: Sequence[str], losses: torch.Tensor) -> None:
        """Add the losses of a step, [names]."""
        for name, loss in zip(names, losses.unbind(), strict=True):
            self.sums[name] = self.sums[name] + loss if name in self.sums else loss
            self.steps[name] = self.steps.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The means, with exits in order. Starts anew."""
        names = sorted(self.sums, key=lambda name: (len(name), name))
        sums = torch.stack([self.sums[name] for name in names]).tolist()
        means = {name: value / self.steps[name] for name, value in zip(names, sums, strict=True)}
        self.sums, self.steps = {}, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": {name: value.cpu() for name, value in self.sums.items()}, "steps": dict(self.steps)}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.sums = {name: value.to(device) for name, value in state["sums"].items()}
        self.steps = dict(state["steps"])


def versions() -> dict[str, str]:
    """The versions of this package and its main dependencies, and the commit of a git checkout."""
    names = ("layerskip-recipes", "torch", "torchtune", "torchao")
    found = {name: version(name) for name in names} | {"python": platform.python_version()}
    if (CHECKOUT / ".git").exists():
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        found |= {"commit": run.stdout.strip()} if run.returncode == 0 else {}
    return found


def curriculum(loss: EarlyExitLoss, num_layers: int, total_steps: int) -> dict[str, Any]:
    """T, L, and each set of exits with the step at which it first has a loss."""
    sets: dict[str, list[int]] = {}
    # A rotation has `interval` sets. The gradual curriculum changes L times up to T/2.
    changes = {-(-k * total_steps // (2 * num_layers)) for k in range(num_layers + 1)}
    gradual = loss.curriculum == "gradual"
    for step in sorted(changes) if gradual else range(min(total_steps, loss.interval)):
        on = [layer + 1 for layer, enabled in enumerate(loss.enabled(num_layers, step, total_steps)) if enabled]
        if on not in sets.values():
            sets[f"step {step + 1}"] = on
    return {"total_steps": total_steps, "num_layers": num_layers, "exits": sets}


def run_fingerprint(cfg: FinetuneConfig, data: TrainingData, tokenizer: Any) -> dict[str, Any]:
    """The settings and sizes that a resumed run must share."""
    given = cfg.model_dump(include=SAME_KEYS)
    if len(cfg.dataset) == 1:
        given["dataset"] = cfg.dataset[0].section
    fingerprint = {key: given.get(key) for key in sorted(SAME_KEYS)}
    if adapter_names(cfg.meta_model) or cfg.draft:  # these only fit the weights that they were trained on
        fingerprint["checkpointer.checkpoint_dir"] = cfg.given_folder
    fingerprint["optimizer._component_"] = cfg.optimizer.path  # another optimizer cannot use its state
    fingerprint["tokenizer.max_seq_len"] = getattr(tokenizer, "max_seq_len", None)
    fingerprint["samples in the dataset"] = data.num_samples
    fingerprint["batch_size x gradient_accumulation_steps x data-parallel ranks"] = data.samples_per_step
    fingerprint["steps in an epoch"] = data.steps_per_epoch
    fingerprint[STEPS] = data.total_steps
    return _without_free_settings(fingerprint)


def _without_free_settings(fingerprint: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: {name: value for name, value in section.items() if name not in FREE_SETTINGS.get(key, ())}
        for key, section in fingerprint.items()
        if isinstance(section, dict)
    }
    return fingerprint | kept


def _first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first difference of two sections: its key and both values, None for a missing one."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return key, before, now
    none = object()
    name = next(name for name in [*now, *before] if before.get(name, none) != now.get(name, none))
    return _first_difference(f"{key}.{name}", before.get(name), now.get(name))


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ConfigError that names the first changed setting."""
    before = _without_free_settings(before)
    for key, value in now.items():
        noted = before.get(key)
        if key == STEPS:
            if noted != value and is_rank_zero():
                log.warning(
                    f"resume_from_checkpoint: the run ends at step {value} now, before at {noted}. This changes what "
                    "depends on the run's length: the gradual curriculum, layer dropout's schedules exp and "
                    "progressive, learning rate schedules"
                )
        elif noted != value:
            name, noted, value = _first_difference(key, noted, value)
            raise ConfigError(
                f"resume_from_checkpoint: {name} was {noted!r} and is {value!r} now. A resumed run must keep its "
                "settings; to start anew set resume_from_checkpoint=false and another output_dir"
            )
