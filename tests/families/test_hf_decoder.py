"""hf_decoder and hf_checkpointer give the models of transformers: logits, gradients, cached decoding, files."""

import json
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.hf_folders import LLAMA3_ROPE, LONGROPE, MODELS, SIZE, VOCAB, YARN, make_hf_folder
from helpers.json_lines import change_json
from helpers.tiny import make_tiny
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import create_block_mask
from torchtune import training
from torchtune.generation import generate as torchtune_generate
from torchtune.modules.attention_utils import create_block_causal_mask
from torchtune.training import ADAPTER_CONFIG, ADAPTER_KEY, MODEL_KEY

from layerskip_recipes import EarlyExitLoss, generate, hf_checkpointer, hf_decoder, layerskip_decoder
from layerskip_recipes.checkpoint.hf_checkpointer import INDEX
from layerskip_recipes.errors import ConfigError
from layerskip_recipes.families.hf_names import place_in_files
from layerskip_recipes.families.reading import read_hf_config
from layerskip_recipes.families.rope import Rope
from layerskip_recipes.generation.backends import CHUNK
from layerskip_recipes.generation.sampling import Sampler
from layerskip_recipes.generation.steps import StepContext
from layerskip_recipes.model.adapters import BIASES, adapter_config, fresh_adapters, merge_adapters, scaled_biases
from layerskip_recipes.model.kv_cache import DecodingCache

TOKENS = 3 + torch.arange(48).view(2, 24) * 31 % (VOCAB - 3)  # without the padding token, which transformers masks


def decoder_of(folder):
    """Ours, with the folder's weights."""
    model = layerskip_decoder(hf_decoder(str(folder))).eval()
    model.load_state_dict(hf_checkpointer(str(folder)).load_checkpoint()[MODEL_KEY])
    return model


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Within 1e-4 of the largest value: sums of fp32 in another order."""
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.abs().max())


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """The model of transformers and ours of the same folder."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_hf_folder(request.param, folder)
    return SimpleNamespace(kind=request.param, folder=folder, theirs=theirs, ours=decoder_of(folder))


def test_logits_are_those_of_transformers(pair):
    with torch.no_grad():
        assert close(pair.ours(TOKENS), pair.theirs(TOKENS).logits)


def same_as_transformers(folder) -> bool:
    """Whether our model of a folder has the logits of the model that transformers reads from it."""
    import transformers  # slow

    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return close(decoder_of(folder)(TOKENS), theirs(TOKENS).logits)


WINDOWS, LINEAR = ("rope_parameters", "layer_types"), {"rope_type": "linear", "factor": 8.0}
ACTIVATION = ("hidden_act", "hidden_activation")
NAMES = [{}, {"hidden_act": "gelu"}, {"hidden_activation": "gelu"}, {"hidden_act": "gelu", "hidden_activation": "silu"}]
OLDER = [
    *((kind, ACTIVATION, names) for kind in ("gemma", "gemma2") for names in NAMES),
    ("gemma3", WINDOWS, {"rope_local_base_freq": 5e3, "rope_theta": 3e5, "rope_scaling": LINEAR}),
    ("gemma3", WINDOWS, {"sliding_window_pattern": 2}),
    ("gemma3", WINDOWS, {"final_logit_softcapping": 1.5}),
    ("olmo3", WINDOWS, {"rope_scaling": YARN, "rope_theta": 5e5}),
    ("olmo3", WINDOWS, {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.2}}),
    ("olmo3", WINDOWS, {}),
    ("exaone4", WINDOWS, {"rope_scaling": LLAMA3_ROPE, "rope_theta": 3e5}),
    ("lfm2", ("layer_types", "tie_word_embeddings", "intermediate_size"),
     {"full_attn_idxs": [1], "tie_embedding": True, "block_ff_dim": 96, "block_multiple_of": 32}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "missing", "added"), OLDER)
def test_a_config_of_an_earlier_release_means_what_transformers_reads(kind, missing, added, tmp_path):
    """Keys that are missing, or have an older name. The first Gemmas wrote gelu, and meant the one by tanh."""
    make_hf_folder(kind, tmp_path, **({"intermediate_size": 96} if kind == "lfm2" else {}))
    content = json.loads((tmp_path / "config.json").read_text())
    content = {key: value for key, value in content.items() if key not in missing}
    (tmp_path / "config.json").write_text(json.dumps(content | added))
    assert same_as_transformers(tmp_path)


@pytest.mark.parametrize("older_names", [False, True])
def test_the_text_part_of_a_gemma_3_that_reads_images(older_names, tmp_path):
    """Its folder is read, and what is written is a text model."""
    transformers = pytest.importorskip("transformers")
    image_size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=SIZE | MODELS["gemma3"][1], vision_config=image_size | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    folder, file = tmp_path / "model", tmp_path / "model" / "model.safetensors"
    theirs.save_pretrained(folder)
    if older_names:
        tensors = {
            name.replace("model.language_model.", "language_model.model.").replace("model.vision", "vision"): value
            for name, value in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
    ours = decoder_of(folder)
    with torch.no_grad():
        assert close(ours(TOKENS), theirs(TOKENS).logits)
    hf_checkpointer(str(folder), str(tmp_path)).save_checkpoint({MODEL_KEY: ours.state_dict()})
    written = json.loads((tmp_path / "epoch_0" / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"] and same_as_transformers(tmp_path / "epoch_0")


@pytest.mark.parametrize("kind", ["gemma3", "lfm2", "olmo3"])
def test_a_packed_text_is_what_it_is_alone(kind, tmp_path):
    """Neither a window nor a convolution sees the text before it."""
    make_hf_folder(kind, tmp_path)
    model = decoder_of(tmp_path)
    lengths = [20, 3, 1]
    mask = create_block_causal_mask([torch.tensor(lengths)])
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        packed = model(TOKENS[:1], mask=mask, input_pos=positions)[0].split(lengths)
        for text, logits in zip(TOKENS[0].split(lengths), packed, strict=True):
            torch.testing.assert_close(logits, model(text[None])[0], rtol=1e-4, atol=1e-4)


def test_a_single_file_counts_before_the_index_of_an_earlier_save(tmp_path):
    make_hf_folder("llama", tmp_path)
    later = load_file(tmp_path / "model.safetensors")
    save_file({name: value + 1 for name, value in later.items()}, tmp_path / "old.safetensors", {"format": "pt"})
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(later, "old.safetensors")}))
    reader = hf_checkpointer(str(tmp_path))
    assert torch.equal(reader.load_checkpoint()[MODEL_KEY]["norm.scale"], later["model.norm.weight"])
    with pytest.raises(ConfigError, match=r"^output_dir: missing"):
        reader.save_checkpoint(reader.load_checkpoint())


def test_loss_and_gradients_are_those_of_transformers(pair):
    pair.ours.zero_grad()
    pair.theirs.zero_grad()
    losses = []
    for logits in (pair.ours(TOKENS), pair.theirs(TOKENS).logits):
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()))
        losses[-1].backward()
    assert close(*losses)
    config, theirs = read_hf_config(pair.folder), dict(pair.theirs.named_parameters())
    for name, parameter in pair.ours.named_parameters():
        file_name, rows = place_in_files(name, config)
        assert close(parameter.grad, theirs[file_name].grad[rows]), name


def test_a_long_prompt_of_a_model_with_windows_is_read_in_chunks():
    """A mask of a whole text would have as many numbers as the square of its tokens."""
    chunks = {}
    for family in ("llama3_2", "gemma3"):
        model = layerskip_decoder(make_tiny(family))
        chunks[family] = StepContext(model, DecodingCache(model, 1, 64), Sampler()).backend.chunk(100_000, 0)
    assert chunks == {"llama3_2": 100_000, "gemma3": CHUNK}


def test_a_mask_that_a_window_cannot_narrow_is_refused():
    model = layerskip_decoder(make_tiny("gemma3"))
    mask = create_block_mask(lambda _b, _h, query, slot: query >= slot, None, None, 24, 24, device="cpu")
    with pytest.raises(ValueError, match=r"^mask: a BlockMask .*Allowed: a tensor"):
        model(TOKENS, mask=mask)


def test_a_training_step_learns_from_the_logits_of_each_exit(pair):
    total, losses = EarlyExitLoss(scale=0.5, exits="2", curriculum=None)(
        pair.ours, TOKENS[:, :-1], TOKENS[:, 1:], step=0, total_steps=1
    )
    assert losses.keys() == {2, pair.ours.num_layers}
    for exit_layer, loss in losses.items():
        logits = pair.ours(TOKENS[:, :-1], exit_layer=exit_layer)
        assert close(loss, F.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten()))
    pair.ours.zero_grad()
    total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in pair.ours.parameters())


@pytest.mark.slow
def test_self_speculation_gives_the_tokens_of_transformers_generate(pair):
    prompt = TOKENS[:1, :10]
    expected = pair.theirs.generate(prompt, max_new_tokens=40, do_sample=False, eos_token_id=None)
    limit = 6 if pair.kind == "gemma2" else 40  # its cache goes up to the window of 16
    for exit_layer in (1, 3):
        out = generate(
            pair.ours, prompt[0], max_generated_tokens=limit, exit_layer=exit_layer, num_speculations=4, stop_tokens=[]
        )
        assert out.tokens[0].tolist() == expected[0, : 10 + limit].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["llama", "phi4_mini", "gemma2", "gemma3", "lfm2", "olmo3", "exaone4"], indirect=True)
@pytest.mark.parametrize("cached", [True, False])
def test_torchtunes_generate_decodes_prompts_of_several_lengths(pair, cached):
    """torchtune passes the positions of a step as [b]. Each row gets the tokens that it gets alone."""
    prompts = [TOKENS[0, 1:9], TOKENS[1, 1:6], TOKENS[0, 3:4]]
    limit = 7  # within the window of Gemma 2
    ours = hf_decoder(str(pair.folder)).eval()
    ours.load_state_dict(pair.ours.state_dict())
    if cached:
        ours.setup_caches(len(prompts), torch.float32, decoder_max_seq_len=8 + limit)
    padded = torch.stack([F.pad(prompt, (8 - len(prompt), 0)) for prompt in prompts])
    with torch.no_grad():
        out, _ = torchtune_generate(ours, padded, max_generated_tokens=limit, pad_id=0, top_k=1)
    for prompt, row in zip(prompts, out, strict=True):
        alone = generate(pair.ours, prompt, max_generated_tokens=limit, stop_tokens=[]).tokens[0]
        assert row[8:].tolist() == alone[len(prompt) :].tolist()


def test_a_written_folder_is_that_of_transformers_to_the_bit(pair, tmp_path):
    templates = "additional_chat_templates/tool_use.jinja"
    (pair.folder / "additional_chat_templates").mkdir()
    for file in ("tokenizer.json", templates):
        (pair.folder / file).write_text("{}")
    checkpointer = hf_checkpointer(str(pair.folder), str(tmp_path), shard_size="20KB")
    checkpointer.save_checkpoint({MODEL_KEY: pair.ours.state_dict()}, epoch=3)
    written = tmp_path / "epoch_3"
    assert all((written / file).is_file() for file in (INDEX, "tokenizer.json", "generation_config.json", templates))
    again = type(pair.theirs).from_pretrained(written, dtype="auto").state_dict()
    for name, value in pair.theirs.state_dict().items():
        assert again[name].dtype == value.dtype and torch.equal(again[name], value), name
    state = hf_checkpointer(str(written), str(tmp_path)).load_checkpoint()[MODEL_KEY]
    assert all(torch.equal(state[name], value) for name, value in pair.ours.state_dict().items())


def test_the_frequencies_of_a_model_in_bf16_are_exact():
    """At position 1000, an error of 0.3% is an angle of 3 radians in the first pair of channels."""
    rope = Rope.parse(LONGROPE, "rope_parameters")
    expected = 1 / (10_000 ** (np.arange(0, 12, 2) / 12) * np.array(LONGROPE["short_factor"]))
    with training.set_default_dtype(torch.bfloat16):
        np.testing.assert_allclose(rope.frequencies(12).numpy(), expected, rtol=1e-6)


# ---- adapters ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dora", "modules"),
    [
        *(
            (kind, dora, ["q_proj", "k_proj", "v_proj"])
            for kind in ("qwen3", "qwen2", "phi3")
            for dora in (False, True)
        ),
        *((kind, True, ["k_proj"]) for kind in ("qwen2", "phi3")),
        ("phi3", False, ["q_proj", "v_proj", "output_proj"]),
    ],
)
def test_peft_opens_adapters_of_a_folders_model(kind, dora, modules, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)  # it wants a newer one
    folder = tmp_path / "base"
    base = make_hf_folder(kind, folder)
    lora = {"rank": 3, "alpha": 5.0, "attn_modules": modules, "use_dora": bool(dora)}
    model = layerskip_decoder(hf_decoder(str(folder), lora=lora)).eval()
    checkpointer = hf_checkpointer(str(folder), str(tmp_path))
    weights = checkpointer.load_checkpoint()[MODEL_KEY]
    adapters = fresh_adapters(model, weights, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, value in adapters.items():
        adapters[name] = value + 0.1 * torch.rand(value.shape, generator=generator)
    model.load_state_dict(weights | adapters)
    described = adapter_config(model)
    biases = scaled_biases(weights | adapters, described) if dora else {}
    contents = {ADAPTER_KEY: adapters, ADAPTER_CONFIG: described, BIASES: biases}
    checkpointer.save_checkpoint(contents, adapter_only=True)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "epoch_0")).eval()
    plain = decoder_of(folder)
    plain.load_state_dict(merge_adapters(weights | adapters, described))
    with torch.no_grad():
        expected = model(TOKENS)
        assert close(theirs(TOKENS).logits, expected)
        assert close(plain(TOKENS), expected)


# ---- what is refused ----


def test_a_window_limits_the_length(tmp_path):
    make_hf_folder("mistral_window", tmp_path)
    assert hf_decoder(str(tmp_path)).max_seq_len == 64
    with pytest.raises(ConfigError, match=r"max_seq_len: 65 .*Allowed: 1\.\.64"):
        hf_decoder(str(tmp_path), max_seq_len=65)
    with pytest.raises(ConfigError, match=r"^model\.max_seq_len: 0 .*1 or more"):
        hf_decoder(str(tmp_path), max_seq_len=0)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("llama", {"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported. .*LlamaForCausalLM"),
        ("llama", {"architectures": ["Qwen3_5ForCausalLM"]}, "Qwen3_5ForCausalLM is not supported: .*recurrent state"),
        ("llama", {"architectures": ["FalconH1ForCausalLM"]}, "FalconH1ForCausalLM is not supported: .*recurrent"),
        ("llama", {"architectures": ["Gemma4ForCausalLM"]}, "Gemma4ForCausalLM is not supported: .*embeddings"),
        ("granite4", {"layer_types": ["mamba"] * 4}, "layer_types: .*Mamba.*rejected"),
        ("granite4", {"num_local_experts": 4}, "num_local_experts: 4 .*Allowed: 0"),
        ("lfm2", {"conv_bias": True}, "conv_bias: True is not supported"),
        ("llama", {"hidden_act": "relu"}, "hidden_act: 'relu' .*Allowed: silu, gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' .*Allowed: defa"),
        (
            "olmo2",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_parameters.original_max_position_embeddings: missi",
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: missing"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config: .*not supported"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads: 5 "),
        ("llama", {"hidden_size": "48"}, "hidden_size: '48' .*Allowed: an integer"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop: 0.1 is not supported"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers: 1 values for num_hidden_layers 4"),
    ],
)
def test_what_the_builder_does_not_honour_is_refused(kind, changes, message, tmp_path):
    make_hf_folder(kind, tmp_path)
    change_json(tmp_path / "config.json", **changes)
    with pytest.raises(ConfigError, match=f"config.json.*{message}"):
        read_hf_config(tmp_path)


def without_weights(folder, index="{}"):
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(index)


def without_head(folder):
    state = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in state.items() if name != "lm_head.weight"}, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: os.truncate(f / "model.safetensors", 1000), r"model\.safetensors' cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors, its weights"),
        (lambda f: without_weights(f, '{"weight_map": {"a": "x.safetensors"}}'), "lacks x.safetensors"),
        (without_weights, "it lacks model.embed_tokens.weight"),
        (lambda f: without_weights(f, "{"), "holds no readable model.safetensors.index.json"),
        (without_head, "it lacks lm_head.weight"),
        (lambda f: change_json(f / "config.json", num_hidden_layers=3), r"it has in addition model\.layers\.3\."),
        (lambda f: (f / "config.json").unlink(), "holds no readable config.json"),
        (shutil.rmtree, "Allowed: a folder with config.json"),
    ],
)
def test_a_damaged_folder_is_one_clear_line(damage, message, tmp_path):
    folder = tmp_path / "model"
    make_hf_folder("llama", folder)
    damage(folder)
    with pytest.raises(ConfigError, match=message) as e:
        hf_checkpointer(str(folder), str(tmp_path)).load_checkpoint()
    assert "\n" not in str(e.value)
