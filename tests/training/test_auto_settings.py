"""What hf/* choose for keys that are `auto`: formulas by values calculated by hand, and the lines for wrong or missing
models."""

import json
import re
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from layerskip_recipes import EarlyExitLoss, hf_decoder, layerskip_decoder
from layerskip_recipes.cli.configs import resolved
from layerskip_recipes.config.components import Component
from layerskip_recipes.config.loading import load_config
from layerskip_recipes.generation.config import GenerateConfig
from layerskip_recipes.model.memory import cast_bytes, exit_state_bytes, layer_bytes, token_bytes, training_bytes
from layerskip_recipes.training.auto_settings import full_learning_rate
from layerskip_recipes.training.config import FinetuneConfig
from layerskip_recipes.training.parallel import checkpoint_layers

pytestmark = pytest.mark.slow

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
# q, k, v and output: 64 x 128, 2 x 64 x 64, 128 x 64; the feed-forward's three: 64 x 100. Two tables of 1000 x 64; the
# norms of the layers, of q and k, and the last one.
MATRICES = 12 * (2 * 8192 + 2 * 4096 + 3 * 6400)
OTHERS = 2 * 64_000 + 12 * (2 * 64 + 2 * 32) + 64
WEIGHTS = MATRICES + OTHERS
LOGITS = 512 * 1000 * 8
HEAD = 64_000 * 4  # the gradient's sum in fp32
# What a layer keeps for a token: inputs of two norms of 64 numbers, and of those of 128 queries and 64 keys, before and
# after the norm; the inputs of both groups of products; of attention queries, keys, values and result; and four tensors
# of the feed-forward network, whose widest matrix has 128 rows.
NORMED = 2 * 64 + 128 + 64
LAYER = 4 * (2 * NORMED + 2 * 64 + 4 * 128 + 4 * 128)
LAYER_WITH_CASTS = 4 * 2 * NORMED + 2 * (
    5 * 64 + 4 * 128 + 4 * 128
)  # autocast casts an input for each of five matrices
LAYER_OF_ADAPTERS = 4 * (NORMED + 2 * 64 + 4 * 128 + 4 * 128)  # frozen norms
STATE = 4 * 64
EXITS = 2 * 2 * STATE  # an early exit and the last layer, and their gradients
# Bytes for a token in fp32. The layer that is computed again takes less than the logits before.
KEPT, RECOMPUTED = 12 * LAYER + EXITS, 12 * STATE + EXITS
ON_HEAP = RECOMPUTED + 4 * 12 * 128  # on a CPU


def folder_of(tmp_path, **changes):
    """A folder with config.json, which is all that a choice reads."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL | changes))
    return str(tmp_path)


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """What a config hf/* chooses, as a function of overrides and of nine tenths of the free memory."""
    monkeypatch.setattr("layerskip_recipes.config.recipe_config.RecipeConfig.check_together", lambda self: None)
    for instructions in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)

    def choose(*overrides: str, name: str = "full", memory: int = 2**40, **changes) -> dict:
        monkeypatch.setattr("layerskip_recipes.training.auto_settings.free_memory", lambda device: -(-memory * 10 // 9))
        source = load_config(f"hf/{name}", [f"model_dir={folder_of(tmp_path, **changes)}", *overrides])
        return (GenerateConfig if name == "generate" else FinetuneConfig).load(source).chosen

    return choose


def test_a_training_needs_the_bytes_of_its_weights_in_bf16_and_nf4(tmp_path):
    model = FinetuneConfig.load(load_config("hf/full", [f"model_dir={folder_of(tmp_path)}", "device=cpu"])).meta_model
    assert training_bytes(model, 2, WEIGHTS, False) == 8 * WEIGHTS
    assert training_bytes(model, 2, 0, True) == 2 * OTHERS + MATRICES * 17 // 32


@pytest.mark.parametrize(
    ("layers", "trained"), [(1, "1"), (4, "1"), (12, "2"), (16, "2"), (28, "4"), (30, "4"), (80, "11")]
)
def test_the_exit_that_will_draft_is_trained(layers, trained, chosen):
    """Exit E is layer E - 1, here at a seventh of the depth; a curriculum is for all exits."""
    assert chosen("device=cpu", num_hidden_layers=layers)["early_exit_loss.exits"] == trained
    gradual = chosen("device=cpu", "early_exit_loss.curriculum=gradual", num_hidden_layers=layers)
    assert gradual["early_exit_loss.exits"] == ":"


@pytest.mark.parametrize(("width", "lr"), [(4096, 3e-5), (5120, 2.4e-5), (2048, 6e-5), (1024, 1.2e-4), (64, 1e-3)])
def test_the_learning_rate_falls_with_the_models_width(width, lr):
    assert full_learning_rate(width) == lr


@pytest.mark.parametrize(
    ("room", "length", "again"),
    [
        (512 * KEPT, 512, False),
        (512 * KEPT - 1, 512, True),
        (512 * ON_HEAP, 512, True),
        (512 * ON_HEAP - 1, 256, True),
        (0, 128, True),  # the shortest, though it does not fit either
    ],
)
def test_a_sample_fits_into_the_free_memory(room, length, again, chosen, caplog):
    made = chosen("device=cpu", memory=16 * WEIGHTS + HEAD + LOGITS + room)
    assert (made["tokenizer.max_seq_len"], made["enable_activation_checkpointing"]) == (length, again)
    assert ("so samples are cut to" in caplog.text) == (length < 512)
    assert ("will probably end without memory" in caplog.text) == (room == 0)


@pytest.mark.parametrize(
    ("samples", "size", "micro_batches"), [(0, 1, 8), (1, 1, 8), (3, 2, 4), (7, 4, 2), (8, 8, 1), (99, 8, 1)]
)
def test_batches_are_powers_of_two_and_a_step_has_8_samples(samples, size, micro_batches, chosen, monkeypatch):
    def batches(memory, *overrides):
        given = ["tokenizer.max_seq_len=512", "enable_activation_checkpointing=false", *overrides]
        made = chosen("device=cpu", *given, memory=memory)
        return made["batch_size"], made["gradient_accumulation_steps"]

    memory, own = 16 * WEIGHTS + HEAD + LOGITS + samples * KEPT * 512, HEAD + LOGITS + samples * KEPT * 512
    assert batches(memory) == (size, micro_batches)
    monkeypatch.setenv("WORLD_SIZE", "4")  # they share the memory and the weights, and each has its own head and logits
    assert batches(16 * WEIGHTS + 4 * own) == (size, max(micro_batches // 4, 1))
    assert batches(2 * 16 * WEIGHTS + 4 * own, "data_parallel_replicate_dim=2")[0] == size  # two copies of the weights
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the others, with half of the weights, are on another machine
    assert batches(8 * WEIGHTS + 2 * own)[0] == size


def test_an_optimizer_in_backward_steps_with_each_batch(chosen):
    made = chosen("device=cpu", "batch_size=2", "optimizer_in_bwd=true", "clip_grad_norm=null")
    assert made["gradient_accumulation_steps"] == 1


def test_ranks_that_share_a_matrix_share_their_samples(chosen, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    plan = "tensor_parallel_plan={_component_: torchtune.models.llama3.base_llama_tp_plan}"
    made = chosen("device=cpu", "batch_size=1", "tensor_parallel_dim=2", plan)
    assert made["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(("weights_fit", "expected"), [(True, "fp32"), (False, "bf16")])
def test_a_gpu_trains_all_weights_in_fp32_where_they_fit(weights_fit, expected, chosen, monkeypatch):
    """Of a GPU nine tenths are taken. Nothing else asks for memory, so that all else is bf16."""
    casts = 2 * (MATRICES // 12 + 64_000)  # of a layer and the head
    needed = 16 * WEIGHTS + HEAD + 4 * LOGITS + casts + 512 * RECOMPUTED
    there = needed * 10 // 9 + (10 if weights_fit else -10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=there))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: True)
    made = chosen("device=cuda")
    assert made["dtype"] == expected
    # bf16 needs stochastic rounding, with what it takes of AdamW's arguments.
    optimizer = made.get("optimizer", Component({"_component_": "torch.optim.AdamW"}))
    assert optimizer.path.endswith(".StochasticAdamW") is (expected == "bf16") and "fused" not in optimizer.arguments
    assert made["optimizer.lr"] == 1e-3 and "optimizer" not in chosen("device=cuda", "dtype=bf16")
    assert "optimizer" not in chosen("device=cuda", "optimizer.maximize=true")  # another algorithm
    assert chosen("device=cuda", name="lora")["dtype"] == "bf16"
    assert chosen("device=cuda", name="draft")["dtype"] == "bf16"
    assert chosen("device=cuda", name="generate")["dtype"] == "bf16"
    assert chosen("device=cuda", "dtype=fp32")["compute_dtype"] == "bf16"
    assert chosen("device=cuda", "dtype=bf16")["compute_dtype"] == "fp32"
    assert chosen("device=cpu").items() >= {"dtype": "fp32", "compute_dtype": "fp32"}.items()
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert chosen("device=cuda", name="generate")["dtype"] == "fp32"


@pytest.mark.parametrize(("name", "lr"), [("full", 1e-3), ("lora", 3e-4), ("qlora", 3e-4)])
def test_configs_choose_their_learning_rate_and_exit(name, lr, chosen):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 64}
    assert chosen(name=name, **sizes).items() >= {"optimizer.lr": lr, "early_exit_loss.exits": "2"}.items()


# A layer with its norms, what joins two states, a norm.
DRAFT = MATRICES // 12 + 2 * 64 + 2 * 32 + 64 * 128 + 64
# Of rank 16: q, k, v, output and the feed-forward's three matrices of each layer.
ADAPTERS = 12 * 16 * ((64 + 128) + 2 * (64 + 64) + (128 + 64) + 3 * (64 + 100))


# A copy of two layers, a seventh of twelve, beside its model.
COPY = 2 * (MATRICES // 12 + 2 * 64 + 2 * 32) + 64


@pytest.mark.parametrize(
    ("name", "kept", "token"),
    [
        ("lora", 4 * WEIGHTS + 16 * ADAPTERS + LOGITS, 12 * LAYER_OF_ADAPTERS + EXITS),
        # A draft's layer keeps its activations of two passes, and in each two joined states, the inputs of their norms
        # and of the last norm. Draft and model have logits, and both have probabilities.
        ("draft", 4 * WEIGHTS + 16 * DRAFT + 2 * LOGITS, 2 * (LAYER + 6 * STATE + 2 * STATE) + EXITS),
        # The model's last layer and the draft have a loss.
        ("task", 16 * (WEIGHTS + COPY) + HEAD + 2 * LOGITS, 14 * LAYER + 2 * STATE + EXITS),
    ],
)
def test_what_is_trained_counts_with_its_gradients_and_averages(name, kept, token, chosen):
    needed = kept + 2 * 512 * token
    made = chosen("device=cpu", name=name, memory=needed)
    assert made["batch_size"] == 2 and (name != "task" or (made["draft.exit_layer"], made["optimizer.lr"]) == (2, 1e-3))
    assert chosen("device=cpu", name=name, memory=needed - 2)["batch_size"] == 1


def test_a_draft_training_chooses_no_learning_rate_and_no_exit(chosen):
    made = chosen("device=cpu", name="draft")
    assert "optimizer.lr" not in made and "early_exit_loss.exits" not in made
    given = ["dtype=fp32", "batch_size=1", "enable_activation_checkpointing=true", "tokenizer.max_seq_len=64"]
    assert chosen("device=cpu", *given, name="draft") == {"compute_dtype": "fp32", "draft.chunk_tokens": 512}


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_tile"])
def test_a_cpu_with_bf16_instructions_multiplies_in_bf16(instructions, chosen, monkeypatch):
    """Weights stay in fp32. SmolLM2 135M on an EPYC with AVX-512 bf16: steps of 3.3 seconds, in fp32 6.1."""
    monkeypatch.setattr(torch.cpu, f"_is_{instructions}_supported", lambda: True)
    assert chosen("device=cpu").items() >= {"dtype": "fp32", "compute_dtype": "bf16"}.items()
    assert chosen("device=cpu", "dtype=bf16")["compute_dtype"] == "fp32"
    assert chosen("device=cpu", name="generate")["dtype"] == "fp32"


def test_values_of_the_users_replace_choices(tmp_path):
    overrides = [f"model_dir={folder_of(tmp_path)}", "device=cpu", "batch_size=2", "optimizer.lr=0.1"]
    cfg = FinetuneConfig.load(load_config("hf/full", [*overrides, "early_exit_loss.exits=4"]))
    assert (cfg.batch_size, cfg.optimizer.get("lr"), cfg.early_exit_loss.exits) == (2, 0.1, 4)
    assert cfg.gradient_accumulation_steps == 4 and not {"device", "batch_size", "optimizer.lr"} & set(cfg.chosen)
    assert cfg.source.gradient_accumulation_steps == 4  # a config that is logged has what was chosen
    assert "auto" not in OmegaConf.to_yaml(resolved(load_config("hf/full", overrides)))


def test_a_missing_key_has_torchtunes_default(chosen):
    made = chosen("device=cpu", "~batch_size", "~tokenizer.max_seq_len", "~optimizer.lr", "~compute_dtype")
    of_loss = {"early_exit_loss.exits", "early_exit_loss.chunk_tokens"}
    assert set(made) == of_loss | {"dtype", "enable_activation_checkpointing", "gradient_accumulation_steps"}
    assert made["gradient_accumulation_steps"] == 8


def test_lengths_are_no_longer_than_the_model_takes(chosen):
    assert chosen("device=cpu", max_position_embeddings=300)["tokenizer.max_seq_len"] == 300
    assert chosen(name="generate")["max_new_tokens"] == 300
    assert chosen(name="generate", max_position_embeddings=400)["max_new_tokens"] == 200


def test_bf16_casts_of_fp32_weights_take_room(chosen):
    """Without activation checkpointing, those of all layers stay until the backward pass."""
    memory = 16 * WEIGHTS + HEAD + LOGITS + 512 * (12 * LAYER_WITH_CASTS + EXITS) + 2 * 64_000  # the head's
    for room, again in ((2 * MATRICES - 1, True), (2 * MATRICES, False)):
        made = chosen("device=cpu", "compute_dtype=bf16", memory=memory + room)
        assert made["enable_activation_checkpointing"] is again


@pytest.mark.parametrize(
    ("exits", "most"),
    [
        (["early_exit_loss.exits=:"], 12),
        (["early_exit_loss.exits=:", "early_exit_loss.curriculum=gradual"], 12),
        (["early_exit_loss.curriculum=rotational", "early_exit_loss.interval=5"], 4),  # 1, 6, 11 and 12
    ],
)
def test_each_exit_with_a_loss_in_a_step_takes_room(exits, most, chosen):
    """Its state and the gradient of that."""
    memory = 16 * WEIGHTS + HEAD + LOGITS + 512 * (12 * LAYER + most * 2 * STATE)
    for room, again in ((0, False), (-1, True)):
        made = chosen("device=cpu", "compute_dtype=fp32", *exits, memory=memory + room)
        assert made["enable_activation_checkpointing"] is again


@pytest.mark.parametrize("recompute", [False, True])
def test_activations_of_a_sample_are_what_the_plan_says(recompute, tmp_path):
    """The peak of torch's allocations with 2 and with 4 samples of 64 tokens, in 6 layers of SmolLM2 135M. The plan
    counts the logits of a chunk apart, so both batches fill one. In bf16, casts of weights are added."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "head_dim": 64}
    folder = folder_of(tmp_path, **sizes, num_attention_heads=9, num_key_value_heads=3)

    def peak(rows: int, in_bf16: bool) -> int:
        model = layerskip_decoder(hf_decoder(folder))
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        checkpoint_layers(model, int(recompute))
        tokens = torch.arange(64 * rows).view(rows, 64)
        with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss = EarlyExitLoss(curriculum=None, exits="2", scale=1.0, chunk_tokens=64)
            with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16, cache_enabled=False):
                total, _ = loss(model, tokens, tokens, step=0, total_steps=1)
            total.backward()
        changes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
        return max(accumulate(changes))

    model = hf_decoder(folder)
    planned, in_bf16 = (
        64
        * (
            token_bytes(model, 6, 4, recompute, autocast=autocast)
            + recompute * layer_bytes(model, 4, autocast=autocast)
            + exit_state_bytes(model, 2, 4)
        )
        for autocast in (False, True)
    )
    (two, four), (two_in_bf16, four_in_bf16) = ([peak(rows, in_bf16) for rows in (2, 4)] for in_bf16 in (False, True))
    assert 0.95 * planned < (four - two) / 2 < 1.02 * planned
    assert 0.85 * in_bf16 < (four_in_bf16 - two_in_bf16) / 2 < 1.02 * in_bf16
    casts = (2 * two_in_bf16 - four_in_bf16) - (2 * two - four)  # what does not depend on the batch
    assert casts == pytest.approx(cast_bytes(model, 6, recompute), rel=0.15)


# ---- in configs ----


@pytest.mark.parametrize("name", ["full", "lora", "qlora", "generate", "eval", "benchmark"])
def test_each_config_needs_a_model(name, layerskip):
    status, _, err = layerskip("validate", f"hf/{name}")
    assert status == 1 and err.splitlines()[-1].startswith("ValueError: model_dir: missing. ")


def adapters_only(folder):
    """A checkpoint of adapters, and newer shards, which have no file that describes them."""
    for time, name in enumerate(("epoch_0", "step_9"), start=1):
        (folder / name).mkdir()
        torch.save({}, folder / name / "recipe_state.pt")
        (folder / name / "written").write_text(json.dumps({"time": time, "sizes": {}}))
    config = {"base_model_name_or_path": "/models/base", "r": 8}
    (folder / "epoch_0" / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder.rmdir(), "is no folder. Allowed: .*model_dir=~/models/Qwen3-0.6B$"),
        (lambda folder: None, "holds no readable config.json"),
        (lambda folder: folder_of(folder, architectures=["Other"]), "architecture Other is not supported"),
        (adapters_only, "adapter_config.json', '/models/base', is neither a folder nor a model that can be downloaded"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(prepare, message, tmp_path, layerskip):
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    status, _, err = layerskip("validate", "hf/full", f"model_dir={folder}")
    assert status == 1
    line = err.splitlines()[-1]
    assert line.startswith("ValueError: model_dir: ") or "Other" in line
    assert "resolving" not in line
    assert re.search(message, line), line
