"""What a training run says about itself: to the metric logger, and to the run that resumes it."""

import platform
import subprocess
from importlib.metadata import version
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torchtune import utils

from layerskip_recipes.config.checks import PACKAGE
from layerskip_recipes.config.settings import build
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.early_exit import EarlyExitLoss

# What makes a run the same run when it is resumed. The rest (lr, logging, number of ranks, ...) may change, as what of
# these is a matter of memory only, or of nothing: chunk_tokens takes the place of num_output_chunks.
log = utils.get_logger("INFO")
KEPT = ("model", "dataset", "collate_fn", "shuffle", "layer_dropout", "early_exit_loss", "loss", "optimizer_in_bwd")
FREE = {"early_exit_loss": "chunk_tokens", "loss": "num_output_chunks"}
STEPS = "steps of the run"


class RunLog:
    """The metric logger of a config, on rank 0; the others write nothing. It begins with what describes the run.

    Args:
        cfg: `metric_logger` is read, and all of it is logged, with versions and curriculum.
        loss: the early-exit loss, for its curriculum.
        num_layers: L.
        total_steps: T.
    """

    def __init__(self, cfg: DictConfig, loss: EarlyExitLoss, num_layers: int, total_steps: int) -> None:
        self._logger = None
        if is_rank_zero():
            self._logger = build(cfg.metric_logger, "metric_logger")
            extra = {"versions": versions(), "curriculum": curriculum(loss, num_layers, total_steps)}
            self._logger.log_config(OmegaConf.create(OmegaConf.to_container(cfg) | extra))

    def write(self, metrics: dict[str, Any], step: int) -> None:
        """Log numbers of a step."""
        if self._logger is not None and metrics:
            self._logger.log_dict(metrics, step=step)

    def close(self) -> None:
        """Write what is left."""
        if self._logger is not None:
            self._logger.close()


def package_versions() -> dict[str, str]:
    """Of this package and what it stands on."""
    names = ("layerskip-recipes", "torch", "torchtune", "torchao")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def versions() -> dict[str, str]:
    """Those of `package_versions`; in a git checkout its commit too."""
    found = package_versions()
    if (PACKAGE.parent / ".git").exists():
        command = ["git", "-C", str(PACKAGE.parent), "describe", "--always", "--dirty"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        found |= {"commit": run.stdout.strip()} if run.returncode == 0 else {}
    return found


def curriculum(loss: EarlyExitLoss, num_layers: int, total_steps: int) -> dict[str, Any]:
    """T, L and the exits whose loss is on, at the steps where that set first appears."""
    sets: dict[str, list[int]] = {}
    # A rotation has as many sets as its interval; the gradual curriculum changes L times up to T/2.
    changes = {-(-k * total_steps // (2 * num_layers)) for k in range(num_layers + 1)}
    gradual = loss.curriculum == "gradual"
    for step in sorted(changes) if gradual else range(min(total_steps, loss.interval)):
        on = [layer + 1 for layer, enabled in enumerate(loss.enabled(num_layers, step, total_steps)) if enabled]
        if on not in sets.values():
            sets[f"step {step + 1}"] = on
    return {"total_steps": total_steps, "num_layers": num_layers, "exits": sets}


def described(cfg: DictConfig, data: TrainingData, tokenizer: Any, adapters: bool) -> dict[str, Any]:
    """What must be the same in a run that resumes this one."""
    kept = {key: cfg.get(key) for key in KEPT}
    plain = {
        key: OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        for key, value in kept.items()
    }
    plain = _without_free(plain)
    if adapters:  # they belong to the weights that they were trained on
        plain["checkpointer.checkpoint_dir"] = cfg.checkpointer.get("checkpoint_dir")
    plain["optimizer._component_"] = cfg.optimizer._component_  # its state is of no use to another one
    plain["tokenizer.max_seq_len"] = getattr(tokenizer, "max_seq_len", None)
    plain["samples in the dataset"] = data.num_samples
    plain["batch_size x gradient_accumulation_steps x data-parallel ranks"] = data.samples_per_step
    plain["steps in an epoch"] = data.steps_per_epoch
    plain[STEPS] = data.steps_per_epoch * cfg.get("epochs", 1)
    return plain


def _without_free(described: dict[str, Any]) -> dict[str, Any]:
    kept = {
        key: {name: value for name, value in section.items() if name != FREE.get(key)}
        for key, section in described.items()
        if isinstance(section, dict)
    }
    return described | kept


def _difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first difference of two sections: its key, and both values, None where there is none."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return key, before, now
    none = object()
    name = next(name for name in [*now, *before] if before.get(name, none) != now.get(name, none))
    return _difference(f"{key}.{name}", before.get(name), now.get(name))


def same_run(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises a ValueError naming what changed, if a resumed run would not be the same one."""
    before = _without_free(before)
    for key, value in now.items():
        # An earlier version did not note all of it, nor a length that is the model's.
        noted = before.get(key, value)
        if key == STEPS:
            if noted != value and is_rank_zero():
                log.warning(
                    f"resume_from_checkpoint: the run ends at step {value} now, before at {noted}. What follows the "
                    "part of the run that is done goes another way from here: the gradual curriculum, layer dropout's "
                    "schedule exp, learning rate schedules"
                )
        elif noted != value and (key != "tokenizer.max_seq_len" or noted is not None):
            name, noted, value = _difference(key, noted, value)
            raise ConfigError(
                f"resume_from_checkpoint: {name} was {noted!r} and is {value!r} now. A resumed run goes on as it "
                "began; to start anew set resume_from_checkpoint=false and another output_dir"
            )
