"""PEFT's LoRA, as TRL and Unsloth save it, merged into its base model's weights while they are read."""

import math
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torchtune.utils import get_logger

from layerskip_recipes.config.paths import read_json
from layerskip_recipes.errors import ConfigError, first_line
from layerskip_recipes.families.hf_config import HFConfig
from layerskip_recipes.families.hf_decoder import build_decoder
from layerskip_recipes.families.hf_names import to_files
from layerskip_recipes.folders.model_folder import ADAPTERS
from layerskip_recipes.model.adapters import check_tensors

log = get_logger("INFO")
FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
UPDATE = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")  # of an embedding, A and B are transposed
EMBEDDING = "model.embed_tokens"


class PeftAdapters:
    """The adapters of a folder. Building it checks all of them against the base's config, and reads no tensors."""

    def __init__(self, folder: Path, config: HFConfig, key: str = "checkpointer.path") -> None:
        self.file, where = folder / FILE, f"{key}: the adapters in {str(folder)!r}"
        described = read_json(folder / ADAPTERS, key)
        try:
            with safe_open(self.file, "pt") as file:
                sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as e:
            raise ConfigError(f"{where} cannot be read ({first_line(e)}). Allowed: {FILE}, complete") from e
        shapes = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
        # Sort the tensors: LoRA's A and B of each matrix, and whole tensors that replace the base's.
        self.updates: dict[str, dict[str, str]] = {}  # {the tensor that changes: {"A": name, "B": name}}
        self.replaced: dict[str, str] = {}
        self.scales: dict[str, float] = {}
        changes: dict[str, torch.Tensor] = {}
        for name in shapes:
            place_of = name.removeprefix(PREFIX)
            if update := UPDATE.fullmatch(place_of):
                self.updates.setdefault(f"{update[1]}.weight", {})[update[2]] = name
            else:
                place = place_of.replace(".base_layer.", ".")
                self.replaced[place], changes[place] = name, shapes[name]
        for place, pair in self.updates.items():
            if pair.keys() != {"A", "B"}:
                raise ConfigError(f"{where} lack A or B for {place}. Save them again")
            module = place.removesuffix(".weight")
            a, b = shapes[pair["A"]], shapes[pair["B"]]
            self.scales[place] = _scale(described, module, rank=len(a), where=where)
            changes[place] = (b @ a).T if module == EMBEDDING else b @ a
        # Compare them with the model.
        with torch.device("meta"):
            parameters = to_files(build_decoder(config, max_seq_len=1).state_dict(), config)
        if config.tie_word_embeddings and any(place.startswith((EMBEDDING, "lm_head")) for place in changes):
            raise ConfigError(
                f"{where} change the embedding or the head, which the base model ties. Allowed: adapters of layers"
            )
        expected = {name: value for name, value in parameters.items() if name in changes}
        check_tensors(expected, changes, f"{where} do not fit the base model, it")

    def merge(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The base's tensors with W + scale B A for each update, in the wider dtype of base and adapters."""
        adapters = load_file(self.file)
        merged = dict(tensors) | {place: adapters[name] for place, name in self.replaced.items()}
        for place, pair in self.updates.items():
            weight, a, b = merged[place], adapters[pair["A"]], adapters[pair["B"]]
            dtype = torch.promote_types(weight.dtype, a.dtype)
            wide = torch.promote_types(dtype, torch.float32)
            update = b.to(wide) @ a.to(wide) * self.scales[place]
            merged[place] = (weight.to(wide) + (update.T if place == f"{EMBEDDING}.weight" else update)).to(dtype)
        log.info(f"Merged the adapters of {len(self.updates)} matrices in {self.file} into the base model.")
        return merged


def _scale(described: Mapping, module: str, rank: int, where: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
    patterns = described.get("alpha_pattern") or {}
    try:
        matching = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = next(chain(matching, [described["lora_alpha"]]))
        return alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
    except (KeyError, TypeError, AttributeError, re.error, ZeroDivisionError) as e:
        raise ConfigError(f"{where} have no usable lora_alpha or alpha_pattern in {ADAPTERS} ({e!r})") from e
