"""The sections `dataset` and `collate_fn`: one or several torchtune datasets, packed or padded."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import AfterValidator, BeforeValidator, Field
from torch.utils.data import DataLoader, Dataset
from torchtune.config._utils import _get_component_from_path
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_packed, validate_messages
from torchtune.datasets import ConcatDataset
from torchtune.modules import TransformerDecoder
from torchtune.modules.attention_utils import create_block_causal_mask

from layerskip_recipes.config.components import Component, Takes, parameter_names
from layerskip_recipes.config.schema import Text, check
from layerskip_recipes.data.conversations import ChatDataset
from layerskip_recipes.data.tokenizer import HFTokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.model.decoder import is_plain_attention
from layerskip_recipes.processes import is_rank_zero, num_local_processes

PADDED = "torchtune.data.padded_collate_sft"
MOST_WORKERS = 4  # that read ahead for each GPU

# ---- the settings ----


def _check_collate_fn(path: str) -> str:
    collate = Component({"_component_": path}, "collate_fn")
    collate.given, collate.positional = ("padding_idx", "ignore_idx"), 1
    collate.check()
    return path


_Dataset = Annotated[Component, Takes(positional=1)]
Datasets = Annotated[
    list[_Dataset],
    BeforeValidator(lambda v: v if isinstance(v, list) else [v], json_schema_input_type=_Dataset | list[_Dataset]),
    Field(min_length=1),
]
CollateFn = Annotated[Text, AfterValidator(_check_collate_fn), Field(examples=[PADDED])] | None

# ---- reading ----


def limit_samples(datasets: Iterable[Component], tokenizer: Any, model: TransformerDecoder) -> None:
    """Truncate samples at the model's max_seq_len if the tokenizer has no limit. Packs need a limit: their length."""
    limit = getattr(tokenizer, "max_seq_len", 0)
    if limit is None and not any(dataset.get("packed") for dataset in datasets):
        tokenizer.max_seq_len = model.max_seq_len
    elif limit:
        most = Field(ge=1, le=model.max_seq_len, examples=[model.max_seq_len])
        check("tokenizer.max_seq_len", limit, Annotated[int, most])


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
    """Load the datasets of a config as one, with its collate function: `collate_packed`, or `collate_fn` if padded."""
    # Build the datasets.
    if len({bool(section.get("packed")) for section in sections}) > 1:
        raise ConfigError(
            f"{sections[0].key}: some datasets of the list are packed, others not. Set packed=true in all or none"
        )
    parts = []
    for section in sections:
        builder = section
        if section.path == "torchtune.datasets.chat_dataset":
            builder = section.replace(_component_="layerskip_recipes.data.conversations.chat_dataset")
            builder.path = section.path  # for messages
        with _explained_errors(section, "its data"):  # a packed dataset reads all of its samples when it is built
            parts.append(builder.build(tokenizer))
        if is_rank_zero():
            _check_messages(section, parts[-1], tokenizer)
    dataset = parts[0] if len(parts) == 1 else ConcatDataset(datasets=parts)
    packed = getattr(dataset, "packed", False) or any(section.get("packed", False) for section in sections)
    indexed = IndexedErrorDataset(dataset, next((s for s in sections if _is_users(s)), sections[0]), packed)
    # Choose the collate function, and try it with the first samples.
    if packed:
        fits_layers = all(
            is_plain_attention(x) and not x.attn.attn_dropout and getattr(x.attn, "window", None) is None
            for x in model.layers
        )
        flex = device.type == "cuda" and fits_layers
        return indexed, partial(collate_packed, flex=flex)
    path = collate_fn or PADDED
    collate = partial(_get_component_from_path(path), padding_idx=tokenizer.pad_id, ignore_idx=CROSS_ENTROPY_IGNORE_IDX)
    for section, part in zip(sections, parts, strict=True):
        if not len(part):
            continue
        with _explained_errors(section, "its first sample", part):
            sample = part[0]
        try:
            batch = collate([sample])
        except (KeyError, TypeError, IndexError):  # a collator for samples of another kind
            batch = None
        if not isinstance(batch, dict) or not {"tokens", "labels"} <= batch.keys():
            shown = ", ".join(map(str, sample)) if isinstance(sample, Mapping) else f"a {type(sample).__name__}"
            raise ConfigError(
                f"collate_fn: {path!r} makes no tokens and labels of samples of {section.path} ({shown or 'empty'}). "
                f"Allowed: samples like those of torchtune.datasets.chat_dataset; for example collate_fn={PADDED}"
            )
    return indexed, collate


class Batches:
    """The batches of these samples, in this order. For a GPU, other processes read and tokenize samples ahead.

    Samples are collated here, since torchtune puts masks of packed samples on the GPU.
    """

    def __init__(
        self,
        dataset: Dataset,
        samples: Sequence[int],
        batch_size: int,
        collate: Callable,
        device: torch.device,
        drop_last: bool = False,
    ) -> None:
        self.dataset, self.samples, self.batch_size, self.collate = dataset, samples, batch_size, collate
        # One processor is left to the process that trains. Training on a CPU needs all of them.
        processors = (os.cpu_count() or 1) // num_local_processes()
        self.num_workers = 0 if device.type == "cpu" else max(min(MOST_WORKERS, processors - 1), 0)
        self.loader = DataLoader(
            dataset,
            batch_size,
            sampler=samples,
            collate_fn=_as_arrays if self.num_workers else list,
            drop_last=drop_last,
            num_workers=self.num_workers,
            multiprocessing_context="fork" if self.num_workers else None,  # open files cannot be pickled
            generator=torch.Generator(),  # draw nothing from the global generator, which the model uses
        )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self.loader)
        for first in range(0, len(self) * self.batch_size, self.batch_size):
            error = None
            try:
                samples = next(batches)
            except Exception as e:
                if not self.num_workers:
                    raise
                error = e.with_traceback(None)  # else it keeps the workers, and they wait for ten seconds
            if error is not None:
                del batches
                # A worker changes the error's text, so meet it here.
                _ = [self.dataset[i] for i in self.samples[first : first + self.batch_size]]
                raise error
            yield self.collate(_as_tensors(samples) if self.num_workers else samples)


def _as_arrays(samples: list[Any]) -> list[Any]:
    """Samples whose tensors are arrays, as a process sends each tensor by an open file, of which it has few."""
    return [_with(sample, torch.Tensor, torch.Tensor.numpy) for sample in samples]


def _as_tensors(samples: list[Any]) -> list[Any]:
    return [_with(sample, np.ndarray, torch.from_numpy) for sample in samples]


def _with(sample: Any, changed_type: type, change: Callable) -> Any:
    if not isinstance(sample, dict):
        return sample
    return {key: change(value) if isinstance(value, changed_type) else value for key, value in sample.items()}


def _check_messages(section: Component, dataset: Any, tokenizer: Any) -> None:
    """Refuse a bad conversation before the training, not in the middle: render all of them, without tokenizing."""
    transform = getattr(dataset, "_message_transform", None)
    if transform is None:
        return
    for i, row in enumerate(dataset._data):
        with _explained_errors(section, f"sample {i}, counted from 0", dataset):
            sample = transform(row)
            messages = sample.get("messages", [])
            if not isinstance(dataset, ChatDataset):
                validate_messages(messages)
            if isinstance(tokenizer, HFTokenizer):
                template, turns = tokenizer.conversation(messages, sample.get("tools"))
                template.render(turns)


class IndexedErrorDataset(Dataset):
    """A dataset whose errors name the sample, as `_explained_errors` does."""

    def __init__(self, dataset: Dataset, section: Component, packed: bool = False) -> None:
        self.dataset, self.section, self.packed = dataset, section, packed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, i: int) -> Any:
        if i >= len(self):
            raise IndexError(i)  # ends a loop
        with _explained_errors(self.section, f"sample {i}, counted from 0", self.dataset):
            return self.dataset[i]


def _is_users(section: Component) -> bool:
    return not section.path.startswith(("torchtune.", "layerskip_recipes."))


@contextmanager
def _explained_errors(section: Component, what: str, dataset: Dataset | None = None) -> Iterator[None]:
    """Turn errors of torchtune's and our datasets into ConfigErrors; those of a user's keep their traceback."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ConfigError) or _is_users(section):
            raise
        cause: BaseException = e
        while isinstance(cause.__cause__, Exception):  # later errors often only say that reading failed
            cause = cause.__cause__
        columns = getattr(getattr(dataset, "_data", None), "column_names", None)
        setting = next((name for name in parameter_names(section.path) or () if "column" in name), None)
        hint = ""
        if columns and setting and isinstance(cause, KeyError):
            works = f"{{input: {columns[0]}, output: {columns[-1]}}}" if setting == "column_map" else columns[0]
            hint = f'. Its columns: {", ".join(columns)}; for example "{section.key}.{setting}={works}"'
        raise ConfigError(f"{section.key}: {section.path} cannot read {what}: {cause!r}{hint}") from e
