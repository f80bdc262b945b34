"""What a run records about itself: metrics, and the settings that a resumed run must share."""

import platform
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torchtune import utils

from layerskip_recipes.checkpoint.checkpointers import weights_folder
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.config import FinetuneConfig

log = utils.get_logger("INFO")
# A resumed run must have the same values for these keys. Other keys may change, such as lr, logging or the number of
# ranks, and within these sections the memory settings of FREE_SETTINGS.
SAME_KEYS = {
    *("model", "dtype", "compute_dtype", "dataset", "collate_fn", "shuffle"),
    *("layer_dropout", "early_exit_loss", "draft", "loss", "optimizer_in_bwd"),
}
FREE_SETTINGS = ("chunk_tokens", "keep_states", "num_output_chunks")
STEPS = "steps of the run"
CHECKOUT = Path(__file__).parents[2]


class RunLog:
    """The config's metric logger, on rank 0 only. It first logs the config with versions."""

    def __init__(self, cfg: FinetuneConfig) -> None:
        self._logger = None
        if is_rank_zero():
            self._logger = cfg.metric_logger.build()
            logged: Any = OmegaConf.to_container(cfg.source)
            self._logger.log_config(OmegaConf.create(logged | {"versions": versions()}))

    def write(self, metrics: dict[str, Any], step: int) -> None:
        if self._logger is not None and metrics:
            self._logger.log_dict(metrics, step=step)

    def close(self) -> None:
        if self._logger is not None:
            self._logger.close()


class LossMeans:
    """The mean of each loss since the last log line, over the steps that computed it. Values stay on the device."""

    def __init__(self) -> None:
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, names: Sequence[str], losses: torch.Tensor) -> None:
        for name, loss in zip(names, losses.unbind(), strict=True):
            self.values[name].append(loss)

    def take(self) -> dict[str, float]:
        """The means, with exits in order; clears the values."""
        names = sorted(self.values, key=lambda name: (len(name), name))
        means = torch.stack([torch.stack(self.values[name]).mean() for name in names]).tolist()
        self.values.clear()
        return dict(zip(names, means, strict=True))

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.stack(values).cpu() for name, values in self.values.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        self.values |= {name: [*values.to(device)] for name, values in state.items()}


def versions() -> dict[str, str]:
    """The versions of this package and its main dependencies, and the commit of a git checkout."""
    names = ("layerskip-recipes", "torch", "torchtune", "torchao")
    found = {name: version(name) for name in names} | {"python": platform.python_version()}
    if (CHECKOUT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        found |= {"commit": run.stdout.strip()} if run.returncode == 0 else {}
    return found


def run_fingerprint(cfg: FinetuneConfig, data: TrainingData, tokenizer: Any) -> dict[str, Any]:
    """The settings and sizes that a resumed run must share."""
    given = cfg.model_dump(include=SAME_KEYS)
    if len(cfg.dataset) == 1:
        given["dataset"] = cfg.dataset[0].section
    fingerprint = {key: given.get(key) for key in sorted(SAME_KEYS)}
    if adapter_names(cfg.meta_model) or cfg.freezes_model:  # these only fit the weights that they were trained on
        fingerprint["checkpointer.checkpoint_dir"] = str(weights_folder(cfg.checkpointer))  # a run's newest checkpoint
    fingerprint["optimizer._component_"] = cfg.optimizer.path  # another optimizer cannot use its state
    fingerprint["tokenizer.chat_template"] = cfg.tokenizer.get("chat_template")
    fingerprint["tokenizer.max_seq_len"] = getattr(tokenizer, "max_seq_len", None)
    fingerprint["samples in the dataset"] = data.num_samples
    fingerprint["batch_size x gradient_accumulation_steps x data-parallel ranks"] = data.samples_per_step
    if cfg.draft is not None and cfg.draft.own_text:  # which replaces whole micro-batches
        fingerprint["gradient_accumulation_steps"] = cfg.gradient_accumulation_steps
    fingerprint["steps in an epoch"] = data.steps_per_epoch
    fingerprint[STEPS] = data.total_steps
    return fingerprint


def _differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys whose values differ, with both values; None for a missing one.

    Values are compared as text: a rerun of a logged config reads the string "3" back as the number 3.
    """
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if str(before) != str(now):
            yield key, before, now
        return
    none = object()
    for name in dict.fromkeys([*now, *before]):
        if name not in FREE_SETTINGS and before.get(name, none) != now.get(name, none):
            yield from _differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)


def check_resumable(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ConfigError that names the changed settings."""
    changed = [*_differences({key: before.get(key) for key in now}, now)]
    for key, noted, value in changed:
        if key == STEPS:
            log.warning(
                f"resume_from_checkpoint: the run ends at step {value} now, before at {noted}. This changes what "
                "depends on the run's length: the gradual curriculum, layer dropout's "
                "schedules except constant, learning rate schedules"
            )
    if mistakes := [
        f"resume_from_checkpoint: {key} was {noted!r} and is {value!r} now. A resumed run must keep its settings; to "
        "start anew set resume_from_checkpoint=false and another output_dir"
        for key, noted, value in changed
        if key != STEPS
    ]:
        raise ConfigError(*mistakes)
