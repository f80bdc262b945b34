"""What the configs hf/* choose: formulas by values calculated by hand, and the lines for wrong or missing models."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from layerskip_recipes import defaults
from layerskip_recipes.checkpoint.trained_exits import exit_that_drafts
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.model.hf_config import parse_hf_config
from layerskip_recipes.model.hf_decoder import build_decoder

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
# q, k, v and output: 64 x 128, 2 x 64 x 64, 128 x 64; the feed-forward's three: 64 x 100.
LAYERS, TABLES = 12 * (2 * 8192 + 2 * 4096 + 3 * 6400), 2 * 64_000
LOGITS = 512 * 1000 * 8
TOKEN = 16 * 64 + 4 * 100  # numbers that a layer keeps for a token


def folder_of(tmp_path, exits=None, **changes):
    """A folder with config.json, which is all that a choice reads, and with layerskip.json if there are exits."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    if exits is not None:
        (tmp_path / "layerskip.json").write_text(json.dumps({"exits": exits}))
    return str(tmp_path)


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory of this machine, of which half is taken."""

    def set_memory(amount: int) -> None:
        monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": amount, "SC_PAGE_SIZE": 2}.get)

    return set_memory


def test_weights_are_those_of_the_decoder():
    config = parse_hf_config(SMALL, "config.json")
    with torch.device("meta"):
        model = build_decoder(config, 8)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert defaults.count_weights(config) == (LAYERS, TABLES)
    assert matrices == LAYERS + TABLES
    tied = parse_hf_config(SMALL | {"tie_word_embeddings": True}, "config.json")
    assert defaults.count_weights(tied) == (LAYERS, 64_000)


@pytest.mark.parametrize(
    ("kind", "itemsize", "kept"),
    [
        ("full", 4, 16 * (LAYERS + TABLES)),
        ("full", 2, 8 * (LAYERS + TABLES)),
        ("lora", 2, 2 * (LAYERS + TABLES)),
        ("qlora", 2, 2 * TABLES + LAYERS * 17 // 32),
    ],
)
def test_what_a_training_keeps(kind, itemsize, kept):
    config = parse_hf_config(SMALL, "")
    assert defaults.training_bytes(config, kind, itemsize) == kept + LOGITS
    assert defaults.training_bytes(config, kind, itemsize, "cuda") == kept + 4 * LOGITS  # 2048 tokens, not 512


def test_what_a_token_keeps():
    config = parse_hf_config(SMALL, "")
    assert defaults.token_bytes(config, 4, recompute=False) == 4 * 12 * TOKEN
    assert defaults.token_bytes(config, 4, recompute=True) == 4 * (12 * 64 + TOKEN)


@pytest.mark.parametrize(
    ("layers", "interval"), [(1, 1), (4, 2), (12, 6), (16, 8), (28, 8), (32, 8), (64, 8), (80, 10)]
)
def test_exits_at_a_step(layers, interval):
    """The paper's 8 from 16 layers on; with the last one, a step has 2 to 9 exits."""
    assert defaults.rotation(layers) == interval


@pytest.mark.parametrize(("width", "lr"), [(4096, 3e-5), (5120, 2.4e-5), (2048, 6e-5), (1024, 1.2e-4), (64, 5e-4)])
def test_the_learning_rate_of_all_weights(width, lr):
    assert defaults.full_learning_rate(width) == lr


@pytest.mark.parametrize(
    ("trained", "layers", "exit_layer"),
    [
        (range(1, 33), 32, 8),  # the paper's Llama 2 7B
        (range(2, 31), 30, 7),  # 7 and 8 are as near to 7.5
        ([6, 30], 30, 6),
        ([12, 24], 24, 12),
        ([24], 24, None),
        ([], 24, None),
    ],
)
def test_the_exit_that_drafts(trained, layers, exit_layer):
    assert exit_that_drafts(list(trained), layers) == exit_layer


def test_a_sample_fits_into_half_of_the_memory(tmp_path, memory):
    """Full length without recomputation, then with it, then a shorter one."""
    folder, fixed = folder_of(tmp_path), 16 * (LAYERS + TABLES) + LOGITS
    kept, recomputed = 4 * 12 * TOKEN, 4 * (12 * 64 + TOKEN)
    for room, length, again in (
        (512 * kept, 512, False),
        (512 * kept - 1, 512, True),
        (512 * recomputed, 512, True),
        (512 * recomputed - 1, 256, True),
        (0, 128, True),  # the shortest, though it does not fit either
    ):
        memory(fixed + room)
        assert defaults.seq_len(folder, "full", "cpu", "fp32") == length
        assert defaults.recompute(folder, "full", "cpu", "fp32", length) is again
    short = folder_of(tmp_path, max_position_embeddings=300)
    memory(fixed + 512 * kept)
    assert defaults.seq_len(short, "full", "cpu", "fp32") == 300


def test_batches_are_powers_of_two_and_a_step_has_16_samples(tmp_path, memory, monkeypatch):
    folder, each = folder_of(tmp_path), 4 * 12 * TOKEN * 512
    for samples, size, micro_batches in ((0, 1, 16), (1, 1, 16), (3, 2, 8), (7, 4, 4), (8, 8, 2), (99, 8, 2)):
        memory(16 * (LAYERS + TABLES) + LOGITS + samples * each)
        assert defaults.batch_size(folder, "full", "cpu", "fp32", 512, False) == size
        assert defaults.accumulation(size) == micro_batches
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (defaults.accumulation(2), defaults.accumulation(8)) == (2, 1)


@pytest.mark.parametrize(("weights_fit", "expected"), [(True, "fp32"), (False, "bf16")])
def test_a_gpu_trains_all_weights_in_fp32_where_they_fit(weights_fit, expected, tmp_path, monkeypatch):
    """Of a GPU nine tenths are taken. Nothing else asks for memory, so that all else is bf16."""
    needed = 16 * (LAYERS + TABLES) + 4 * LOGITS + 512 * 4 * (12 * 64 + TOKEN)
    there = needed * 10 // 9 + (10 if weights_fit else -10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=there))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    folder = folder_of(tmp_path)
    assert defaults.dtype("cuda", folder, "full") == expected
    assert defaults.dtype("cuda", folder, "lora") == "bf16"
    assert defaults.dtype("cuda") == "bf16"
    assert (defaults.compute_dtype("cuda", "fp32"), defaults.compute_dtype("cuda", "bf16")) == ("bf16", None)
    assert defaults.compute_dtype("cpu", "fp32") is None
    assert defaults.dtype("cpu", folder, "full") == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert defaults.dtype("cuda") == "fp32"


def test_other_choices_of_a_folder(tmp_path):
    folder = folder_of(tmp_path, exits=[2, 4, 9, 12])
    assert defaults.lr(folder, "full") == 5e-4
    assert defaults.lr(folder, "lora") == defaults.lr(folder, "qlora") == 3e-4
    assert defaults.interval(folder) == 6
    assert (defaults.new_tokens(folder, 300), defaults.new_tokens(folder, 5000)) == (300, 2048)
    assert defaults.device() == ("cuda" if torch.cuda.is_available() else defaults.best_device())


# ---- in configs ----


def test_what_was_chosen_is_said(tmp_path):
    (choice,) = defaults.explain(load_config("hf/generate", [f"model_dir={folder_of(tmp_path)}", "device=cpu"]))
    assert choice.startswith("Chosen for this model and machine: dtype=fp32, max_new_tokens=300")
    assert "device" not in choice
    assert defaults.explain(load_config("quickstart/generate")) == []


def test_a_value_of_the_users_replaces_a_choice(tmp_path):
    overrides = [f"model_dir={folder_of(tmp_path)}", "batch_size=2", "optimizer.lr=0.1", "early_exit_loss.interval=3"]
    cfg = OmegaConf.to_container(load_config("hf/full", overrides), resolve=True)
    assert (cfg["batch_size"], cfg["optimizer"]["lr"], cfg["early_exit_loss"]["interval"]) == (2, 0.1, 3)
    assert cfg["gradient_accumulation_steps"] == 8
    assert not any("interval" in line for line in defaults.explain(load_config("hf/full", overrides)))


@pytest.mark.parametrize("name", ["full", "lora", "qlora", "generate", "eval", "benchmark"])
def test_each_needs_the_model_only(name, tmp_path, layerskip):
    """The widths are multiples of what NF4 takes as a block."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
    status, _, err = layerskip("validate", f"hf/{name}", f"model_dir={folder_of(tmp_path, **sizes)}")
    assert status == 0, err
    status, _, err = layerskip("validate", f"hf/{name}")
    assert status == 1
    assert err.splitlines()[-1].startswith("ValueError: model_dir: missing. ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dtype=fp16", "dtype: 'fp16' is not allowed"),
        ("batch_size=0", "batch_size: 0 is not allowed"),
        ("batch_size=x", "batch_size: 'x' is not allowed"),
        ("tokenizer.max_seq_len=null", None),
        ("device=cuda", None),
    ],
)
@pytest.mark.parametrize("name", ["full", "lora"])
def test_what_follows_from_a_wrong_value_does_not_hide_it(name, override, message, tmp_path, layerskip):
    status, _, err = layerskip("validate", f"hf/{name}", f"model_dir={folder_of(tmp_path)}", override)
    assert (status, message is None) in ((0, True), (1, False)), err
    assert message is None or err.splitlines()[-1].startswith(f"ValueError: {message}")


def adapters_only(folder):
    (folder / "epoch_0").mkdir()
    (folder / "epoch_0" / "recipe_state.pt").touch()
    config = {"base_model_name_or_path": "/models/base", "r": 8}
    (folder / "epoch_0" / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.rmdir(), "is no folder. Allowed: .*model_dir=~/models/Qwen3-0.6B$"),
        (lambda folder: None, "holds no readable config.json"),
        (lambda folder: folder_of(folder, architectures=["Other"]), "architecture Other is not supported"),
        (adapters_only, "holds adapters only.*model.lora.*=/models/base checkpointer.adapter_checkpoint=.*epoch_0$"),
    ],
)
def test_a_wrong_model_is_one_line(prepare, message, tmp_path, layerskip):
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    status, _, err = layerskip("validate", "hf/full", f"model_dir={folder}")
    assert status == 1
    line = err.splitlines()[-1]
    assert line.startswith("ValueError: model_dir: ") or "Other" in line
    assert "resolving" not in line
    assert re.search(message, line), line
