"""Weight names in torchtune and in Hugging Face files, and the matrices that Phi's files join."""

import re
from collections.abc import Mapping

import torch

from layerskip_recipes.families.hf_config import HFConfig

# Name prefixes within a layer: torchtune's and Hugging Face's. The first prefix that matches counts.
LAYER = {
    "attn.output_proj": "self_attn.o_proj",
    "attn.q_norm.scale": "self_attn.q_norm.weight",
    "attn.k_norm.scale": "self_attn.k_norm.weight",
    "attn": "self_attn",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
    "sa_norm.scale": "input_layernorm.weight",
    "mlp_norm.scale": "post_attention_layernorm.weight",
}
GEMMA2 = LAYER | {
    "sa_scale.scale": "post_attention_layernorm.weight",
    "mlp_norm.scale": "pre_feedforward_layernorm.weight",
    "mlp_scale.scale": "post_feedforward_layernorm.weight",
}
OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "norm.rms_norm.scale": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# Phi's files concatenate these matrices along dim 0.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def hf_name(name: str, config: HFConfig) -> str:
    """Translate torchtune's name of a parameter or module to Hugging Face's, ignoring joined matrices."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found is None:
        return OUTER[name]
    names = GEMMA2 if config.architecture == "Gemma2ForCausalLM" else LAYER
    ours = next(part for part in names if found[2].startswith(part))
    return f"model.layers.{found[1]}.{names[ours]}{found[2].removeprefix(ours)}"


def place_in_files(name: str, config: HFConfig) -> tuple[str, slice]:
    """The tensor in Hugging Face's files that holds torchtune's parameter or module `name`, and its rows there."""
    name = hf_name(name, config)
    if config.architecture == "Phi3ForCausalLM":
        heads, key_heads, width = config.heads
        num_rows = {"q_proj": heads * width, "k_proj": key_heads * width, "v_proj": key_heads * width}
        for joined, parts in JOINED.items():
            start = 0
            for part in parts:
                end = start + num_rows.get(part, config.intermediate_size)
                if part in name.split("."):
                    return name.replace(part, joined), slice(start, end)
                start = end
    return name, slice(None)


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
