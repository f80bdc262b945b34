"""LoRA and DoRA adapters: what trains, what checkpoints hold, how generation and evaluation read them.

Expected values: torchtune's plain builders with weights that are put together here, W + alpha/r B A and DoRA's formula.
"""

import functools
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import (
    TOKENS,
    WIDE_HF,
    WIDE_SHAPE,
    EveryExit,
    adapter_config,
    by_hand,
    check_losses,
    generate_with,
    make_start,
    plain_section,
    read_hf,
    tokens_of,
)
from helpers.recipes import ready
from helpers.training import few_texts, losses, read_log, set_up, train  # noqa: F401
from safetensors.torch import load_file

from layerskip_recipes.generation.recipe import LayerSkipGenerate

# Tied head; a head of its own with an adapter; biases in q, k and v.
CASES = {
    "llama3_2": ("llama3_2", {}),
    "llama3_2 dora": ("llama3_2", {"use_dora": True}),
    "llama2 output": ("llama2", {"apply_lora_to_output": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 dora": ("qwen2", {"use_dora": True}),
}


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tokenizer_folder):
    """The run of a case, once: its start, its recipe, its first weights, its config, its checkpoint."""

    @functools.cache
    def run(case: str) -> SimpleNamespace:
        family, builder = CASES[case]
        folder = tmp_path_factory.mktemp("adapters")
        start = make_start(folder / "start", family, tokenizer_folder)
        path = adapter_config(folder, tokenizer_folder, family, folder / "start", builder)
        recipe = set_up(path)
        first = {name: value.clone() for name, value in recipe.model.state_dict().items()}
        recipe.train()
        recipe.cleanup()
        return SimpleNamespace(
            case=case, family=family, folder=folder, path=path, start=start, first=first, recipe=recipe,
            log=read_log(folder / "out"), checkpoint=folder / "out" / "epoch_0",
            adapters=torch.load(folder / "out" / "epoch_0" / "adapter_model.pt", weights_only=True),
            plain=EveryExit(plain_section(family)),
        )  # fmt: skip

    return run


@pytest.fixture(params=CASES)
def trained(request, run_of) -> SimpleNamespace:
    """Each of them."""
    return run_of(request.param)


@pytest.fixture(params=["llama2 output", "qwen2 dora"])
def read(request, run_of) -> SimpleNamespace:
    """For what is made of a checkpoint: two that have all that A and B have beside them. All five keep the formulas."""
    return run_of(request.param)


# ---- what trains ----


def test_the_losses_are_those_of_plain_pytorch(trained):
    check_losses(trained, rel=1e-4)


def test_it_starts_as_the_model_that_it_adapts(trained):
    """B = 0, A is not, the magnitudes are the norms of the weight's rows; all else is the checkpoint's."""
    for name, value in trained.first.items():
        if name.endswith("lora_b.weight"):
            assert not value.any()
        elif name.endswith("lora_a.weight"):
            # Uniform with variance 1 / (3 in_dim), as a linear layer starts.
            assert value.abs().max() <= 1 / math.sqrt(value.shape[1])
            assert value.std() == pytest.approx(1 / math.sqrt(3 * value.shape[1]), rel=0.3)
        elif name.endswith("magnitude"):
            norms = trained.start[name.replace("magnitude", "weight")].norm(dim=1)
            torch.testing.assert_close(value, norms)
        else:
            assert torch.equal(value, trained.start[name]), name
    assert len({tuple(v.flatten()[:4].tolist()) for n, v in trained.first.items() if "lora_a" in n}) > 20  # all differ


def test_only_adapters_change(trained):
    after = trained.recipe.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, trained.first[name])}
    assert moved == set(trained.adapters)
    assert {name.split(".")[-2] for name in moved if "lora" in name} == {"lora_a", "lora_b"}
    layers_with_adapters = 4 * 7 + (trained.case == "llama2 output")
    assert len(moved) == layers_with_adapters * (3 if "dora" in trained.case else 2)
    assert {n for n, p in trained.recipe.model.named_parameters() if p.requires_grad} == moved
    for name, value in trained.adapters.items():
        assert torch.equal(value, after[name])


# ---- checkpoints ----


def test_the_merged_checkpoint_is_the_formula(trained):
    expected = by_hand(trained.start, trained.adapters)
    merged = read_hf(trained.checkpoint, trained.family)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    changed = {name for name in merged if not torch.equal(merged[name], trained.start[name])}
    names = {name.rpartition(".lora_a")[0] for name in trained.adapters if "lora_a" in name}
    biased = [name for name in names if "dora" in trained.case and f"{name}.bias" in trained.start]
    assert changed == {f"{name}.weight" for name in names} | {f"{name}.bias" for name in biased}


@pytest.mark.slow
def test_peft_opens_the_adapters(read, monkeypatch):
    """On the model that the training started from, with the logits of the merged checkpoint."""
    peft = pytest.importorskip("peft")
    # It refuses torchao before 0.16, which torchtune needs, even where no weight is quantised.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(read.folder / "start")
    theirs = peft.PeftModel.from_pretrained(base, str(read.checkpoint / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(read.checkpoint)  # adds no adapters: they are merged already
    with torch.no_grad():
        expected = read.plain.logits(read_hf(read.checkpoint, read.family), TOKENS)[-1]
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_adapters_only(read, tmp_path):
    train(read.path, "save_adapter_weights_only=true", f"output_dir={tmp_path}/out")
    folder, whole = tmp_path / "out" / "epoch_0", read.checkpoint / "adapter"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.pt", "adapter_model.safetensors", "adapter_config.json", "recipe_state.pt"} <= files
    assert not [name for name in files if name.startswith("model")]
    assert (folder / "adapter_config.json").read_text() == (whole / "adapter_config.json").read_text()
    state = torch.load(folder / "adapter_model.pt", weights_only=True)
    both = [load_file(place / "adapter_model.safetensors") for place in (folder, whole)]
    for ours, theirs in ((state, read.adapters), both):
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    tokens = [tokens_of(generate_with(read, tmp_path, adapters)) for adapters in (folder, read.checkpoint)]
    assert tokens[0] == tokens[1]


# ---- generation ----


def test_generation_with_adapters_gives_the_merged_checkpoints_tokens(read, tmp_path):
    """From a folder and from the file; self-speculative, autoregressive, from an exit. Also those of plain PyTorch."""
    weights = by_hand(read.start, read.adapters)
    merged = generate_with(read, tmp_path / "merged", None)
    folder = generate_with(read, tmp_path / "folder", read.checkpoint)
    file = generate_with(read, tmp_path / "file", read.checkpoint / "adapter_model.pt")
    tokens = tokens_of(merged, "self_speculation=null")
    assert len(set(tokens)) > 2
    assert tokens_of(folder) == tokens_of(folder, "self_speculation=null") == tokens_of(file) == tokens
    early = ["self_speculation=null", "exit_layer=2"]
    assert tokens_of(folder, *early) == tokens_of(merged, *early) != tokens
    recipe = ready(LayerSkipGenerate, folder)
    for name, value in recipe.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-5)
    context, new = list(recipe.prompt_tokens[0]), []
    for _ in tokens:
        with torch.no_grad():
            logits = read.plain.logits(weights, torch.tensor([context + new]))[-1]
        new.append(logits[0, -1].argmax().item())
    assert tokens == new


# ---- a stopped training goes on as if it had never stopped ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "builder", "overrides"),
    [
        ("qwen2", {"use_dora": True}, ["save_adapter_weights_only=true"]),
        ("llama2", {"apply_lora_to_output": True}, []),
        ("llama3_2", WIDE_SHAPE | {"quantize_base": True}, ["enable_async_checkpointing=true"]),
    ],
    ids=["dora, adapters only", "lora", "qlora in shards"],
)
def test_resume_gives_the_losses_of_the_run_that_never_stopped(family, builder, overrides, tmp_path, tokenizer_folder):
    """From the middle of the first epoch, with dropout in the adapters and of layers: the very losses and weights."""
    wide = "quantize_base" in builder
    start = (plain_section(family) | WIDE_SHAPE, WIDE_HF) if wide else (None, {})
    make_start(tmp_path / "start", family, tokenizer_folder, start[0], **start[1])
    path = adapter_config(
        tmp_path, tokenizer_folder, family, tmp_path / "start", builder | {"lora_dropout": 0.3}, epochs=2, shuffle=True,
        layer_dropout={"prob": 0.5, "schedule": "exp"}, max_steps_per_epoch=3, save_every_n_steps=2, lr_scheduler={
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2,
        },
    )  # fmt: skip
    out = tmp_path / "out"
    train(path, *overrides)
    whole, end = losses(out), torch.load(out / "epoch_1" / "adapter_model.pt", weights_only=True)
    assert sorted(path.name for path in out.glob("*_*[0-9]")) == ["epoch_0", "epoch_1", "step_2", "step_4"]
    for name in ("epoch_0", "epoch_1", "step_4"):
        shutil.rmtree(out / name)
    (out / "logs" / "log.txt").unlink()
    train(path, *overrides, "resume_from_checkpoint=true")
    assert losses(out) == {step: whole[step] for step in (3, 4, 5, 6)}
    again = torch.load(out / "epoch_1" / "adapter_model.pt", weights_only=True)
    assert set(again) == set(end) and all(torch.equal(again[name], end[name]) for name in end)
