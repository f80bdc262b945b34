"""The `dataset` and `collate_fn` of a config: one torchtune dataset or several, packed or padded; in which order."""

import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchtune import utils
from torchtune.config._utils import _get_component_from_path
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import create_block_causal_mask

from layerskip_recipes.config.checks import PACKAGE
from layerskip_recipes.config.settings import build, check_component, text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import is_plain_attention
from layerskip_recipes.processes import is_rank_zero
from layerskip_recipes.training.parallel import Mesh

log = utils.get_logger("INFO")
PADDED = "torchtune.data.padded_collate_sft"
COLLATE_EXAMPLE = f"for example collate_fn={PADDED}"


def check_dataset(key: str, value: Any) -> None:
    """Raises a ValueError unless value is a dataset's section or a list of them."""
    sections = list(value) if isinstance(value, ListConfig) and value else [value]
    for section in sections:
        check_component(section, key, positional=1)
        if section.get("streaming"):
            raise ConfigError(f"{key}.streaming: True, but an epoch is a number of samples. Set {key}.streaming=false")
    if len({bool(section.get("packed")) for section in sections}) > 1:
        raise ConfigError(
            f"{key}: some are packed and some are not. Allowed: all or none; for example packed: false in each"
        )


def check_collate_fn(key: str, value: Any) -> None:
    """Raises a ValueError unless value is null or the path of a collator for training."""
    if value is not None:
        text(PADDED)(key, value)
        if "left_pad_sequence" in value:
            raise ConfigError(f"{key}: {value!r} is for inference; for example {key}={PADDED}")
        section = OmegaConf.create({"_component_": value})
        check_component(section, key, positional=1, given=["padding_idx", "ignore_idx"])


def sections_of(cfg: DictConfig, key: str = "dataset") -> list[DictConfig]:
    """The datasets of a config, one or several."""
    return list(cfg[key]) if isinstance(cfg[key], ListConfig) else [cfg[key]]


def limit_samples(cfg: DictConfig, tokenizer: Any, model: TransformerDecoder) -> None:
    """Let a tokenizer without a limit cut samples at the model's length: one that is longer would end the training.

    Packs are of the tokenizer's length, which the user has to say.

    Raises:
        ValueError: if its limit is above the model's.
    """
    limit = getattr(tokenizer, "max_seq_len", 0)
    given = [section for key in ("dataset", "dataset_val") if cfg.get(key) for section in sections_of(cfg, key)]
    if limit is None and not any(section.get("packed") for section in given):
        tokenizer.max_seq_len = model.max_seq_len
    elif limit and limit > model.max_seq_len:
        raise ConfigError(
            f"tokenizer.max_seq_len: {limit} is more than the model's max_seq_len {model.max_seq_len}; for example "
            f"tokenizer.max_seq_len={model.max_seq_len}"
        )


def packed_with_dense_mask(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """`padded_collate_packed` with a mask for any attention; where there is a GPU its own is for flex attention."""
    stacked = {key: torch.stack([sample[key] for sample in batch]) for key in ("tokens", "labels", "input_pos")}
    return stacked | {"mask": create_block_causal_mask([sample["seq_lens"] for sample in batch])}


def load_data(
    cfg: DictConfig,
    tokenizer: Any,
    model: TransformerDecoder,
    device: torch.device,
    ignore_index: int = -100,
    key: str = "dataset",
) -> tuple["Numbered", Callable]:
    """The dataset of a config, and what makes a batch of its samples.

    Args:
        cfg: `dataset` and `collate_fn` are read; packed datasets have a collator of their own.
        tokenizer: for the datasets, and its pad_id for the padding.
        model, device: whose attention takes the masks of packed samples.
        ignore_index: the label of what is padded.
        key: of the dataset in the config.

    Raises:
        ValueError: if a dataset refuses its arguments, or cannot make a sample.
    """
    sections = sections_of(cfg, key)
    datasets = []
    for section in sections:
        with _reading(section, key):  # packed ones read all of it
            datasets.append(build(section, key, tokenizer))
    dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets=datasets)
    packed = getattr(dataset, "packed", False) or any(section.get("packed", False) for section in sections)
    numbered = Numbered(dataset, key, packed)
    if packed:
        flex = device.type == "cuda" and all(is_plain_attention(x) and not x.attn.attn_dropout for x in model.layers)
        return numbered, padded_collate_packed if flex else packed_with_dense_mask
    name = cfg.get("collate_fn") or PADDED
    collate = partial(_get_component_from_path(name), padding_idx=tokenizer.pad_id, ignore_idx=ignore_index)
    needed = {"tokens", "labels"}
    for part, section in zip(datasets, sections, strict=True):
        with _reading(section, key, part):
            sample = part[0] if len(part) else dict.fromkeys(needed)
        if not (isinstance(sample, Mapping) and needed <= sample.keys()):
            what = f"a {type(sample).__name__}"
            if isinstance(sample, Mapping):
                what = ", ".join(map(str, sample)) or "empty"
            raise ConfigError(
                f"{key}: samples of {section._component_} are {what}. Allowed: samples with tokens and labels, such as "
                f"those of torchtune.datasets.chat_dataset"
            )
    if len(dataset):
        try:
            batch = collate([dataset[0]])
        except (KeyError, TypeError) as e:  # it may be for samples of another kind
            raise ConfigError(f"collate_fn: {name!r} fails at these samples ({e!r}); {COLLATE_EXAMPLE}") from e
        if not isinstance(batch, dict) or not needed <= batch.keys():
            raise ConfigError(f"collate_fn: {name!r} makes no batch of tokens and labels; {COLLATE_EXAMPLE}")
    return numbered, collate


class Numbered(Dataset):
    """A dataset whose errors say at which sample they happened; but those of a user's own code stay as they are.

    Args:
        dataset: of samples.
        key: of the dataset in the config.
        packed: whether its samples are packs.
    """

    def __init__(self, dataset: Dataset, key: str, packed: bool = False) -> None:
        self.dataset, self.key, self.packed = dataset, key, packed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        try:
            return self.dataset[i]
        except Exception as e:
            if (
                i >= len(self) or isinstance(e, ConfigError) or _in_users_code(e)
            ):  # behind its end: how Python ends a loop over it
                raise
            raise ConfigError(f"{self.key}: its sample {i}, counted from 0, cannot be read: {_cause(e)}") from e


def _in_users_code(error: Exception) -> bool:
    """Whether a file ran on the way that is neither a library's nor ours."""
    files = {Path(frame.f_code.co_filename) for frame, _ in traceback.walk_tb(error.__traceback__)}
    libraries = (PACKAGE, Path(sysconfig.get_path("stdlib")))
    return any(
        file.is_file() and "site-packages" not in file.parts and not any(map(file.is_relative_to, libraries))
        for file in files
    )


def _cause(error: Exception) -> str:
    """What an error says; where it only says that something failed, what was behind it."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return repr(error)


@contextmanager
def _reading(section: DictConfig, key: str, dataset: Dataset | None = None) -> Iterator[None]:
    """A torchtune dataset looks for its columns, and a template at its messages, only when samples are asked for. An
    error in a component of the user's own stays as it is: it shows where."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ConfigError) or not section._component_.startswith("torchtune."):
            raise
        if type(e).__module__.partition(".")[0] == "datasets":  # the files, not what they hold
            raise ConfigError(f"{key}: {section._component_} cannot read its files: {_cause(e)}") from e
        columns = getattr(getattr(dataset, "_data", None), "column_names", None)
        there = f" Its columns: {', '.join(columns)}." if columns else ""
        raise ConfigError(
            f"{key}: {section._component_} cannot read its samples ({e!r}).{there} Which of them it reads is an "
            f"argument, such as column, column_map or conversation_column; for example {key}.column=text"
        ) from e


class TrainingData:
    """The batches of a run: which samples a step takes follows from seed, epoch and position alone.

    The samples of a step are the same for any number of data-parallel ranks, if batch_size x ranks stays.

    Args:
        cfg: `dataset`, `collate_fn`, `batch_size`, `gradient_accumulation_steps`, `shuffle`, `max_steps_per_epoch`.
        tokenizer, model, device, ignore_index: see `load_data`.
        mesh: each data-parallel rank takes every n-th sample.
        seed: of the order; the same on all ranks.

    Raises:
        ValueError: if the samples make no step.
    """

    def __init__(
        self,
        cfg: DictConfig,
        tokenizer: Any,
        model: TransformerDecoder,
        device: torch.device,
        ignore_index: int,
        mesh: Mesh,
        seed: int,
    ) -> None:
        self.dataset, self._collate = load_data(cfg, tokenizer, model, device, ignore_index)
        self.cut_at = None if self.dataset.packed else getattr(tokenizer, "max_seq_len", None)
        self.said_cut = not is_rank_zero()
        self.num_samples = len(self.dataset)
        self.batch_size, accumulation = cfg.get("batch_size", 1), cfg.get("gradient_accumulation_steps", 1)
        self.shuffle, self.seed, self.mesh = bool(cfg.get("shuffle", True)), seed, mesh
        self.samples_per_step = self.batch_size * accumulation * mesh.data_size
        steps = self.num_samples // self.samples_per_step
        if steps < 1:
            ranks = f" x {mesh.data_size} data-parallel ranks" if mesh.data_size > 1 else ""
            raise ConfigError(
                f"dataset: {self.num_samples} samples make no step of batch_size {self.batch_size} x "
                f"gradient_accumulation_steps {accumulation}{ranks}; lower one of them"
            )
        self.steps_per_epoch = min(steps, cfg.get("max_steps_per_epoch") or steps)
        self.first_length = len(self.dataset[0]["tokens"])

    def warn_of_cuts(self, tokens: torch.Tensor) -> None:
        """Say once that samples are cut: a tokenizer does it without a word, perhaps before the answer begins."""
        if self.said_cut or self.cut_at is None or tokens.shape[1] < self.cut_at:
            return
        self.said_cut = True
        log.warning(
            f"dataset: there are samples of tokenizer.max_seq_len={self.cut_at} tokens or more; what is beyond is cut "
            "off and not learned"
        )

    def order(self, epoch: int) -> list[int]:
        """The numbers of the samples of an epoch, in the order of the training, for all ranks."""
        everyone = DistributedSampler(
            self.dataset, num_replicas=1, rank=0, shuffle=self.shuffle, seed=self.seed, drop_last=True
        )
        everyone.set_epoch(epoch)
        return list(everyone)

    def batches(self, epoch: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """This rank's batches of an epoch, from batch number `start` on."""
        mine = self.order(epoch)[self.mesh.data_rank :: self.mesh.data_size][start * self.batch_size :]
        return iter(
            DataLoader(
                self.dataset,
                batch_size=self.batch_size,
                sampler=mine,
                collate_fn=self._collate,
                drop_last=True,
                generator=torch.Generator(),  # the global one moves by what the model draws only
            )
        )

    def samples(self, step: int) -> list[int]:
        """The numbers of the samples that optimizer step `step` (from 0) takes on all ranks."""
        epoch, done = divmod(step, self.steps_per_epoch)
        return self.order(epoch)[done * self.samples_per_step : (done + 1) * self.samples_per_step]
