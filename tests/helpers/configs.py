"""Small configs for the tests: train from scratch, generate, evaluate and measure, with 4 layers and 300 tokens.

Each function writes a YAML file and returns its path; `changes` replace top-level keys, None switches one off.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from helpers.tiny import widen
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama3_2._component_builders import llama3_2

SIZE = {
    "vocab_size": 300,
    "num_layers": 4,
    "num_heads": 2,
    "num_kv_heads": 1,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "max_seq_len": 128,
    "rope_base": 10000,
    "scale_factor": 1,
}
MODEL = {"_component_": "torchtune.models.llama3_2._component_builders.llama3_2", **SIZE}
DATASET = {"_component_": "layerskip_recipes.quickstart.StdlibDataset", "split": "heldout", "seq_len": 64}
# What transformers needs to open a checkpoint of that model.
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


# The model's weights: 9,600 of the embedding, which is the head too; in each of 4 layers 32 x 32 (q), 2 x 16 x 32
# (k, v), 32 x 32 (output), 3 x 32 x 48 (MLP) and 2 x 32 (norms); 32 of the last norm.
LAYER, REST = 1024 + 1024 + 1024 + 4608 + 64, 9600 + 32
# The bytes of a slot of the cache: 4 layers x 2 (keys, values) x 1 head x 16, in fp32.
SLOT = 4 * 2 * 16 * 4


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    """The content as a YAML file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(OmegaConf.create(content), path)
    return path


def finetune_config(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A training from scratch, 2 steps of 2 samples of 64 tokens, that writes to `folder/out`."""
    config = {
        "output_dir": str(folder / "out"),
        "model": MODEL,
        "tokenizer": {"_component_": "layerskip_recipes.hf_tokenizer", "path": str(tokenizer)},
        "dataset": DATASET | {"max_samples": 8},
        "checkpointer": {
            "_component_": "layerskip_recipes.checkpoint.scratch_checkpointer",
            "model_type": "LLAMA3_2",
            "output_dir": "${output_dir}",
            "tokenizer_dir": str(tokenizer),
            "hf_config": HF_CONFIG,
        },
        "layer_dropout": {"prob": 0.2},
        "early_exit_loss": {"scale": 0.5, "curriculum": "rotational", "interval": 2},
        "batch_size": 2,
        "epochs": 1,
        "max_steps_per_epoch": 2,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"},
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger",
            "log_dir": "${output_dir}/logs",
            "filename": "log.txt",
        },
        "device": "cpu",
        "dtype": "fp32",
        "seed": 0,
    }
    return write_yaml(folder / "finetune.yaml", config | changes)


def make_checkpoint(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """A Hugging Face folder with the model's weights, so wide that its greedy outputs vary, and the tokenizer."""
    torch.manual_seed(seed)
    model = widen(llama3_2(**SIZE))
    folder.mkdir(parents=True)
    weights = tune_to_hf(model.state_dict(), num_heads=2, num_kv_heads=1, dim=32)
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF_CONFIG))
    for file in tokenizer.glob("tokenizer*.json"):
        shutil.copy(file, folder)
    return folder


def start_section(
    folder: Path, form: str = "HF", file: str = "model.safetensors", model_type: str = "LLAMA3_2"
) -> dict[str, Any]:
    """The checkpointer section of a start from a checkpoint."""
    return {
        "_component_": f"torchtune.training.FullModel{form}Checkpointer",
        "checkpoint_dir": str(folder),
        "checkpoint_files": [file],
        "output_dir": "${output_dir}",
        "model_type": model_type,
    }


def hf_sections(folder: Path | str, **model: Any) -> dict[str, Any]:
    """The sections model and checkpointer of a Hugging Face folder."""
    path = {"path": str(folder)}
    return {
        "model": {"_component_": "layerskip_recipes.hf_decoder", **path, **model},
        "checkpointer": {"_component_": "layerskip_recipes.hf_checkpointer", **path, "output_dir": "${output_dir}"},
    }


def _trained(checkpoint: Path) -> dict[str, Any]:
    return {
        "model": MODEL,
        "checkpointer": start_section(checkpoint) | {"output_dir": "unused"},
        "tokenizer": {"_component_": "layerskip_recipes.hf_tokenizer", "path": str(checkpoint)},
        "device": "cpu",
        "dtype": "fp32",
        "seed": 0,
    }


def generate_config(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """A self-speculative generation of 8 tokens from the folder of `make_checkpoint`."""
    config = _trained(checkpoint) | {
        "prompt": "def main(",
        "max_new_tokens": 8,
        "temperature": 0.0,
        "self_speculation": {"exit_layer": 2, "num_speculations": 3},
    }
    return write_yaml(folder / "generate.yaml", config | changes)


def eval_config(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """An evaluation of all exits on 4 samples of 64 tokens."""
    config = _trained(checkpoint) | {"dataset": DATASET | {"max_samples": 4}, "batch_size": 2}
    return write_yaml(folder / "eval.yaml", config | changes)


def benchmark_config(folder: Path, checkpoint: Path, **changes: Any) -> Path:
    """A benchmark of two lengths of drafts on 2 prompts of 16 new tokens, 2 repeats, greedy and sampling, eager."""
    config = _trained(checkpoint) | {
        "prompt": ["def main(", "import os"],
        "max_new_tokens": 16,
        "temperatures": [0.0, 0.8],
        "compile": False,
        "repeats": 2,
        "variants": {
            "chain": {"exit_layer": 2, "num_speculations": 3},
            "short": {"exit_layer": 2, "num_speculations": 2},
        },
        "report_dir": str(folder / "report"),
        "picture": str(folder / "report" / "benchmark.png"),
    }
    return write_yaml(folder / "benchmark.yaml", config | changes)
