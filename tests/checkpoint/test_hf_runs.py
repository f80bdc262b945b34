"""Training and generation from a Hugging Face folder by hf_decoder and hf_checkpointer, adapters and mistakes too."""

import json
import shutil

import pytest
import torch
from helpers.adapters import tokens_of
from helpers.configs import MODEL, generate_config, start_section
from helpers.configs import hf_sections as sections
from helpers.hf_folders import model_with_tokenizer
from helpers.json_lines import change_json
from helpers.resuming import resumed, same_tensors
from helpers.training import losses, set_up, train
from safetensors.torch import load_file

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.training.config import FinetuneConfig

NO_EXITS = {"layer_dropout": None, "early_exit_loss": None}
NOTHING = "{attn_modules: [], apply_lora_to_mlp: false}"
LORA = {"rank": 3, "alpha": 6.0, "attn_modules": ["q_proj", "output_proj"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_folder):
    """A Qwen3 with the tests' tokenizer."""
    pytest.importorskip("transformers")
    return model_with_tokenizer("qwen3", tmp_path_factory.mktemp("base") / "Qwen3", tokenizer_folder)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{}, {"lora": LORA}], ids=["full", "LoRA"])
def test_a_run_resumes_and_its_checkpoint_opens_in_transformers(base, lora, finetune):
    from transformers import AutoModelForCausalLM

    path = finetune(**sections(base, **lora), epochs=2)
    recipe = train(path)
    out = path.parent / "out"
    again = resumed(path, "epoch_0")
    whole = losses(out)
    assert losses(again) == {step: whole[step] for step in (3, 4)}

    weights, start = (load_file(folder / "model.safetensors") for folder in (out / "epoch_1", base))
    assert weights.keys() == start.keys() and not same_tensors(weights, start)
    assert same_tensors(weights, load_file(again / "epoch_1" / "model.safetensors"))
    tokens = 3 + torch.arange(40).view(2, 20) * 7 % 297
    theirs = AutoModelForCausalLM.from_pretrained(out / "epoch_1").eval()
    recipe.model.eval()
    with torch.no_grad():
        expected = recipe.model(tokens)
        torch.testing.assert_close(theirs(tokens).logits, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"draft": {"kind": "copy", "exit_layer": 1}, **NO_EXITS}], ids=["LoRA", "draft"]
)
def test_a_run_resumes_with_its_base_elsewhere(changes, base, tmp_path, finetune, monkeypatch):
    """As from a hub's name on another machine. Another config.json is named."""
    monkeypatch.chdir(tmp_path)
    place = shutil.copytree(base, tmp_path / "m")
    path = finetune(**sections("m", **({} if changes else {"lora": LORA})), **changes)
    train(path)
    for there in ("./m", str(tmp_path / "moved" / "n")):
        if there != "./m":
            shutil.move(place, there)
        again = ["resume_from_checkpoint=true", "epochs=2", f"model.path={there}", f"checkpointer.path={there}"]
        set_up(path, *again)
    change_json(tmp_path / "moved" / "n" / "config.json", rms_norm_eps=0.5)
    with pytest.raises(
        ConfigError, match=r"^resume_from_checkpoint: config.json.rms_norm_eps was 1e-06 and is 0.5 now"
    ):
        set_up(path, *again)


@pytest.mark.slow
def test_generation_adds_adapters_to_their_base(base, tmp_path, finetune):
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 0.05}  # so large that tokens change
    train(finetune(**sections(base, lora=LORA), optimizer=optimizer))
    trained = tmp_path / "out" / "epoch_0"
    adapted = sections(base, lora=LORA)
    adapted["checkpointer"]["adapter_checkpoint"] = str(trained)
    runs = {"base": sections(base), "merged": sections(trained), "adapters": adapted}
    tokens = {
        name: tokens_of(generate_config(tmp_path / name, base, max_new_tokens=24, output_dir="unused", **changes))
        for name, changes in runs.items()
    }
    assert tokens["adapters"] == tokens["merged"] != tokens["base"]


@pytest.mark.slow
def test_room_on_the_disk_is_asked_for_what_is_written(base, finetune):
    """In fp32 the adapters and AdamW's two averages, and the merged weights unless the adapters alone are kept."""
    path = str(finetune(**sections(base, lora=LORA)))
    whole = FinetuneConfig.load(load_config(path))
    adapters = FinetuneConfig.load(load_config(path, ["save_adapter_weights_only=true"]))
    count = sum(value.numel() for name, value in whole.meta_model.named_parameters() if "lora" in name)
    merged = sum(value.numel() for value in whole.meta_model.parameters())
    sgd = FinetuneConfig.load(load_config(path, ["optimizer=torch.optim.SGD", "save_adapter_weights_only=true"]))
    assert sgd.checkpoint_bytes == 4 * count
    eight = ["optimizer=torchao.optim.AdamW8bit", "save_adapter_weights_only=true"]
    assert FinetuneConfig.load(load_config(path, eight)).checkpoint_bytes == (4 + 2) * count
    assert adapters.checkpoint_bytes == 3 * 4 * count and whole.checkpoint_bytes == 3 * 4 * count + 4 * merged


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"model={json.dumps(MODEL)}", "checkpointer._component_: layerskip_recipes.hf_checkpointer does not fit"),
        (f"checkpointer={json.dumps(start_section('BASE'))}", "FullModelHFCheckpointer does not fit .*Allowed: "),
        ("checkpointer.shard_size=5XB", "checkpointer.shard_size: '5XB' is not allowed.*shard_size=5GB"),
        ("output_dir=BASE/out", "lies in checkpointer.checkpoint_dir"),
        # It would train all weights.
        (f"model.lora={NOTHING}", r"^model\.lora: .* adapts nothing.* model\.lora\.apply_lora_to_mlp=true"),
        ("model.lora.rang=8", "model.lora.rang: unknown key. Nearest: rank"),
        ("model.max_seq_len=1000", r"model.max_seq_len: 1000 .*Allowed: 1\.\.128"),
    ],
)
def test_a_mistake_is_refused_before_the_run(override, message, base, finetune):
    with pytest.raises(ConfigError, match=message) as e:
        set_up(finetune(**sections(base)), override.replace("BASE", str(base)))
    assert "\n" not in str(e.value) and not (base / "out").exists()
