"""The fingerprint of a run: what a resumed run must share with the run that it continues."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torchtune import utils

from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import is_hf_decoder
from layerskip_recipes.families.reading import read_hf_config
from layerskip_recipes.folders.model_folder import base_folder, model_folder
from layerskip_recipes.model.adapters import adapter_names
from layerskip_recipes.model.draft import weights_hash
from layerskip_recipes.processes import from_rank_zero
from layerskip_recipes.training.batches import TrainingData
from layerskip_recipes.training.config import FinetuneConfig

log = utils.get_logger("INFO")
# A resumed run must have the same values for these keys. Other keys may change, such as lr, logging or the number of
# ranks, and within these sections the memory settings of FREE_SETTINGS.
SAME_KEYS = {
    *("model", "dtype", "compute_dtype", "dataset", "collate_fn", "shuffle"),
    *("layer_dropout", "early_exit_loss", "draft", "loss", "optimizer_in_bwd"),
}
FREE_SETTINGS = ("chunk_tokens", "num_output_chunks")
STEPS = "steps of the run"


def template_of(cfg: FinetuneConfig, tokenizer: Any) -> str:
    """The text of the tokenizer's chat template."""
    source = getattr(getattr(tokenizer, "template", None), "source", None)
    return source or str(cfg.tokenizer.get("prompt_template"))


def run_fingerprint(cfg: FinetuneConfig, data: TrainingData, tokenizer: Any, samples_hash: str) -> dict[str, Any]:
    """The settings, sizes and content of the data that a resumed run must share.

    A folder may move, or lie elsewhere on another machine, so the fingerprint has what is in it instead of its path.
    """
    fingerprint = dict(sorted(cfg.model_dump(include=SAME_KEYS).items()))
    datasets = [_with_file_names(part.section) for part in cfg.dataset]
    fingerprint["dataset"] = datasets[0] if len(datasets) == 1 else datasets
    if is_hf_decoder(cfg.meta_model):
        config = read_hf_config(base_folder(model_folder(cfg.model.builder.get("path"))))
        fingerprint["model"] = _without_path(cfg.model.section)
        fingerprint["config.json"] = config.model_dump()
    fingerprint["optimizer._component_"] = cfg.optimizer.path  # another optimizer cannot use its state
    template = template_of(cfg, tokenizer)
    fingerprint["the hash of the chat template"] = hashlib.sha256(template.encode()).hexdigest()[:16]
    fingerprint["tokenizer.max_seq_len"] = getattr(tokenizer, "max_seq_len", None)
    fingerprint["samples in the dataset"] = data.num_samples
    fingerprint["batch_size x gradient_accumulation_steps x data-parallel ranks"] = data.samples_per_step
    fingerprint["steps in an epoch"] = data.steps_per_epoch
    fingerprint[STEPS] = data.total_steps
    fingerprint["the hash of the samples' tokens and labels"] = samples_hash
    return fingerprint


def base_fingerprint(cfg: FinetuneConfig, weights: Mapping[str, torch.Tensor] | None) -> dict[str, Any]:
    """The weights that adapters, or a draft for a frozen model, are trained on; empty without these. Collective."""
    if not (adapter_names(cfg.meta_model) or cfg.freezes_model):
        return {}
    return {"the hash of the model's weights": from_rank_zero(weights_hash(weights) if weights else None)}


def _without_path(section: Mapping[str, Any]) -> dict[str, Any]:
    """A model's section without the path of its folder, also in a section `base`."""
    return {
        key: _without_path(value) if isinstance(value, Mapping) else value
        for key, value in section.items()
        if key != "path"
    }


def _with_file_names(value: Any) -> Any:
    """A dataset's section with existing paths shortened to their last part."""
    if isinstance(value, Mapping):
        return {key: _with_file_names(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_file_names(part) for part in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().exists() else value


def _differences(before: Any, after: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the dotted keys whose values differ, with both values; None for a missing one.

    Values are compared as text: a rerun of a logged config reads the string "3" back as the number 3.
    """
    if isinstance(before, dict) and isinstance(after, dict):
        for name in dict.fromkeys([*after, *before]):
            if name not in FREE_SETTINGS:
                yield from _differences(before.get(name), after.get(name), f"{key}.{name}" if key else name)
    elif before != after and str(before) != str(after):
        yield key, before, after


def _shared(values: Any, other: Any) -> Any:
    """The values of the keys, at every level, that the other one has too."""
    if not (isinstance(values, dict) and isinstance(other, dict)):
        return values
    return {name: _shared(value, other[name]) for name, value in values.items() if name in other}


def check_resumable(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises a ConfigError that names the changed settings."""
    before, model = {key: before.get(key) for key in after}, "config.json"
    if before.get(model):  # other versions noted more keys or fewer
        before = before | {model: _shared(before[model], after[model])}
        after = after | {model: _shared(after[model], before[model])}
    changed = [*_differences(before, after)]
    for key, noted, value in changed:
        if key == STEPS:
            log.warning(
                f"resume_from_checkpoint: the run ends at step {value} now, before at {noted}. This changes what "
                "depends on the run's length: the gradual curriculum, layer dropout's schedules except constant, "
                "learning rate schedules"
            )
    if mistakes := [
        f"resume_from_checkpoint: {key} was {noted!r} and is {value!r} now. A resumed run must keep its settings; to "
        "start anew set resume_from_checkpoint=false and another output_dir"
        for key, noted, value in changed
        if key != STEPS
    ]:
        raise ConfigError(*mistakes)
