"""LoRA and DoRA adapters, also on NF4 weights: what trains, what checkpoints hold, how generation reads them.

Expected values: torchtune's plain builders with weights that are put together here, W + alpha/r B A and DoRA's formula.
"""

import functools
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import (
    ALPHA,
    RANK,
    EveryExit,
    adapter_config,
    generate_with,
    make_start,
    plain_section,
    read_hf,
    tokens_of,
)
from helpers.configs import SIZE
from helpers.recipes import ready
from helpers.resuming import COSINE, resumed, same_tensors
from helpers.tiny import slow_except
from helpers.training import losses, paper_weights, read_log, set_up, train
from safetensors.torch import load_file
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from layerskip_recipes.generation.recipe import LayerSkipGenerate

TOKENS = torch.arange(40).view(2, 20) * 7 % 300


def by_hand(start: dict, adapters: dict) -> dict:
    """The plain model's weights: W + alpha/r B A; with DoRA each row of it, and its bias, times magnitude / norm."""
    weights = dict(start)
    for name in [name.removesuffix(".lora_a.weight") for name in adapters if name.endswith(".lora_a.weight")]:
        update = ALPHA / RANK * adapters[f"{name}.lora_b.weight"] @ adapters[f"{name}.lora_a.weight"]
        weights[f"{name}.weight"] = start[f"{name}.weight"] + update
        if f"{name}.magnitude" in adapters:
            # The norm is a constant in the backward pass (section 4.3 of arXiv 2402.09353).
            factor = adapters[f"{name}.magnitude"] / weights[f"{name}.weight"].norm(dim=1).detach()
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * factor[:, None]
            if f"{name}.bias" in start:
                weights[f"{name}.bias"] = start[f"{name}.bias"] * factor
    return weights


# NF4 packs 64 x 256 numbers at a time.
WIDE = SIZE | {"num_layers": 2, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256}


WIDE_HF = {"num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 256}


# Tied head; a head of its own with an adapter; biases in q, k and v; weights in NF4.
CASES = {
    "llama3_2": ("llama3_2", {}),
    "llama3_2 dora": ("llama3_2", {"use_dora": True}),
    "llama2 output": ("llama2", {"apply_lora_to_output": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 dora": ("qwen2", {"use_dora": True}),
    "qlora": ("llama3_2", {"quantize_base": True}),
    "qdora": ("llama3_2", {"quantize_base": True, "use_dora": True}),
}


def configured(folder, tokenizer, family, builder, **changes) -> tuple[dict, dict, Path]:
    """The section of the plain model, its first weights, and the config of a training, large enough for NF4."""
    wide = "quantize_base" in builder
    section, builder = (plain_section(family) | WIDE, builder | WIDE) if wide else (plain_section(family), builder)
    start = make_start(folder / "start", family, tokenizer, section, **(WIDE_HF if wide else {}))
    return section, start, adapter_config(folder, tokenizer, family, folder / "start", builder, **changes)


def numbers(model) -> dict[str, torch.Tensor]:
    """A copy of all weights, those in NF4 unpacked."""
    named = model.named_parameters()
    return {n: (p.get_original_weight() if isinstance(p, NF4Tensor) else p).detach().clone() for n, p in named}


def trained_run(folder, tokenizer, case: str, **changes) -> SimpleNamespace:
    """A run of a case: its start as it is in the model, its first weights, its config, its checkpoint."""
    family, builder = CASES[case]
    section, start, path = configured(folder, tokenizer, family, builder, **changes)
    recipe = set_up(path)
    first = numbers(recipe.model)
    for name, parameter in recipe.model.named_parameters():
        if isinstance(parameter, NF4Tensor):
            packed, near = to_nf4(start[name]).get_original_weight(), 0.02 if changes else 0
            torch.testing.assert_close(first[name].float(), packed, atol=0, rtol=near)
            start[name] = first[name]
    recipe.train()
    recipe.cleanup()
    return SimpleNamespace(
        case=case, family=family, folder=folder, path=path, start=start, first=first, recipe=recipe,
        log=read_log(folder / "out"), checkpoint=folder / "out" / "epoch_0",
        adapters=torch.load(folder / "out" / "epoch_0" / "adapter_model.pt", weights_only=True),
        plain=EveryExit(section), plain_section=section,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, tokenizer_folder):
    """The run of a case, once."""
    return functools.cache(lambda case: trained_run(tmp_path_factory.mktemp("adapters"), tokenizer_folder, case))


@pytest.fixture(params=slow_except(CASES, "llama2 output", "qwen2 dora"))
def trained(request, run_of) -> SimpleNamespace:
    return run_of(request.param)


@pytest.fixture(params=["llama2 output", "qwen2 dora"])
def read(request, run_of) -> SimpleNamespace:
    """For what is made of a checkpoint: two that have all that A and B have beside them."""
    return run_of(request.param)


# ---- what trains ----


def papers_loss(logits: list[torch.Tensor], tokens: torch.Tensor, step: int) -> torch.Tensor:
    """J of eq. 5-6 with e_scale 0.5 and R = 2, as in `finetune_config`."""
    by_exit = [F.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for x in logits]
    on = [layer % 2 == step % 2 or layer == len(by_exit) - 1 for layer in range(len(by_exit))]
    return sum(weight * loss for weight, loss in zip(paper_weights(on, 0.5), by_exit, strict=True))


@pytest.mark.slow
def test_the_losses_are_those_of_plain_pytorch(trained):
    """Four steps of AdamW on A, B and the magnitudes alone, on the weights that NF4 gives back."""
    leaves = {name: trained.first[name].clone().requires_grad_() for name in trained.adapters}
    optimizer, dataset = torch.optim.AdamW(leaves.values(), lr=1e-2), trained.recipe.data.dataset
    for step in range(4):
        tokens = torch.tensor([dataset[2 * step + i]["tokens"] for i in range(2)])
        loss = papers_loss(trained.plain.logits(by_hand(trained.start, leaves), tokens), tokens, step)
        rel = 5e-4 if trained.case in ("qlora", "qdora") else 1e-4
        assert trained.log[step + 1]["loss"] == pytest.approx(loss.item(), rel=rel), f"step {step + 1}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


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
            torch.testing.assert_close(value, norms, atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(value, trained.start[name]), name
    firsts = [tuple(v.flatten()[:4].tolist()) for n, v in trained.first.items() if "lora_a" in n]
    assert len(firsts) >= 14 and len(set(firsts)) == len(firsts)


def test_only_adapters_change(trained):
    after = numbers(trained.recipe.model)
    moved = {name for name, value in after.items() if not torch.equal(value, trained.first[name])}
    assert moved == set(trained.adapters)
    assert {name.split(".")[-2] for name in moved if "lora" in name} == {"lora_a", "lora_b"}
    matrices = len(trained.recipe.model.layers) * 7 + (trained.case == "llama2 output")
    assert len(moved) == matrices * (3 if "dora" in trained.case else 2)
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
def test_a_checkpoint_of_adapters_only_has_no_model(read, tmp_path):
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


@pytest.mark.slow
def test_adapters_on_nf4_are_merged_in_bf16(tmp_path, tokenizer_folder):
    run = trained_run(tmp_path, tokenizer_folder, "qdora", dtype="bf16")
    expected = by_hand({n: v.float() for n, v in run.start.items()}, {n: v.float() for n, v in run.adapters.items()})
    merged = read_hf(run.checkpoint, "llama3_2")
    assert {value.dtype for value in [*merged.values(), *run.adapters.values()]} == {torch.bfloat16}
    for name, value in expected.items():
        # DoRA's factor is in bf16 too.
        torch.testing.assert_close(merged[name].float(), value, atol=2**-6, rtol=2**-6)
    assert run.log[1]["loss"] != run.log[4]["loss"]


# ---- generation ----


@pytest.mark.slow
@pytest.mark.parametrize("read", ["llama2 output", "qwen2 dora", "qlora", "qdora"], indirect=True)
def test_generation_with_adapters_gives_the_merged_checkpoints_tokens(read, tmp_path):
    """From a folder and from the file; self-speculative, autoregressive, from an exit. Also those of plain PyTorch."""
    weights = by_hand(read.start, read.adapters)
    merged = generate_with(read, tmp_path / "merged", None)
    folder = generate_with(read, tmp_path / "folder", read.checkpoint)
    file = generate_with(read, tmp_path / "file", read.checkpoint / "adapter_model.pt")
    tokens = tokens_of(merged, "self_speculation=null")
    assert len(set(tokens)) > 2
    assert tokens_of(folder) == tokens_of(folder, "self_speculation=null") == tokens_of(file) == tokens
    early = ["self_speculation=null", "exit_layer=1"]
    assert tokens_of(folder, *early) == tokens_of(merged, *early) != tokens
    recipe = ready(LayerSkipGenerate, folder)
    for name, value in recipe.llm.model.state_dict().items():
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
        ("llama3_2", {"quantize_base": True}, ["enable_async_checkpointing=true"]),
    ],
    ids=["dora, adapters only", "lora", "qlora in shards"],
)
def test_resume_gives_the_losses_of_the_run_that_never_stopped(family, builder, overrides, tmp_path, tokenizer_folder):
    """From the middle of the first epoch, with dropout in the adapters and of layers: the very losses and weights."""
    *_, path = configured(
        tmp_path, tokenizer_folder, family, builder | {"lora_dropout": 0.3}, epochs=2, shuffle=True,
        layer_dropout={"prob": 0.5, "schedule": "exp"}, max_steps_per_epoch=3, save_every_n_steps=2,
        lr_scheduler=COSINE,
    )  # fmt: skip
    train(path, *overrides)
    again = resumed(path, "step_2", *overrides)
    whole = losses(tmp_path / "out")
    assert losses(again) == {step: whole[step] for step in (3, 4, 5, 6)}
    ends = [torch.load(out / "epoch_1" / "adapter_model.pt", weights_only=True) for out in (tmp_path / "out", again)]
    assert same_tensors(*ends)
