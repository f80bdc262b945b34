"""LoRA and DoRA adapters of torchtune's builders: initial values, files, checks, and merging into the weights.

If any module of a model has adapters, training changes only the adapters.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import get_adapter_params, get_merged_lora_ckpt, set_trainable_params

from layerskip_recipes.config.components import Component
from layerskip_recipes.config.paths import read_json
from layerskip_recipes.config.schema import check
from layerskip_recipes.errors import ConfigError

BIASES = "scaled biases"  # a key of a checkpoint's contents, in addition to torchtune's keys
ADAPTER_FILE = "adapter_model.pt"  # adapters in torchtune's own format
PEFT_FOLDER = "adapter"  # PEFT's files in a checkpoint that also has the merged weights

M = TypeVar("M", bound=nn.Module)


def adapter_modules(model: nn.Module) -> dict[str, Any]:
    """A model's LoRA or DoRA layers by name. Call it before layers are wrapped for activation checkpointing."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "adapter_params")}


def adapter_names(model: nn.Module) -> list[str]:
    return list(get_adapter_params(model))


def freeze_base(model: nn.Module) -> None:
    """Freeze all parameters except the adapters, if the model has any."""
    adapters = get_adapter_params(model)
    if adapters:
        set_trainable_params(model, adapters)


def fresh_adapters(model: nn.Module, base: Mapping[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Initial values of adapters, on the CPU: A as in a linear layer, B = 0, DoRA's magnitude |W|.

    They do not change the model's output yet. `base` is the state_dict of the other weights.
    """
    state, generator = {}, torch.Generator().manual_seed(seed)
    for name, module in adapter_modules(model).items():
        a = torch.empty(module.lora_a.weight.shape, dtype=module.lora_a.weight.dtype)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        state[f"{name}.lora_a.weight"] = a
        state[f"{name}.lora_b.weight"] = torch.zeros(module.lora_b.weight.shape, dtype=a.dtype)
        if hasattr(module, "magnitude"):
            weight = base[f"{name}.weight"]
            if isinstance(module.weight, NF4Tensor):  # the model computes with the rounded weights
                weight = to_nf4(weight.to(a.dtype), module.weight.block_size, module.weight.scaler_block_size)
                weight = weight.get_original_weight()
            state[f"{name}.magnitude"] = torch.linalg.norm(weight.float(), dim=1).to(a.dtype)
    return state


def adapter_config(model: nn.Module) -> dict[str, Any]:
    """The content of PEFT's adapter_config.json, with torchtune's module names."""
    modules = adapter_modules(model)
    first = next(iter(modules.values()))
    rank = first.lora_a.weight.shape[0]
    return {
        "r": rank,
        "lora_alpha": first.alpha if hasattr(first, "alpha") else first.scaling * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "peft_type": "LORA",
        **({"use_dora": True} if hasattr(first, "magnitude") else {}),
    }


@torch.no_grad()
def scaled_biases(state: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The biases of DoRA layers times the scale of their row, because torchtune's DoRA scales all of W x + b."""
    biases = {}
    for name in (name.removesuffix(".magnitude") for name in state if name.endswith(".magnitude")):
        if f"{name}.bias" in state:
            b, a = state[f"{name}.lora_b.weight"], state[f"{name}.lora_a.weight"]
            weight = state[f"{name}.weight"] + config["lora_alpha"] / config["r"] * b @ a
            scale = state[f"{name}.magnitude"] / torch.linalg.norm(weight, dim=1)
            biases[f"{name}.bias"] = state[f"{name}.bias"] * scale
    return biases


@torch.no_grad()
def merge_adapters(
    state: Mapping[str, torch.Tensor], config: Mapping[str, Any], in_place: bool = False
) -> dict[str, torch.Tensor]:
    """The plain model's state_dict: adapters merged into copies of the weights, or into the weights if `in_place`."""
    names = [name.removesuffix(".lora_a.weight") for name in state if name.endswith(".lora_a.weight")]
    copies = {} if in_place else {f"{name}.weight": state[f"{name}.weight"].clone() for name in names}
    tensors = dict(state) | copies | scaled_biases(state, config)  # torchtune's merge does not scale biases
    return get_merged_lora_ckpt(tensors, rank=config["r"], alpha=config["lora_alpha"])


def without_adapters(model: M) -> M:
    """Replace LoRA and NF4 layers by plain linear layers, in place: merges adapters, unpacks NF4 weights."""
    modules, state = adapter_modules(model), dict[str, torch.Tensor]()
    if modules:
        # Merge on the CPU, where the state_dict hook puts the unpacked NF4 weights.
        weights = {name: value if value.is_meta else value.cpu() for name, value in model.state_dict().items()}
        state = merge_adapters(weights, adapter_config(model))
    for name, module in list(model.named_modules()):
        if not (name in modules or isinstance(module, FrozenNF4Linear)):
            continue
        weight = state[f"{name}.weight"] if name in modules else module.weight
        weight = weight.get_original_weight() if isinstance(weight, NF4Tensor) else weight
        bias = state.get(f"{name}.bias") if name in modules else module.bias
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        like = {"device": module.weight.device, "dtype": module.weight.dtype}
        linear.weight = nn.Parameter(weight.to(**like))
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.to(**like)))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def correct_peft_form(folder: Path, model_type: str, biases: Mapping[str, torch.Tensor]) -> None:
    """Correct the adapters that torchtune 0.6.1 writes for PEFT.

    torchtune reorders the rows of B in q and k for every family, although Qwen2's weights keep their order, and never
    reorders DoRA's magnitudes. PEFT's DoRA does not scale biases: scaled ones are written as if PEFT had trained them.
    """
    file = folder / "adapter_model.safetensors"
    if not (file.exists() and (folder / "config.json").exists()):
        return
    config = json.loads((folder / "config.json").read_text())
    # Row order of q and k.
    heads = {"q_proj": config["num_attention_heads"]}
    heads["k_proj"] = config.get("num_key_value_heads") or heads["q_proj"]  # Llama 1 has no such key
    state = load_file(file)
    for name, value in state.items():
        count = next((number for module, number in heads.items() if module in name), None)
        if count is None:
            continue
        if model_type == "QWEN2" and "lora_B" in name:
            state[name] = value.view(count, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape).contiguous()
        elif model_type != "QWEN2" and "magnitude" in name:
            state[name] = value.view(count, -1, 2).transpose(1, 2).reshape(value.shape).contiguous()
    # Scaled biases: only q, k and v of Qwen2 have biases.
    for name, value in biases.items():
        module = name.removesuffix(".bias").replace(".attn.", ".self_attn.")
        state[f"base_model.model.model.{module}.base_layer.bias"] = value.contiguous()
    save_file(state, file, metadata={"format": "pt"})
    if biases:
        config_file = folder / "adapter_config.json"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"bias": "lora_only"}))


def move_peft_files(folder: Path) -> None:
    """Move PEFT's files to a subfolder: next to merged weights, transformers would add the adapters again."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            (folder / PEFT_FOLDER).mkdir(exist_ok=True)
            (folder / name).rename(folder / PEFT_FOLDER / name)


def check_lora_arguments(model: Component) -> None:
    """Check arguments of a LoRA builder that torchtune ignores, or rejects without a message."""
    builder = model.builder
    check("model.lora_rank", builder.get("lora_rank"), Annotated[int, Field(ge=1, examples=[8])] | None)
    check("model.lora_alpha", builder.get("lora_alpha"), Annotated[float, Field(gt=0, examples=[16])] | None)
    modules = builder.get("lora_attn_modules")
    for name in modules if isinstance(modules, list) else ():
        check("model.lora_attn_modules", name, Literal["q_proj", "k_proj", "v_proj", "output_proj"])


def adapter_mistakes(model: Component, meta_model: nn.Module, adapters_only: bool = False) -> Iterator[str]:
    """Yield a message if the model has not the adapters that a config asks for."""
    builder = model.builder
    if adapter_names(meta_model):
        return
    if builder.get("lora") is not None:
        yield (
            f"model.lora: {builder.get('lora')} adapts nothing, so all weights would be trained. Allowed: modules in "
            "attn_modules, or apply_lora_to_mlp: true; for example model.lora.apply_lora_to_mlp=true, or "
            "model.lora=null to train all weights"
        )
    elif builder.takes("lora_attn_modules"):
        yield (
            f"model.lora_attn_modules: {builder.path} creates no adapters with these arguments; for example "
            'model.lora_attn_modules=["q_proj","v_proj","output_proj"] model.apply_lora_to_mlp=true'
        )
    elif adapters_only:
        yield (
            f"save_adapter_weights_only: True, but {builder.path} has no adapters. Set "
            "save_adapter_weights_only=false, or use a LoRA builder like torchtune.models.llama3_2.lora_llama3_2_1b"
        )


def adapter_file(path: str) -> Path:
    """The file for `checkpointer.adapter_checkpoint`, which is the path of a file or of its folder."""
    file = Path(path) / ADAPTER_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(
            f"checkpointer.adapter_checkpoint: {path!r} is neither an {ADAPTER_FILE} nor a folder with one"
        )
    return file


def read_adapters(path: str, model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapters in torchtune's format at `path`, a checkpoint's folder or a file, if they fit the model."""
    file, key = adapter_file(path), "checkpointer.adapter_checkpoint"
    try:
        state = load_file(file) if file.suffix == ".safetensors" else torch.load(file, weights_only=True)
        if not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise TypeError("it holds no tensors")
    except Exception as e:
        raise ConfigError(f"{key}: {str(file)!r} is no {ADAPTER_FILE} of torchtune ({e})") from e
    # Compare alpha, names and shapes with the model.
    config_file, wanted = file.with_name("adapter_config.json"), adapter_config(model)
    if not config_file.exists():
        config_file = file.parent / PEFT_FOLDER / "adapter_config.json"
    alpha = read_json(config_file, key, {}).get("lora_alpha")
    if alpha is not None and alpha != wanted["lora_alpha"]:
        raise ConfigError(
            f"model.lora_alpha: {wanted['lora_alpha']}, but the adapters of {path!r} were trained with {alpha}; for "
            f"example model.lora_alpha={alpha}"
        )
    message = f"{key}: {str(file)!r} is not of this model, it"
    check_tensors(get_adapter_params(model), state, message, ". Check the rank and the modules of the model's LoRA")
    return state


def check_tensors(
    expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], message: str, advice: str = ""
) -> None:
    """Raise a ConfigError (message, mistake, advice) if tensors are missing, unknown or have another shape."""
    reshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]
    mistakes = {
        "lacks": [name for name in expected if name not in state],
        "has in addition": [name for name in state if name not in expected],
        "has other shapes:": reshaped,
    }
    for what, names in mistakes.items():
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{message} {what} {', '.join(names[:3])}{more}{advice}")
