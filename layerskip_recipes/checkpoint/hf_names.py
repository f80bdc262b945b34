"""The names of a model's weights in Hugging Face's files and in torchtune: only names, and Phi's joined matrices."""

import re
from collections.abc import Mapping

import torch

from layerskip_recipes.model.hf_config import HFConfig

# Beginnings of a parameter's name within its layer, torchtune's first.
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
# Matrices that Phi's files hold as one, row below row.
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def hf_name(name: str, config: HFConfig) -> str:
    """Hugging Face's name of the parameter or module that torchtune calls `name`, as if no matrices were joined."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if found is None:
        return OUTER[name]
    names = GEMMA2 if config.architecture == "Gemma2ForCausalLM" else LAYER
    ours = next(part for part in names if found[2].startswith(part))
    return f"model.layers.{found[1]}.{names[ours]}{found[2].removeprefix(ours)}"


def place_in_files(name: str, config: HFConfig) -> tuple[str, slice]:
    """Where torchtune's parameter or module `name` is in Hugging Face's files: the name of the tensor, and its rows."""
    name = hf_name(name, config)
    if config.architecture == "Phi3ForCausalLM":
        heads, key_heads, width = config.heads
        rows = {
            "qkv_proj": [heads * width, key_heads * width, key_heads * width],
            "gate_up_proj": [config.intermediate_size] * 2,
        }
        for whole, parts in JOINED.items():
            for i, part in enumerate(parts):
                if part in name.split("."):
                    start = sum(rows[whole][:i])
                    return name.replace(part, whole), slice(start, start + rows[whole][i])
    return name, slice(None)


def to_files(state: Mapping[str, torch.Tensor], config: HFConfig) -> dict[str, torch.Tensor]:
    """The tensors of Hugging Face's files of a state_dict with torchtune's names."""
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
    """The state_dict with torchtune's `names`, views of the files' tensors; names that the files lack are left out."""
    places = {name: place_in_files(name, config) for name in names}
    return {name: tensors[file_name][rows] for name, (file_name, rows) in places.items() if file_name in tensors}
