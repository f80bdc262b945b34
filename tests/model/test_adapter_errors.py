"""Wrong settings of adapters: one ValueError with the key, the value and what works, before weights are loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import adapted_section, adapter_config, generate_with, make_start, reader
from helpers.configs import finetune_config, generate_config
from helpers.refusals import check
from helpers.resuming import WEIGHTS
from helpers.training import train
from safetensors.torch import load_file, save_file

from layerskip_recipes.model.adapters import correct_peft_form

FILE = "checkpointer.adapter_checkpoint"


@pytest.fixture(scope="module")
def adapter_paths(tmp_path_factory, tokenizer_folder) -> dict[str, Path]:
    """A LoRA run, and configs on its start: training and generation, with adapters and without."""
    folder = tmp_path_factory.mktemp("bad")
    make_start(folder / "start", "llama3_2", tokenizer_folder)
    paths = {"adapters": adapter_config(folder / "run", tokenizer_folder, "llama3_2", folder / "start")}
    train(paths["adapters"])
    start = reader(folder / "start", "llama3_2")
    paths["full"] = finetune_config(folder / "full", tokenizer_folder, checkpointer=start)
    paths["scratch"] = finetune_config(folder / "scratch", tokenizer_folder, model=adapted_section("llama3_2"))
    paths["checkpoint"] = folder / "run" / "out" / "epoch_0"
    torch.save(dict.fromkeys(torch.load(paths["checkpoint"] / "adapter_model.pt"), 1), folder / "numbers.pt")
    paths["numbers"] = folder / "numbers.pt"
    run = SimpleNamespace(folder=folder, family="llama3_2", path=paths["adapters"])
    paths["generate"] = generate_with(run, folder / "generate", paths["checkpoint"])
    paths["generate full"] = generate_config(folder / "generate full", folder / "start")
    return paths


MODULES = "model.lora_attn_modules"
MERGED = f"checkpointer.checkpoint_dir=CHECKPOINT; checkpointer.checkpoint_files=[{WEIGHTS}]"
BAD = [
    # Training.
    ("adapters", f"{MODULES}=[qproj]; model.apply_lora_to_mlp=false", MODULES, "'qproj'", "q_proj"),
    ("adapters", f"{MODULES}=[]", "model", "lora_attn_modules=[]", "q_proj"),
    ("adapters", f"{MODULES}=[q_proj,v_prj]", "model", "v_prj", "v_proj"),
    ("adapters", "model.lora_dropout=2", "model", "lora_dropout=2", "between 0 and 1"),
    ("adapters", "checkpointer.safe_serialization=false", "checkpointer.safe_serialization", "False", "=true"),
    ("adapters", "model.lora_rank=four", "model.lora_rank", "'four'", "lora_rank=8"),
    ("adapters", "model.apply_lora_to_output=true", "model", "apply_lora_to_output=True", "tie"),
    ("adapters", "optimizer_in_bwd=true", "optimizer_in_bwd", "True", "false"),
    ("adapters", f"{FILE}=somewhere", FILE, "'somewhere'", "resume_from_checkpoint=true"),
    ("scratch", "seed=1", "checkpointer.checkpoint_files", "missing", "[model.safetensors]"),
    ("full", "save_adapter_weights_only=true", "save_adapter_weights_only", "True", "lora_llama3_2_1b"),
    # Generation.
    ("generate", f"~{FILE}", FILE, "None", f"{FILE}="),
    ("generate full", f"{FILE}=CHECKPOINT", FILE, "epoch_0", "neither"),
    ("generate", f"{FILE}=/nowhere", FILE, "'/nowhere'", "neither an adapter_model.pt nor a folder with one"),
    ("generate", f"{FILE}=CHECKPOINT/adapter/adapter_model.safetensors", FILE, "adapter_model.safetensors'", "lora_a"),
    ("generate", f"{FILE}=NUMBERS", FILE, "it holds no tensors", "adapter_model.pt"),
    ("generate", "model.lora_rank=8", FILE, "lora_a.weight (3, 32) instead of (8, 32)", "Check the rank"),
    ("generate", f"{MODULES}=[q_proj]", FILE, "not of this model, it has in addition", "k_proj.lora_a"),
    ("generate", "model.use_dora=true", FILE, "not of this model, it lacks", "magnitude"),
    ("generate", "model.num_layers=5; checkpointer.checkpoint_dir=START", FILE, "layers.4", ""),
    ("generate", "model.lora_alpha=70", "model.lora_alpha", "70", "7"),
    ("generate", f"{MERGED}; {FILE}=CHECKPOINT", FILE, "epoch_0", "they would count twice"),
]


@pytest.mark.parametrize(("name", "overrides", "key", "given", "allowed"), BAD)
def test_a_mistake_is_refused_before_weights_are_loaded(
    name, overrides, key, given, allowed, adapter_paths, no_weights, tmp_path, monkeypatch
):
    """One ValueError with the key, the value and what works, before weights are loaded or anything is written."""
    monkeypatch.chdir(tmp_path)
    recipe = "generate" if name.startswith("generate") else "finetune"
    places = {"CHECKPOINT": "checkpoint", "NUMBERS": "numbers"}
    for place, path in places.items():
        overrides = overrides.replace(place, str(adapter_paths[path]))
    overrides = overrides.replace("START", str(adapter_paths["numbers"].parent / "start"))
    check(recipe, adapter_paths[name], overrides, key, given, allowed)


def test_magnitudes_are_reordered_without_num_key_value_heads(tmp_path):
    """Llama 1's: all heads have their own. DoRA's magnitudes of k go into Hugging Face's order by that number."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    magnitude = torch.arange(8.0)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector.weight"
    save_file({name: magnitude}, tmp_path / "adapter_model.safetensors")
    correct_peft_form(tmp_path, "LLAMA2", {})
    # Of each head the even rows, then the odd ones: torchtune rotates neighbours, Hugging Face halves.
    assert load_file(tmp_path / "adapter_model.safetensors")[name].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
