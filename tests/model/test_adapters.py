"""LoRA and DoRA adapters: what trains, what checkpoints hold, how generation and evaluation read them.

Expected values: torchtune's plain builders with weights that are put together here, W + alpha/r B A and DoRA's formula.
"""

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.adapters import (
    ALPHA,
    EXITS,
    RANK,
    TOKENS,
    Allocations,
    EveryExit,
    adapter_config,
    by_hand,
    generate_with,
    make_start,
    papers_loss,
    plain_section,
    read_hf,
    tokens_of,
)
from helpers.commands import run_tune
from helpers.training import few_texts, losses, read_log, train  # noqa: F401
from omegaconf import OmegaConf
from safetensors.torch import load_file

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.model.adapters import merge_adapters
from layerskip_recipes.training.recipe import LayerSkipFinetune

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
        recipe = LayerSkipFinetune(load_config(str(path)))
        recipe.setup()
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


# ------------------------------------------------------------------------------------------------------- what trains


def test_the_losses_are_those_of_plain_pytorch(trained):
    """Four steps of AdamW on A, B and the magnitudes alone, every loss by the paper's formula."""
    leaves = {n: trained.first[n].clone().requires_grad_() for n in trained.adapters}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2)
    dataset = trained.recipe.data.dataset
    for step in range(4):
        tokens = torch.tensor([dataset[2 * step + i]["tokens"] for i in range(2)])
        loss = papers_loss(trained.plain.logits(by_hand(trained.start, leaves), tokens), tokens, step)
        assert trained.log[step + 1]["loss"] == pytest.approx(loss.item(), rel=1e-4), f"step {step + 1}"
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
            torch.testing.assert_close(value, norms)
        else:
            assert torch.equal(value, trained.start[name]), name
    assert len({tuple(v.flatten()[:4].tolist()) for n, v in trained.first.items() if "lora_a" in n}) > 20  # all differ


def test_only_adapters_change(trained):
    """All of them do, and the checkpoint's adapter file holds them."""
    after = trained.recipe.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, trained.first[name])}
    assert moved == set(trained.adapters)
    assert {name.split(".")[-2] for name in moved if "lora" in name} == {"lora_a", "lora_b"}
    layers_with_adapters = 4 * 7 + (trained.case == "llama2 output")
    assert len(moved) == layers_with_adapters * (3 if "dora" in trained.case else 2)
    assert {n for n, p in trained.recipe.model.named_parameters() if p.requires_grad} == moved
    for name, value in trained.adapters.items():
        assert torch.equal(value, after[name])


def count_head_gradients(path: Path) -> int:
    """How many tensors of the head's shape an optimizer step makes."""
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    recipe.progress = SimpleNamespace(set_postfix_str=lambda text: None)
    with Allocations((300, 32), (32, 300)) as made:
        recipe._train_step(recipe.data.batches(0))
    frozen = [p for p in recipe.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)
    return made.count


@pytest.mark.parametrize("family", ["llama3_2", "llama2", "qwen2"])
def test_no_gradient_of_the_frozen_head_is_computed(family, tmp_path, tokenizer_folder):
    """Nor of the embedding. The same count on a full training finds them."""
    make_start(tmp_path / "start", family, tokenizer_folder)
    path = adapter_config(tmp_path, tokenizer_folder, family, tmp_path / "start")
    assert count_head_gradients(path) == 0
    full = adapter_config(tmp_path / "full", tokenizer_folder, family, tmp_path / "start", model=plain_section(family))
    assert count_head_gradients(full) > 0


@pytest.mark.parametrize(("family", "builder"), [("llama3_2", {}), ("llama2", {"apply_lora_to_output": True})])
def test_the_loss_asks_for_gradients_of_adapters_only(family, builder, tmp_path, tokenizer_folder, monkeypatch):
    """Of the hidden states, and of the head's adapter if it has one: never of the head and the norm."""
    make_start(tmp_path / "start", family, tokenizer_folder)
    path = adapter_config(tmp_path, tokenizer_folder, family, tmp_path / "start", builder, max_steps_per_epoch=1)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    name_of = {p.untyped_storage().data_ptr(): name for name, p in recipe.model.named_parameters()}
    asked, grad = set(), torch.autograd.grad

    def recorded(outputs, inputs, *args, **kwargs):
        for x in inputs if isinstance(inputs, list | tuple) else [inputs]:
            asked.add(name_of.get(x.untyped_storage().data_ptr(), "hidden state"))
        return grad(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", recorded)
    recipe.train()
    assert asked == {"hidden state"} | ({"output.lora_a.weight", "output.lora_b.weight"} if builder else set())


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_the_merged_checkpoint_is_the_formula(trained):
    """And nothing of the adapters is left in it."""
    expected = by_hand(trained.start, trained.adapters)
    merged = read_hf(trained.checkpoint, trained.family)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    changed = {name for name in merged if not torch.equal(merged[name], trained.start[name])}
    names = {name.rpartition(".lora_a")[0] for name in trained.adapters if "lora_a" in name}
    biased = [name for name in names if "dora" in trained.case and f"{name}.bias" in trained.start]
    assert changed == {f"{name}.weight" for name in names} | {f"{name}.bias" for name in biased}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("in_place", [True, False])
def test_merging_in_place_takes_no_second_copy_of_the_weights(in_place):
    state = {"q.weight": torch.randn(8, 6), "q.lora_a.weight": torch.randn(2, 6), "q.lora_b.weight": torch.randn(8, 2)}
    before, place = state["q.weight"].clone(), state["q.weight"].data_ptr()
    expected = before + 16 / 2 * state["q.lora_b.weight"] @ state["q.lora_a.weight"]
    plain = merge_adapters(state, {"r": 2, "lora_alpha": 16}, in_place)
    assert plain.keys() == {"q.weight"}
    torch.testing.assert_close(plain["q.weight"], expected, rtol=1e-9, atol=1e-9)
    assert (plain["q.weight"].data_ptr() == place) == in_place
    assert torch.equal(state["q.weight"], before) == (not in_place)


def test_the_merged_checkpoint_has_the_trained_models_logits_at_every_exit(trained):
    merged = read_hf(trained.checkpoint, trained.family)
    trained.recipe.model.eval()
    with torch.no_grad():
        for exit_layer, logits in zip(EXITS, trained.plain.logits(merged, TOKENS), strict=True):
            ours = trained.recipe.model(TOKENS, exit_layer=exit_layer)
            assert ours.std() > 0.1
            torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-4)


def test_adapters_in_pefts_names(trained):
    """The safetensors file and the config beside it, apart from the merged weights."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    modules = [f"model.layers.{layer}.{module}" for layer in range(4) for module in attention + mlp]
    modules += ["lm_head"] if trained.case == "llama2 output" else []
    dora, dora_with_biases = "dora" in trained.case, trained.case == "qwen2 dora"
    kinds = ["lora_A.weight", "lora_B.weight"] + (["lora_magnitude_vector"] if dora else [])
    state = load_file(trained.checkpoint / "adapter" / "adapter_model.safetensors")
    biases = {f"{module}.base_layer.bias" for module in modules if module[-6] in "qkv"} if dora_with_biases else set()
    assert set(state) == {f"base_model.model.{name}" for name in biases} | {
        f"base_model.model.{module}.{kind}" for module in modules for kind in kinds
    }
    described = json.loads((trained.checkpoint / "adapter" / "adapter_config.json").read_text())
    assert set(described.pop("target_modules")) == {module.rpartition(".")[2] for module in modules}
    expected = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"} | ({"use_dora": True} if dora else {})
    assert described == expected | ({"bias": "lora_only"} if dora_with_biases else {})


def test_pefts_form_on_the_hugging_face_weights_is_the_merged_checkpoint(trained):
    """W + alpha/r B A, DoRA's magnitudes as PEFT applies them (to the weight alone), and biases in their place."""
    adapters = load_file(trained.checkpoint / "adapter" / "adapter_model.safetensors")
    start = load_file(trained.folder / "start" / "model.safetensors")
    merged = load_file(trained.checkpoint / "model-00001-of-00001.safetensors")
    assert set(merged) == set(start)
    for name, weight in start.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in adapters:
            weight = weight + ALPHA / RANK * adapters[f"{module}.lora_B.weight"] @ adapters[f"{module}.lora_A.weight"]
        if f"{module}.lora_magnitude_vector" in adapters:
            weight = weight * (adapters[f"{module}.lora_magnitude_vector"] / weight.norm(dim=1))[:, None]
        weight = adapters.get(f"base_model.model.{name.removesuffix('.bias')}.base_layer.bias", weight)
        torch.testing.assert_close(merged[name], weight, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
def test_peft_opens_the_adapters(trained, monkeypatch):
    """On the model that the training started from, with the logits of the merged checkpoint."""
    peft = pytest.importorskip("peft")
    # It refuses torchao before 0.16, which torchtune needs, even where no weight is quantised.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trained.folder / "start")
    theirs = peft.PeftModel.from_pretrained(base, str(trained.checkpoint / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(trained.checkpoint)  # adds no adapters: they are merged already
    with torch.no_grad():
        expected = trained.plain.logits(read_hf(trained.checkpoint, trained.family), TOKENS)[-1]
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_adapters_only(read, tmp_path):
    """The same adapters in both forms, and no weights beside them."""
    train(read.path, "save_adapter_weights_only=true", f"output_dir={tmp_path}/out")
    folder = tmp_path / "out" / "epoch_0"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.pt", "adapter_model.safetensors", "adapter_config.json", "recipe_state.pt"} <= files
    assert not [name for name in files if name.startswith("model")]
    assert (folder / "adapter_config.json").read_text() == (
        read.checkpoint / "adapter" / "adapter_config.json"
    ).read_text()
    state = torch.load(folder / "adapter_model.pt", weights_only=True)
    both = (
        load_file(folder / "adapter_model.safetensors"),
        load_file(read.checkpoint / "adapter" / "adapter_model.safetensors"),
    )
    for ours, theirs in ((state, read.adapters), both):
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    path = generate_with(read, tmp_path, folder)
    assert tokens_of(path) == tokens_of(generate_with(read, tmp_path, read.checkpoint))


# -------------------------------------------------------------------------------------------------------- generation


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
    recipe = LayerSkipGenerate(load_config(str(folder)))
    recipe.setup()
    for name, value in recipe.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=1e-5)
    context = list(recipe.prompt_tokens[0])
    prompt = len(context)
    for _ in tokens:
        with torch.no_grad():
            context.append(read.plain.logits(weights, torch.tensor([context]))[-1][0, -1].argmax().item())
    assert tokens == context[prompt:]


def test_evaluation_with_adapters(read, tmp_path):
    """Each exit's figures are those of the merged checkpoint."""
    dataset = OmegaConf.load(read.path).dataset
    found = []
    for adapters in (read.checkpoint, None):
        config = OmegaConf.load(generate_with(read, tmp_path, adapters))
        kept = {key: config[key] for key in ("model", "checkpointer", "tokenizer", "device", "dtype", "seed")}
        OmegaConf.save(kept | {"dataset": dataset, "batch_size": 2}, tmp_path / "eval.yaml")
        recipe = LayerSkipEval(load_config(str(tmp_path / "eval.yaml")))
        recipe.setup()
        found.append(recipe.evaluate()["exits"])
    for exit_layer in EXITS:
        assert found[0][exit_layer] == pytest.approx(found[1][exit_layer], rel=1e-5)


@pytest.mark.slow
def test_tune_run_generates_with_adapters(tmp_path, tokenizer_folder):
    """The real command, self-speculative: the text of the merged checkpoint."""
    make_start(tmp_path / "start", "llama3_2", tokenizer_folder)
    path = adapter_config(tmp_path, tokenizer_folder, "llama3_2", tmp_path / "start")
    train(path)
    run = SimpleNamespace(
        family="llama3_2", folder=tmp_path, path=path, start=None, checkpoint=tmp_path / "out" / "epoch_0"
    )
    with_adapters = generate_with(run, tmp_path, run.checkpoint, output_file=str(tmp_path / "adapters.jsonl"))
    command = run_tune("run", "layerskip_generate", "--config", str(with_adapters), cwd=tmp_path)
    assert command.returncode == 0, command.stderr[-2000:]
    merged = generate_with(run, tmp_path / "merged", None, output_file=str(tmp_path / "merged.jsonl"))
    recipe = LayerSkipGenerate(load_config(str(merged)))
    recipe.setup()
    recipe.generate()
    answers = (tmp_path / "adapters.jsonl").read_text()
    assert json.loads(answers)["tokens"] == 12 and answers == (tmp_path / "merged.jsonl").read_text()
