"""The sections `dataset` and `collate_fn`: one or several torchtune datasets, packed or padded."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo
from torch.utils.data import Dataset
from torchtune.config._utils import _get_component_from_path
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed
from torchtune.datasets import ConcatDataset
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import create_block_causal_mask

from layerskip_recipes.config.components import Component, Takes
from layerskip_recipes.config.schema import Text
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import is_plain_attention

PADDED = "torchtune.data.padded_collate_sft"
COLLATE_EXAMPLE = f"for example collate_fn={PADDED}"

# ---- the settings ----


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _check_datasets(datasets: list[Component], info: ValidationInfo) -> list[Component]:
    if not datasets:
        raise ConfigError(f": [] is not allowed. Allowed: {Component.ALLOWED[0]}, or a list of them")
    if any(dataset.get("streaming") for dataset in datasets):
        raise ConfigError(f".streaming: True, but an epoch needs a length. Set {info.field_name}.streaming=false")
    if len({bool(dataset.get("packed")) for dataset in datasets}) > 1:
        raise ConfigError(": some are packed and some are not. Allowed: all or none; for example packed: false in each")
    return datasets


def _check_collate_fn(path: str) -> str:
    if "left_pad_sequence" in path:
        raise ConfigError(f": {path!r} is for inference; {COLLATE_EXAMPLE}")
    collate = Component({"_component_": path}, "collate_fn")
    collate.given, collate.positional = ("padding_idx", "ignore_idx"), 1
    collate.check()
    return path


_Dataset = Annotated[Component, Takes(positional=1)]
Datasets = Annotated[
    list[_Dataset],
    BeforeValidator(_as_list, json_schema_input_type=_Dataset | list[_Dataset]),
    AfterValidator(_check_datasets),
]
CollateFn = Annotated[Text, AfterValidator(_check_collate_fn), Field(examples=[PADDED])] | None

# ---- reading ----


def limit_samples(datasets: Iterable[Component], tokenizer: Any, model: TransformerDecoder) -> None:
    """Truncate samples at the model's max_seq_len if the tokenizer has no limit.

    Packed datasets need the user's limit: it is the length of a pack.
    """
    limit = getattr(tokenizer, "max_seq_len", 0)
    if limit is None and not any(dataset.get("packed") for dataset in datasets):
        tokenizer.max_seq_len = model.max_seq_len
    elif limit and limit > model.max_seq_len:
        raise ConfigError(
            f"tokenizer.max_seq_len: {limit} is more than the model's max_seq_len {model.max_seq_len}; for example "
            f"tokenizer.max_seq_len={model.max_seq_len}"
        )


def collate_packed(batch: list[dict[str, Any]], flex: bool) -> dict[str, Any]:
    """Collate packed samples without labels across texts. `flex` gives torchtune's masks, which need FlexAttention."""
    samples = [sample | {"labels": sample["labels"].clone()} for sample in batch]
    for sample in samples:
        sample["labels"][sample["seq_lens"].cumsum(0)[:-1]] = CROSS_ENTROPY_IGNORE_IDX
    if flex:
        return padded_collate_packed(samples)
    stacked = {key: torch.stack([sample[key] for sample in samples]) for key in ("tokens", "labels", "input_pos")}
    return stacked | {"mask": create_block_causal_mask([sample["seq_lens"] for sample in samples])}


def load_data(
    sections: Sequence[Component],
    collate_fn: str | None,
    tokenizer: Any,
    model: TransformerDecoder,
    device: torch.device,
) -> tuple["IndexedErrorDataset", Callable]:
    """Load the datasets of a config as one dataset, with its collate function.

    `collate_fn` is a dotted path for padded samples; packed samples always use `collate_packed`.
    """
    # Build the datasets.
    parts = []
    for section in sections:
        with _explained_errors(section):  # a packed dataset reads all of its samples when it is built
            parts.append(section.build(tokenizer))
    dataset = parts[0] if len(parts) == 1 else ConcatDataset(datasets=parts)
    packed = getattr(dataset, "packed", False) or any(section.get("packed", False) for section in sections)
    indexed = IndexedErrorDataset(dataset, sections[0].key, packed, all(map(_is_torchtunes, sections)))
    # Choose the collate function, and try it with the first sample.
    if packed:
        flex = device.type == "cuda" and all(is_plain_attention(x) and not x.attn.attn_dropout for x in model.layers)
        return indexed, partial(collate_packed, flex=flex)
    for section, part in zip(sections, parts, strict=True):
        _check_first_sample(section, part)
    path = collate_fn or PADDED
    collate = partial(_get_component_from_path(path), padding_idx=tokenizer.pad_id, ignore_idx=CROSS_ENTROPY_IGNORE_IDX)
    if len(dataset):
        try:
            batch = collate([dataset[0]])
        except (KeyError, TypeError) as e:  # a collator for samples of another kind
            raise ConfigError(f"collate_fn: {path!r} cannot collate these samples ({e!r}); {COLLATE_EXAMPLE}") from e
        if not isinstance(batch, dict) or not {"tokens", "labels"} <= batch.keys():
            raise ConfigError(f"collate_fn: {path!r} makes no batch of tokens and labels; {COLLATE_EXAMPLE}")
    return indexed, collate


def _check_first_sample(section: Component, dataset: Dataset) -> None:
    if not len(dataset):  # type: ignore[arg-type]
        return
    with _explained_errors(section, dataset):
        sample = dataset[0]
    is_mapping = isinstance(sample, Mapping)
    if not is_mapping or not {"tokens", "labels"} <= sample.keys():
        shown = (", ".join(map(str, sample)) or "empty") if is_mapping else f"a {type(sample).__name__}"
        raise ConfigError(
            f"{section.key}: samples of {section.path} are {shown}. Allowed: samples with tokens and labels, such as "
            "samples of torchtune.datasets.chat_dataset"
        )


class IndexedErrorDataset(Dataset):
    """A dataset whose errors name the sample; with named=False (a user's own dataset) they keep their traceback."""

    def __init__(self, dataset: Dataset, key: str, packed: bool = False, named: bool = True) -> None:
        self.dataset, self.key, self.packed, self.named = dataset, key, packed, named

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        try:
            return self.dataset[i]
        except Exception as e:
            # Python ends a loop by an IndexError past the end.
            if i >= len(self) or isinstance(e, ConfigError) or not self.named:
                raise
            raise ConfigError(f"{self.key}: its sample {i}, counted from 0, cannot be read: {_root_cause(e)}") from e


def _is_torchtunes(section: Component) -> bool:
    return section.path.startswith("torchtune.")


def _root_cause(error: BaseException) -> str:
    """The first error of a chain: later errors often only say that reading failed."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return repr(error)


@contextmanager
def _explained_errors(section: Component, dataset: Dataset | None = None) -> Iterator[None]:
    """Turn errors of a torchtune dataset into ConfigErrors; errors of a user's own dataset keep their traceback."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ConfigError) or not _is_torchtunes(section):
            raise
        if type(e).__module__.partition(".")[0] == "datasets":  # broken files, not missing columns
            raise ConfigError(f"{section.key}: {section.path} cannot read its files: {_root_cause(e)}") from e
        columns = getattr(getattr(dataset, "_data", None), "column_names", None)
        there = f" Its columns: {', '.join(columns)}." if columns else ""
        raise ConfigError(
            f"{section.key}: {section.path} cannot read its samples ({e!r}).{there} Choose the columns with "
            f"column, column_map or conversation_column; for example {section.key}.column=text"
        ) from e
