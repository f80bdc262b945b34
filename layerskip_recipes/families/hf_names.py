"""From weights with torchtune's names to the tensors of Hugging Face's files, and back, by a family's names."""

import re
from collections.abc import Mapping

import torch

from layerskip_recipes.families.hf_config import HFConfig

IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def hf_name(name: str, config: HFConfig) -> str:
    """Translate torchtune's name of a parameter or module to Hugging Face's, ignoring joined matrices."""
    in_layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if in_layer is None:
        return config.OUTER_NAMES[name]
    index, rest = in_layer.groups()
    ours, theirs = next(pair for pair in config.LAYER_NAMES.items() if rest.startswith(pair[0]))
    return f"{config.OUTER_NAMES['layers']}.{index}.{theirs}{rest.removeprefix(ours)}"


def place_in_files(name: str, config: HFConfig) -> tuple[str, slice]:
    """The tensor in Hugging Face's files that holds torchtune's parameter or module `name`, and its rows there."""
    name = hf_name(name, config)
    heads, key_heads, head_dim = config.heads
    num_rows = {"q_proj": heads * head_dim, "k_proj": key_heads * head_dim, "v_proj": key_heads * head_dim}
    for joined, parts in config.JOINED.items():
        start = 0
        for part in parts:
            end = start + num_rows.get(part, config.intermediate_size)
            if part in name.split("."):
                return name.replace(part, joined), slice(start, end)
            start = end
    return name, slice(None)


def of_text_model(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a folder's text model by their usual names, without those of images."""
    names = {name: re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", name) for name in tensors}
    return {names[name]: value for name, value in tensors.items() if not IMAGES.match(names[name])}


def to_files(state: Mapping[str, torch.Tensor], config: HFConfig) -> dict[str, torch.Tensor]:
    """Convert a state_dict with torchtune's names to the tensors of Hugging Face's files."""
    tensors: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for name, value in state.items():
        file_name, rows = place_in_files(name, config)
        tensors.setdefault(file_name, []).append((rows.start or 0, value))
    return {
        name: parts[0][1] if len(parts) == 1 else torch.cat([value for _, value in sorted(parts, key=lambda p: p[0])])
        for name, parts in tensors.items()
    }


def from_files(
    tensors: Mapping[str, torch.Tensor], names: Mapping[str, torch.Tensor], config: HFConfig
) -> dict[str, torch.Tensor]:
    """A state_dict with torchtune's `names`, as views of `tensors`; names missing there are left out."""
    places = {name: place_in_files(name, config) for name in names}
    return {name: tensors[file_name][rows] for name, (file_name, rows) in places.items() if file_name in tensors}
