"""Folders of PEFT's adapters as model_dir: LoRA is merged into the base while loading, all else is refused."""

import json
import re
import shutil

import pytest
import torch
from helpers.hf_folders import make_hf_folder
from helpers.json_lines import change_json
from safetensors.torch import load_file, save_file
from torchtune import training

from layerskip_recipes.checkpoint.export import export
from layerskip_recipes.checkpoint.hf_checkpointer import HFCheckpointer
from layerskip_recipes.data.tokenizer import hf_tokenizer
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_decoder import hf_decoder

TOKENS = 3 + torch.arange(40).view(2, 20) * 7 % 90
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A base model, and the settings of its adapters.
ADAPTED = {
    "q_and_v": ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    "rslora": ("qwen3_tied", {"target_modules": LINEAR, "use_rslora": True}),
    "patterns": (
        "qwen2",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 2},
            "alpha_pattern": {"q_proj": 3, r"layers\.[01]\.self_attn\.v_proj": 20},
        },
    ),
    "embedding_and_head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "down_proj"]}),
    "modules_to_save": ("llama", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "joined": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"], "layers_to_transform": [1, 3]}),
}


def make_adapters(folder, kind, settings, base_name=None, **changes):
    """Random adapters in `folder`/adapters of a model in `folder`/base. Returns transformers' merged model."""
    import peft  # takes two seconds

    model = make_hf_folder(kind, folder / "base", **changes)
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **settings)
    with pytest.MonkeyPatch.context() as patch:  # PEFT wants a newer torchao than torchtune
        patch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
        adapted = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1, mean=0.05 * ("lora" not in name))
    adapted.save_pretrained(folder / "adapters")
    change(base_model_name_or_path=base_name or str(folder / "base"))(folder / "adapters")
    return adapted.merge_and_unload().eval()


def logits(path) -> torch.Tensor:
    model = hf_decoder(str(path))
    model.load_state_dict(HFCheckpointer(str(path)).load_checkpoint()[training.MODEL_KEY])
    return model.eval()(TOKENS)


@pytest.mark.parametrize("name", ADAPTED)
@torch.no_grad()
def test_logits_are_those_of_pefts_merged_model(name, tmp_path):
    """The base is found by its path, or by its name beside the adapters."""
    base_name = "someone/base" if name == "rslora" else None
    expected = make_adapters(tmp_path, *ADAPTED[name], base_name=base_name)(TOKENS).logits
    tolerance = {"atol": 1e-5 * float(expected.abs().max()), "rtol": 0}
    torch.testing.assert_close(logits(tmp_path / "adapters"), expected, **tolerance)
    assert not torch.allclose(logits(tmp_path / "base"), expected, **tolerance)
    if name == "joined":  # an export is a whole model
        exported = export(str(tmp_path / "adapters"), str(tmp_path / "exported"))
        assert not (exported / "adapter_config.json").exists()
        torch.testing.assert_close(logits(exported), expected, **tolerance)


def test_a_base_on_the_hub_is_read_in_the_adapters_revision(tmp_path, monkeypatch):
    """As PEFT does. Its small files and its weights come from the same revision."""
    expected = make_adapters(tmp_path, *ADAPTED["q_and_v"], base_name="someone/revised")(TOKENS).logits
    change(revision="v2")(tmp_path / "adapters")
    (tmp_path / "base").rename(tmp_path / "v2")
    monkeypatch.setattr(
        "layerskip_recipes.folders.model_folder.snapshot_download",
        lambda name, allow_patterns, revision=None: str(tmp_path / str(revision)),
    )
    torch.testing.assert_close(logits(tmp_path / "adapters"), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_the_adapters_tokenizer_comes_before_the_bases(tmp_path, tokenizer_folder):
    """The adapters', with the base's stop tokens, or else the base's. A checkpoint gets the same files."""
    make_adapters(tmp_path, *ADAPTED["q_and_v"], vocab_size=300)
    adapters, base = tmp_path / "adapters", tmp_path / "base"
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    for file in tokenizer_folder.glob("tokenizer*.json"):
        shutil.copy(file, base)
    assert 7 in hf_tokenizer(str(adapters)).stop_tokens and not hf_tokenizer(str(adapters)).has_chat_template
    for file in tokenizer_folder.glob("tokenizer*.json"):
        shutil.copy(file, adapters)
    (adapters / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    assert 7 in hf_tokenizer(str(adapters)).stop_tokens and hf_tokenizer(str(adapters)).has_chat_template
    HFCheckpointer(str(adapters)).side_files.write(tmp_path)
    assert hf_tokenizer(str(tmp_path)).stop_tokens == hf_tokenizer(str(adapters)).stop_tokens
    assert {"chat_template.jinja", "tokenizer.json", "generation_config.json"} <= {f.name for f in tmp_path.iterdir()}


def change(**values):
    return lambda folder: change_json(folder / "adapter_config.json", **values)


def beside_a_quantised_base(folder):
    """Adapters as Unsloth's QLoRA writes them."""
    base = folder.parent / "model-bnb-4bit"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    change(base_model_name_or_path="unsloth/model-bnb-4bit")(folder)


def rename(before, after):
    def edit(folder):
        file = folder / "adapter_model.safetensors"
        save_file({name.replace(before, after): value for name, value in load_file(file).items()}, file)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(use_dora=True), "cannot be merged while loading, because of use_dora: True. Allowed: LoRA without"),
        (change(peft_type="LOHA", bias="all"), "because of peft_type: 'LOHA', bias: 'all'. "),
        (change(init_lora_weights="pissa_niter_4"), "because of init_lora_weights: 'pissa_niter_4'. "),
        (change(base_model_name_or_path=None), "is None. Allowed: the base model's folder, or its name on the hub"),
        (change(base_model_name_or_path="/no/where"), "'/no/where', is neither a folder nor a model that can be"),
        (lambda folder: change(base_model_name_or_path=str(folder))(folder), "Allowed: the folder of a whole model"),
        (
            change(base_model_name_or_path="/no/where", revision="v2"),
            "'/no/where' in revision 'v2', is neither a folder nor a model that can be downloaded",
        ),
        (beside_a_quantised_base, "names a quantised model, "),
        (change(lora_alpha=None), "no usable lora_alpha"),
        (rename("q_proj", "w_proj"), "do not fit the base model, it has in addition model.layers.0.self_attn.w_proj"),
        (rename("v_proj.lora_A", "v_proj.lora_B"), "lack A or B for model.layers.0.self_attn.v_proj"),
        (lambda folder: (folder / "adapter_model.safetensors").write_text("?"), "cannot be read "),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused_in_one_line(edit, message, tmp_path, tiny_adapters):
    folder = shutil.copytree(tiny_adapters / "adapters", tmp_path / "adapters")
    edit(folder)
    with pytest.raises(ConfigError, match=rf"^(checkpointer\.)?path: .*{re.escape(message)}") as e:
        HFCheckpointer(str(folder))
    assert "\n" not in str(e.value)


@pytest.fixture(scope="module")
def tiny_adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    make_adapters(folder, *ADAPTED["q_and_v"])
    return folder


def test_a_tied_embedding_is_refused(tmp_path):
    make_adapters(tmp_path, "qwen3_tied", {"target_modules": ["embed_tokens", "q_proj"]})
    with pytest.raises(ConfigError, match="embedding or the head"):
        HFCheckpointer(str(tmp_path / "adapters"))
