"""Shared by tests of adapters: models, checkpoints, and readers of them."""

import json
import shutil
from pathlib import Path

import torch
from helpers.configs import HF_CONFIG, SIZE
from helpers.training import few_texts, losses, read_log, train  # noqa: F401
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune import config as tune_config
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.qwen2._convert_weights import qwen2_tune_to_hf
from torchtune.training import FullModelHFCheckpointer

SHAPE = {key: value for key, value in SIZE.items() if key not in ("rope_base", "scale_factor")}


RANK, ALPHA = 3, 7


ADAPTERS = {
    "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
    "lora_rank": RANK, "lora_alpha": ALPHA,
}  # fmt: skip


QWEN2 = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "rope_theta": 1_000_000}


HF_CONFIGS = {
    "llama3_2": HF_CONFIG,
    "llama2": HF_CONFIG | {"tie_word_embeddings": False},
    "qwen2": HF_CONFIG | {"tie_word_embeddings": False} | QWEN2,
}


def plain_section(family: str) -> dict:
    """The config of a family without adapters."""
    size = SIZE if family == "llama3_2" else SHAPE
    return {"_component_": f"torchtune.models.{family}._component_builders.{family}", **size}


def adapted_section(family: str, **changes) -> dict:
    """The same with torchtune's LoRA builder."""
    section = plain_section(family) | ADAPTERS | changes
    return section | {"_component_": f"torchtune.models.{family}._component_builders.lora_{family}"}


def make_start(folder: Path, family: str, tokenizer: Path, section: dict | None = None, **hf_config) -> dict:
    """A Hugging Face folder with random weights, biases and norms too; its state_dict in torchtune's names."""
    torch.manual_seed(1)
    model = tune_config.instantiate(OmegaConf.create(section or plain_section(family)))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("scale")), std=0.2)
    hf = HF_CONFIGS[family] | hf_config
    convert = qwen2_tune_to_hf if family == "qwen2" else tune_to_hf
    sizes = {"num_heads": hf["num_attention_heads"], "num_kv_heads": hf["num_key_value_heads"]}
    weights = convert(model.state_dict(), **sizes, dim=hf["hidden_size"])
    folder.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf))
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return {name: value.clone() for name, value in model.state_dict().items()}


def reader(folder: Path, family: str) -> dict:
    """A checkpointer section that starts from a folder."""
    return {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": [file.name for file in sorted(folder.glob("model*.safetensors"))],
        "output_dir": "${output_dir}",
        "model_type": family.upper(),
    }


class EveryExit(torch.nn.Module):
    """The logits of every exit of a plain decoder with the given weights."""

    def __init__(self, section: dict) -> None:
        super().__init__()
        self.model = tune_config.instantiate(OmegaConf.create(section))

    def forward(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        h, logits = self.model.tok_embeddings(tokens), []
        for layer in self.model.layers:
            h = layer(h)
            logits.append(self.model.output(self.model.norm(h)))
        return logits

    def logits(self, weights: dict, tokens: torch.Tensor) -> list[torch.Tensor]:
        """As forward, with these weights instead of the model's own."""
        assert set(weights) == set(self.model.state_dict())
        return torch.func.functional_call(self, {f"model.{name}": w for name, w in weights.items()}, (tokens,))


def read_hf(folder: Path, family: str) -> dict:
    """A checkpoint's weights in torchtune's names."""
    files = reader(folder, family)["checkpoint_files"]
    nowhere = str(folder.parent / "unused")  # it makes the folder that it would write to
    return FullModelHFCheckpointer(str(folder), files, family.upper(), nowhere).load_checkpoint()["model"]
