"""The `dataset` and `collate_fn` of a config: one torchtune dataset or several, packed or padded."""

from collections.abc import Callable
from functools import partial
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch.utils.data import Dataset
from torchtune.config._utils import _get_component_from_path
from torchtune.data import padded_collate_packed
from torchtune.datasets import ConcatDataset

from layerskip_recipes.settings import build, check_component, text

PADDED = "torchtune.data.padded_collate_sft"


def check_dataset(key: str, value: Any) -> None:
    """Raises a ValueError unless value is a dataset's section or a list of them."""
    for section in value if isinstance(value, ListConfig) and value else [value]:
        check_component(section, key, positional=1)


def check_collate_fn(key: str, value: Any) -> None:
    """Raises a ValueError unless value is null or the path of a collator for training."""
    if value is not None:
        text(PADDED)(key, value)
        if "left_pad_sequence" in value:
            raise ValueError(f"{key}: {value!r} is for inference; for example {key}={PADDED}")
        section = OmegaConf.create({"_component_": value})
        check_component(section, key, positional=1, given=["padding_idx", "ignore_idx"])


def load_data(cfg: DictConfig, tokenizer: Any, ignore_index: int) -> tuple[Dataset, Callable]:
    """The dataset of a config, and what makes a batch of its samples.

    Args:
        cfg: `dataset` and `collate_fn` are read; packed datasets have a collator of their own.
        tokenizer: for the datasets, and its pad_id for the padding.
        ignore_index: the label of what is padded.

    Raises:
        ValueError: if a dataset refuses its arguments.
    """
    sections = cfg.dataset if isinstance(cfg.dataset, ListConfig) else [cfg.dataset]
    datasets = [build(section, "dataset", tokenizer) for section in sections]
    dataset = datasets[0] if len(datasets) == 1 else ConcatDataset(datasets=datasets)
    if getattr(dataset, "packed", False) or any(section.get("packed", False) for section in sections):
        return dataset, padded_collate_packed
    collate = _get_component_from_path(cfg.get("collate_fn") or PADDED)
    return dataset, partial(collate, padding_idx=tokenizer.pad_id, ignore_idx=ignore_index)
