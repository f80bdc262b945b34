"""TrainingData: the samples of each optimizer step on each rank."""

import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torchtune import utils
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX
from tqdm import tqdm

from layerskip_recipes.config.auto import Choices
from layerskip_recipes.data.datasets import Batches, load_data
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.limits import check_length
from layerskip_recipes.processes import from_rank_zero, is_rank_zero
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import Mesh

MOST_HASHED, MOST_COUNTED = 512, 2048  # samples that a summary reads
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
        self.device, self._warned_of_cuts = device, False
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

    def summary(self, labels_only: bool, num_frequent: int = 0) -> tuple[str, list[int]]:
        """A hash of evenly spread samples, and the most frequent labels of more of them, in ascending order.

        Collective: rank 0 reads each of these samples once. With `labels_only` the hash leaves out tokens without a
        loss: some chat templates write today's date into the prompt.
        """
        return from_rank_zero(self._summary(labels_only, num_frequent) if is_rank_zero() else None)

    def _summary(self, labels_only: bool, num_frequent: int) -> tuple[str, list[int]]:
        hashed = {*range(0, self.num_samples, -(-self.num_samples // MOST_HASHED))}
        counted = {*range(0, self.num_samples, -(-self.num_samples // MOST_COUNTED))} if num_frequent else set()
        digest, counts = hashlib.sha256(), Counter[int]()
        for i in tqdm(sorted(hashed | counted), desc="reading samples", leave=False, delay=2):
            sample = self.dataset[i]
            labels = torch.as_tensor(sample.get("labels", [])).tolist()
            learned = [label for label in labels if label != CROSS_ENTROPY_IGNORE_IDX]
            if i in hashed:
                tokens = torch.as_tensor(sample["tokens"]).tolist()
                digest.update((f"labels {learned} " if labels_only else f"tokens {tokens} labels {labels} ").encode())
            if i in counted:
                counts.update(learned)
        return digest.hexdigest()[:16], sorted(token for token, _ in counts.most_common(num_frequent))

    def order(self, epoch: int) -> list[int]:
        """The sample numbers of an epoch in training order, over all ranks."""
        if not self.shuffle:
            return list(range(self.num_samples))
        draw = torch.Generator().manual_seed(self.seed + epoch)  # as torch's DistributedSampler
        return torch.randperm(self.num_samples, generator=draw).tolist()

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """This rank's batches of an epoch, beginning with batch `start`."""
        mine = self.order(epoch)[self.mesh.data_rank :: self.mesh.data_size][start * self.batch_size :]
        return iter(Batches(self.dataset, mine, self.batch_size, self._collate, self.device, drop_last=True))

    def samples(self, step: int) -> list[int]:
        """The sample numbers of optimizer step `step` (from 0), over all ranks."""
        epoch, done = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[done * self.samples_per_step : (done + 1) * self.samples_per_step]
