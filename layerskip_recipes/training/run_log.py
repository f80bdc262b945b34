"""What a run records about itself: metrics, its config and versions."""

import platform
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.config import FinetuneConfig

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
    by_package = {name: version(name) for name in names} | {"python": platform.python_version()}
    if (CHECKOUT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        by_package |= {"commit": run.stdout.strip()} if run.returncode == 0 else {}
    return by_package
