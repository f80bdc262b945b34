"""TrainingData: the samples of each optimizer step on each rank."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX

from layerskip_recipes.config.auto import Choices
from layerskip_recipes.data.datasets import load_data
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.limits import check_length
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import Mesh

log = utils.get_logger("INFO")


def _with_fitting_batch(cfg: FinetuneConfig, samples: int) -> FinetuneConfig:
    """The config; a batch that the recipe chose is lowered to the number of samples of a rank if that is less."""
    size, times = cfg.batch_size, cfg.gradient_accumulation_steps
    if "batch_size" in cfg.chosen:
        size = max(min(size, samples if "gradient_accumulation_steps" in cfg.chosen else samples // times), 1)
    if "gradient_accumulation_steps" in cfg.chosen:
        times = max(min(times, samples // size), 1)
    if (size, times) == (cfg.batch_size, cfg.gradient_accumulation_steps):
        return cfg
    log.info(f"batch_size: {size}, gradient_accumulation_steps: {times}, because there are few samples")
    choices = Choices(cfg)
    choices.set("batch_size", size)
    choices.set("gradient_accumulation_steps", times)
    return cfg.with_choices(choices)


class TrainingData:
    """The batches of a run. The samples of a step depend only on seed, epoch and position.

    Each of n data-parallel ranks takes every n-th sample. So a step has the same samples for any number of ranks if
    batch_size x ranks stays the same.
    """

    def __init__(self, cfg: FinetuneConfig, tokenizer: Any, device: torch.device, mesh: Mesh, seed: int) -> None:
        self.dataset, self._collate = load_data(cfg.dataset, cfg.collate_fn, tokenizer, cfg.meta_model, device)
        self.cut_at = None if self.dataset.packed else getattr(tokenizer, "max_seq_len", None)
        self._warned_of_cuts = False
        self.num_samples = len(self.dataset)
        self.cfg = cfg = _with_fitting_batch(cfg, self.num_samples // mesh.data_size)
        self.batch_size, self.shuffle, self.seed, self.mesh = cfg.batch_size, cfg.shuffle, seed, mesh
        self.samples_per_step = self.batch_size * cfg.gradient_accumulation_steps * mesh.data_size
        steps = self.num_samples // self.samples_per_step
        if steps < 1:
            ranks = f" x {mesh.data_size} data-parallel ranks" if mesh.data_size > 1 else ""
            raise ConfigError(
                f"dataset: {self.num_samples} samples make no step of batch_size {self.batch_size} x "
                f"gradient_accumulation_steps {cfg.gradient_accumulation_steps}{ranks}; lower one of them"
            )
        self.steps_per_epoch = min(steps, cfg.max_steps_per_epoch or steps)
        self.total_steps = self.steps_per_epoch * cfg.epochs
        check_length(len(self.dataset[0]["tokens"]), cfg.meta_model)

    def warn_of_cuts(self, tokens: torch.Tensor) -> None:
        """Warn once that samples are cut: tokenizers do this silently, and the answer may be lost."""
        if self._warned_of_cuts or self.cut_at is None or tokens.shape[1] < self.cut_at:
            return
        self._warned_of_cuts = True
        log.warning(
            f"dataset: some samples have tokenizer.max_seq_len={self.cut_at} tokens or more; the rest is cut off and "
            "not learned"
        )

    def frequent_tokens(self, count: int, most_samples: int = 2048) -> list[int]:
        """The `count` most frequent labels in at most `most_samples` evenly spread samples, in ascending order."""
        samples = range(0, self.num_samples, -(-self.num_samples // most_samples))
        counts = Counter(label for i in samples for label in torch.as_tensor(self.dataset[i]["labels"]).tolist())
        counts.pop(CROSS_ENTROPY_IGNORE_IDX, None)
        return sorted(token for token, _ in counts.most_common(count))

    def order(self, epoch: int) -> list[int]:
        """The sample numbers of an epoch in training order, over all ranks."""
        if not self.shuffle:
            return list(range(self.num_samples))
        draw = torch.Generator().manual_seed(self.seed + epoch)  # as torch's DistributedSampler
        return torch.randperm(self.num_samples, generator=draw).tolist()

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """This rank's batches of an epoch, beginning with batch `start`."""
        mine = self.order(epoch)[self.mesh.data_rank :: self.mesh.data_size][start * self.batch_size :]
        return iter(
            DataLoader(
                self.dataset,
                batch_size=self.batch_size,
                sampler=mine,
                collate_fn=self._collate,
                drop_last=True,
                generator=torch.Generator(),  # draw nothing from the global generator, which the model uses
            )
        )

    def samples(self, step: int) -> list[int]:
        """The sample numbers of optimizer step `step` (from 0), over all ranks."""
        epoch, done = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[done * self.samples_per_step : (done + 1) * self.samples_per_step]
