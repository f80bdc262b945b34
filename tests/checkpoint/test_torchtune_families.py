"""Checkpoints of every family are what transformers makes of them: the same logits, and the same files after saving."""

import pytest
import torch
from helpers.configs import start_section
from helpers.hf_folders import make_hf_folder
from omegaconf import OmegaConf
from safetensors.torch import load_file

from layerskip_recipes.checkpoint.checkpointers import build_checkpointer
from layerskip_recipes.checkpoint.weights import load_decoder
from layerskip_recipes.config.recipe_config import RecipeConfig
from layerskip_recipes.generation.drafting.draft_weights import DraftHead

pytest.importorskip("transformers")
OURS = {
    **{"vocab_size": 97, "num_layers": 4, "num_heads": 6, "num_kv_heads": 2, "embed_dim": 48, "intermediate_dim": 64},
    **{"max_seq_len": 128, "norm_eps": 1e-6},
}
# Small caps, so that they show; a name of helpers/hf_folders.py and what differs, torchtune's name and what differs.
CAPS = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
OUR_CAPS = {"sliding_window_size": 16, "hidden_capping_value": 5.0, "final_capping_value": 2.0, "head_dim": 16}
WIDER = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "llama2": ("llama", {}, "LLAMA2", {"num_kv_heads": 6}),
    "mistral": ("mistral", WIDER, "MISTRAL", {}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}, "QWEN2", {"tie_word_embeddings": True, "rope_base": 10000}),
    "gemma": ("gemma", {}, "GEMMA", {"head_dim": 16}),
    "gemma2": ("gemma2", CAPS, "GEMMA2", OUR_CAPS),
    "phi3": ("phi3", {"tie_word_embeddings": False, "rms_norm_eps": 1e-6}, "PHI3_MINI", {}),
}
TOKENS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FAMILIES)
def pair(request, tmp_path):
    """A model of transformers with no weight at its default, and the config of ours for its checkpoint."""
    kind, theirs, model_type, ours = FAMILIES[request.param]
    model = make_hf_folder(kind, tmp_path / "model", **theirs)
    section = start_section(tmp_path / "model", model_type=model_type) | {"output_dir": str(tmp_path / "out")}
    tokenizer = {"_component_": "layerskip_recipes.hf_tokenizer", "path": "unused"}
    builder = f"torchtune.models.{request.param}._component_builders.{request.param}"
    model_section = {"_component_": builder, **OURS, **ours}
    content = {"model": model_section, "checkpointer": section, "tokenizer": tokenizer, "dtype": "fp32"}
    return model, OmegaConf.create(content)


def load(cfg):
    return load_decoder(RecipeConfig.load(cfg), torch.device("cpu"))


@torch.no_grad()
def test_logits_of_torchtunes_builders_are_those_of_transformers(pair):
    theirs, cfg = pair
    ours, expected = load(cfg), theirs(TOKENS).logits
    torch.testing.assert_close(ours(TOKENS), expected, atol=1e-4, rtol=1e-4)
    _, hidden = ours.hidden_states(TOKENS, [3, 4])
    torch.testing.assert_close(ours(hidden=hidden[3], start_layer=3), expected, atol=1e-4, rtol=1e-4)
    some = DraftHead(ours, [5, 6, 90])
    torch.testing.assert_close(some(hidden[4]), expected[..., [5, 6, 90]], atol=1e-4, rtol=1e-4)


def test_numbers_that_contradict_the_checkpoint_are_said(pair, caplog):
    """No weight shows them, so the model would only be a bit worse."""
    _, cfg = pair
    load(cfg)
    assert not [message for message in caplog.messages if message.startswith("model.")]
    cfg.model.norm_eps = 1e-5
    cfg.model.rope_base = 777
    load(cfg)
    expected = {"model.norm_eps: it is 1e-05 here", "model.rope_base: it is 777 here"}
    assert {line.partition(",")[0] for line in caplog.messages if line.startswith("model.")} == expected


def test_what_is_saved_is_what_was_loaded(pair, tmp_path):
    _, cfg = pair
    checkpointer = build_checkpointer(RecipeConfig.load(cfg).checkpointer, str(tmp_path / "out"))
    checkpointer.save_checkpoint(checkpointer.load_checkpoint(), epoch=0)
    saved = {
        name: tensor
        for file in sorted((tmp_path / "out" / "epoch_0").glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    expected = load_file(tmp_path / "model" / "model.safetensors")
    assert expected.keys() <= saved.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in expected.items())
