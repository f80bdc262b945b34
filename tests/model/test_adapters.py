"""LoRA, DoRA and QLoRA: what trains, what checkpoints hold, how generation reads them, resume, bad input.

Expected values: torchtune's plain builders with weights that are put together here, W + alpha/r B A and DoRA's formula.
"""

import functools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.adapters import (
    ALPHA,
    RANK,
    SHAPE,
    EveryExit,
    adapted_section,
    make_start,
    plain_section,
    read_hf,
    reader,
)
from helpers.commands import run_tune
from helpers.configs import SIZE, finetune_config, generate_config, make_checkpoint
from helpers.refusals import check
from helpers.training import few_texts, losses, read_log, train  # noqa: F401
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules import common_utils
from torchtune.training import FullModelHFCheckpointer

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.evaluation.recipe import LayerSkipEval
from layerskip_recipes.generation.recipe import LayerSkipGenerate
from layerskip_recipes.model.adapters import correct_peft_form, merged
from layerskip_recipes.training.optimizers import checkpoint_contents
from layerskip_recipes.training.recipe import LayerSkipFinetune

# Tied head; a head of its own with an adapter; biases in q, k and v.
CASES = {
    "llama3_2": ("llama3_2", {}),
    "llama3_2 dora": ("llama3_2", {"use_dora": True}),
    "llama2 output": ("llama2", {"apply_lora_to_output": True}),
    "qwen2": ("qwen2", {}),
    "qwen2 dora": ("qwen2", {"use_dora": True}),
}
EXITS = (1, 2, 3, 4)
TOKENS = torch.arange(40).view(2, 20) * 7 % 300


def adapter_config(folder: Path, tokenizer: Path, family: str, start: Path, builder: dict | None = None, **changes):
    """4 steps of 2 samples from `start` with adapters, all of them moving; no dropout and no shuffling."""
    defaults = {
        "model": adapted_section(family, **(builder or {})),
        "checkpointer": reader(start, family),
        "layer_dropout": None,
        "shuffle": False,
        "max_steps_per_epoch": 4,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2},
    }
    return finetune_config(folder, tokenizer, **defaults | changes)


def by_hand(start: dict, adapters: dict, scale: float = ALPHA / RANK) -> dict:
    """The plain model's weights: W + alpha/r B A; with DoRA each row of it, and its bias, times magnitude / norm."""
    weights = dict(start)
    for name in [name.removesuffix(".lora_a.weight") for name in adapters if name.endswith(".lora_a.weight")]:
        update = scale * adapters[f"{name}.lora_b.weight"] @ adapters[f"{name}.lora_a.weight"]
        weights[f"{name}.weight"] = start[f"{name}.weight"] + update
        if f"{name}.magnitude" in adapters:
            # The norm is a constant in the backward pass (section 4.3 of arXiv 2402.09353).
            factor = adapters[f"{name}.magnitude"] / weights[f"{name}.weight"].norm(dim=1).detach()
            weights[f"{name}.weight"] = weights[f"{name}.weight"] * factor[:, None]
            if f"{name}.bias" in start:
                weights[f"{name}.bias"] = start[f"{name}.bias"] * factor
    return weights


def papers_loss(logits: list[torch.Tensor], tokens: torch.Tensor, step: int) -> torch.Tensor:
    """J of eq. 5-6 with e_scale 0.5 and R = 2, as in `finetune_config`."""
    by_exit = [F.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()) for x in logits]
    last = len(by_exit) - 1
    e = [0.5 * layer * (layer + 1) / 2 for layer in range(last)] + [last + 0.5 * (last - 1) * last / 2]
    on = [layer for layer in range(last + 1) if layer % 2 == step % 2 or layer == last]
    return sum(e[layer] * by_exit[layer] for layer in on) / sum(e[layer] for layer in on)


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


@pytest.fixture(params=["llama3_2 dora", "llama2 output", "qwen2 dora"])
def read(request, run_of) -> SimpleNamespace:
    """For what is made of a checkpoint: those with more than A and B, whose formulas all five are held to."""
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


class Allocations(TorchDispatchMode):
    """Counts the plain tensors of some shapes that come into being, other than views of what is there."""

    def __init__(self, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, made = (
            {x.untyped_storage().data_ptr(): x.shape for x in tensors if type(x) in (torch.Tensor, torch.nn.Parameter)}
            for tensors in (args, [out])
        )
        self.count += sum(tuple(shape) in self.shapes for place, shape in made.items() if place not in inputs)
        return out


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


@pytest.mark.parametrize("in_place", [True, False])
def test_merging_in_place_takes_no_second_copy_of_the_weights(in_place):
    state = {"q.weight": torch.randn(8, 6), "q.lora_a.weight": torch.randn(2, 6), "q.lora_b.weight": torch.randn(8, 2)}
    before, place = state["q.weight"].clone(), state["q.weight"].data_ptr()
    expected = before + 16 / 2 * state["q.lora_b.weight"] @ state["q.lora_a.weight"]
    plain = merged(state, {"r": 2, "lora_alpha": 16}, in_place)
    assert plain.keys() == {"q.weight"}
    torch.testing.assert_close(plain["q.weight"], expected)
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
    """The safetensors file and the config beside it."""
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    mlp = [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    modules = [f"model.layers.{layer}.{module}" for layer in range(4) for module in attention + mlp]
    modules += ["lm_head"] if trained.case == "llama2 output" else []
    dora, dora_with_biases = "dora" in trained.case, trained.case == "qwen2 dora"
    kinds = ["lora_A.weight", "lora_B.weight"] + (["lora_magnitude_vector"] if dora else [])
    state = load_file(trained.checkpoint / "adapter_model.safetensors")
    biases = {f"{module}.base_layer.bias" for module in modules if module[-6] in "qkv"} if dora_with_biases else set()
    assert set(state) == {f"base_model.model.{name}" for name in biases} | {
        f"base_model.model.{module}.{kind}" for module in modules for kind in kinds
    }
    described = json.loads((trained.checkpoint / "adapter_config.json").read_text())
    assert set(described.pop("target_modules")) == {module.rpartition(".")[2] for module in modules}
    expected = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA"} | ({"use_dora": True} if dora else {})
    assert described == expected | ({"bias": "lora_only"} if dora_with_biases else {})


def test_pefts_form_on_the_hugging_face_weights_is_the_merged_checkpoint(trained):
    """W + alpha/r B A, DoRA's magnitudes as PEFT applies them (to the weight alone), and biases in their place."""
    adapters = load_file(trained.checkpoint / "adapter_model.safetensors")
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


def test_peft_opens_the_adapters(trained, monkeypatch):
    """On the model that the training started from, with the logits of the merged checkpoint."""
    peft = pytest.importorskip("peft")
    # It refuses torchao before 0.16, which torchtune needs, even where no weight is quantised.
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(trained.folder / "start")
    theirs = peft.PeftModel.from_pretrained(base, str(trained.checkpoint)).eval()
    with torch.no_grad():
        expected = trained.plain.logits(read_hf(trained.checkpoint, trained.family), TOKENS)[-1]
        torch.testing.assert_close(theirs(TOKENS).logits, expected, atol=1e-3, rtol=1e-3)


def test_adapters_only(read, tmp_path):
    """The same adapters in both forms, and no weights beside them."""
    train(read.path, "save_adapter_weights_only=true", f"output_dir={tmp_path}/out")
    folder = tmp_path / "out" / "epoch_0"
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_model.pt", "adapter_model.safetensors", "adapter_config.json", "recipe_state.pt"} <= files
    assert not [name for name in files if name.startswith("model")]
    assert (folder / "adapter_config.json").read_text() == (read.checkpoint / "adapter_config.json").read_text()
    state = torch.load(folder / "adapter_model.pt", weights_only=True)
    both = load_file(folder / "adapter_model.safetensors"), load_file(read.checkpoint / "adapter_model.safetensors")
    for ours, theirs in ((state, read.adapters), both):
        assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    path = generate_with(read, tmp_path, folder)
    assert tokens_of(path) == tokens_of(generate_with(read, tmp_path, read.checkpoint))


# -------------------------------------------------------------------------------------------------------- generation


def generate_with(trained: SimpleNamespace, folder: Path, adapters: Path | None, **changes) -> Path:
    """A generation of 12 tokens: the start with adapters, or the merged checkpoint without."""
    checkpoint = trained.folder / "start" if adapters else trained.checkpoint
    section = reader(checkpoint, trained.family) | {"output_dir": "unused"}
    section |= {"adapter_checkpoint": str(adapters)} if adapters else {}
    model = OmegaConf.load(trained.path).model if adapters else plain_section(trained.family)
    tokenizer = {"_component_": "layerskip_recipes.hf_tokenizer", "path": str(trained.folder / "start")}
    changes = {"max_new_tokens": 12, "checkpointer": section, "model": model, "tokenizer": tokenizer} | changes
    return generate_config(folder, checkpoint, **changes)


def tokens_of(path: Path, *overrides: str) -> list[int]:
    """What a generation config generates for its prompt."""
    recipe = LayerSkipGenerate(load_config(str(path), overrides))
    recipe.setup()
    assert not [name for name in recipe.model.state_dict() if "lora" in name or "magnitude" in name]
    return recipe._run([0], recipe.max_new_tokens)[0][0]


def test_generation_with_adapters_gives_the_merged_checkpoints_tokens(read, tmp_path):
    """From a folder and from the file; self-speculative, autoregressive, from an exit. Also those of plain PyTorch."""
    weights = by_hand(read.start, read.adapters)
    merged = generate_with(read, tmp_path / "merged", None)
    folder = generate_with(read, tmp_path / "folder", read.checkpoint)
    file = generate_with(read, tmp_path / "file", read.checkpoint / "adapter_model.pt")
    tokens = tokens_of(merged, "self_speculation=null")
    assert len(set(tokens)) > 2
    for path in (folder, file):
        assert tokens_of(path) == tokens_of(path, "self_speculation=null") == tokens
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


# ------------------------------------------------------------------------------------------------------------- QLoRA

# NF4 packs 64 x 256 numbers at a time.
WIDE = SIZE | {"num_layers": 2, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256}
WIDE_SHAPE = {key: WIDE[key] for key in SHAPE}
WIDE_PLAIN = plain_section("llama3_2") | WIDE
WIDE_HF = {
    "num_hidden_layers": 2, "num_key_value_heads": 2, "hidden_size": 256, "intermediate_size": 256,
}  # fmt: skip


def quantised_run(folder: Path, tokenizer: Path, **changes) -> SimpleNamespace:
    """A QLoRA run: its start with the weights that NF4 makes of it, its first adapters, its recipe, its checkpoint."""
    start = make_start(folder / "start", "llama3_2", tokenizer, WIDE_PLAIN, **WIDE_HF)
    builder, dtype = WIDE | {"quantize_base": True, **changes.pop("builder", {})}, changes.get("dtype")
    path = adapter_config(folder, tokenizer, "llama3_2", folder / "start", builder, **changes)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    packed = {name: p for name, p in recipe.model.named_parameters() if isinstance(p, NF4Tensor)}
    for name, parameter in packed.items():
        unpacked, of_start = parameter.get_original_weight(), to_nf4(start[name]).get_original_weight()
        torch.testing.assert_close(unpacked.float(), of_start, atol=0, rtol=0.02 if dtype == "bf16" else 0)
    start |= {name: parameter.get_original_weight() for name, parameter in packed.items()}
    first = {name: p.detach().clone() for name, p in recipe.model.named_parameters() if p.requires_grad}
    recipe.train()
    recipe.cleanup()
    return SimpleNamespace(
        path=path, start=start, packed=set(packed), first=first, recipe=recipe, log=read_log(folder / "out"),
        folder=folder, checkpoint=folder / "out" / "epoch_0", family="llama3_2", plain=EveryExit(WIDE_PLAIN),
        adapters=torch.load(folder / "out" / "epoch_0" / "adapter_model.pt", weights_only=True),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}], ids=["qlora", "qdora"])
def quantised(request, tmp_path_factory, tokenizer_folder) -> SimpleNamespace:
    return quantised_run(tmp_path_factory.mktemp("quantised"), tokenizer_folder, builder=request.param)


def test_qlora_trains_adapters_on_nf4_weights(quantised):
    """Its losses, and its exits at the end, are those of plain PyTorch on the weights that NF4 gives back."""
    assert len(quantised.packed) == 2 * 7
    leaves = {name: value.clone().requires_grad_() for name, value in quantised.first.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-2)
    dataset = quantised.recipe.data.dataset
    for step in range(4):
        tokens = torch.tensor([dataset[2 * step + i]["tokens"] for i in range(2)])
        loss = papers_loss(quantised.plain.logits(by_hand(quantised.start, leaves), tokens), tokens, step)
        assert quantised.log[step + 1]["loss"] == pytest.approx(loss.item(), rel=5e-4), f"step {step + 1}"
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, p in quantised.recipe.model.named_parameters():
        if isinstance(p, NF4Tensor):
            assert torch.equal(p.get_original_weight(), quantised.start[name])
    expected = quantised.plain.logits(by_hand(quantised.start, quantised.adapters), TOKENS)
    quantised.recipe.model.eval()
    with torch.no_grad():
        for exit_layer, logits in zip((1, 2), expected, strict=True):
            torch.testing.assert_close(
                quantised.recipe.model(TOKENS, exit_layer=exit_layer), logits, atol=1e-3, rtol=1e-3
            )


def test_qloras_merged_checkpoint_is_the_formula(quantised):
    """With the NF4 weights unpacked, in the run's dtype."""
    merged, expected = read_hf(quantised.checkpoint, "llama3_2"), by_hand(quantised.start, quantised.adapters)
    assert set(merged) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, atol=1e-5, rtol=1e-5)
        assert not torch.equal(value, quantised.start[name]) or name not in quantised.packed


def test_qloras_merged_checkpoint_has_the_trained_models_logits(quantised):
    merged = read_hf(quantised.checkpoint, "llama3_2")
    quantised.recipe.model.eval()
    with torch.no_grad():
        for exit_layer, logits in zip((1, 2), quantised.plain.logits(merged, TOKENS), strict=True):
            torch.testing.assert_close(
                quantised.recipe.model(TOKENS, exit_layer=exit_layer), logits, atol=1e-3, rtol=1e-3
            )


def test_qdora_starts_as_the_model_that_it_adapts(quantised):
    """Its magnitudes are the norms of the rows that the model has, which NF4 rounded."""
    magnitudes = {name: value for name, value in quantised.first.items() if name.endswith("magnitude")}
    for name, value in magnitudes.items():
        norms = quantised.start[name.replace("magnitude", "weight")].norm(dim=1)
        torch.testing.assert_close(value, norms, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("builder", [{}, {"use_dora": True}], ids=["qlora", "qdora"])
def test_qlora_in_bf16(builder, tmp_path, tokenizer_folder):
    """Trains, and its checkpoint, all bf16, holds the formula."""
    run = quantised_run(tmp_path, tokenizer_folder, builder=builder, dtype="bf16")
    expected = by_hand({n: v.float() for n, v in run.start.items()}, {n: v.float() for n, v in run.adapters.items()})
    merged = read_hf(run.checkpoint, "llama3_2")
    assert {value.dtype for value in [*merged.values(), *run.adapters.values()]} == {torch.bfloat16}
    for name, value in expected.items():
        # DoRA's factor is in bf16 too.
        torch.testing.assert_close(merged[name].float(), value, atol=2**-6 if builder else 2**-8, rtol=2**-6)
    dataset = run.recipe.data.dataset
    tokens = torch.tensor([dataset[i]["tokens"] for i in range(2)])
    start = {name: value.float() for name, value in run.start.items()}
    first = {name: value.float() for name, value in run.first.items()}
    with torch.no_grad():
        loss = papers_loss(run.plain.logits(by_hand(start, first), tokens), tokens, 0).item()
    assert run.log[1]["loss"] == pytest.approx(loss, rel=0.02)
    assert run.log[1]["loss"] != run.log[4]["loss"]


def test_merged_weights_take_no_adapters(quantised, tmp_path):
    """Their own would count twice."""
    for place in (quantised.checkpoint, quantised.checkpoint / "adapter_model.pt"):
        reads = reader(quantised.checkpoint, "llama3_2") | {"adapter_checkpoint": str(place), "output_dir": "x"}
        section = adapted_section("llama3_2", **WIDE)
        path = generate_config(tmp_path, quantised.checkpoint, model=section, checkpointer=reads)
        with pytest.raises(ValueError, match=r"^checkpointer\.adapter_checkpoint: .* they would count twice"):
            LayerSkipGenerate(load_config(str(path)))


def test_generation_with_qlora_adapters_gives_the_merged_checkpoints_tokens(quantised, tmp_path):
    """NF4 weights are unpacked, so that decoding needs no other kernels."""
    with_adapters = generate_with(quantised, tmp_path / "adapters", quantised.checkpoint)
    merged = generate_with(quantised, tmp_path / "merged", None, model=WIDE_PLAIN)
    tokens = tokens_of(with_adapters)
    assert tokens == tokens_of(merged) == tokens_of(with_adapters, "self_speculation=null")
    assert len(set(tokens)) > 3


def test_a_checkpoint_of_adapters_alone_unpacks_no_weights(quantised):
    """Nor copies any: no tensor of a weight's shape comes into being."""
    recipe = quantised.recipe
    cfg = OmegaConf.merge(recipe.cfg, {"save_adapter_weights_only": True})
    with Allocations((256, 256), (128, 256), (300, 256)) as made:
        contents = checkpoint_contents(cfg, recipe.model, recipe.meta, torch.device("cpu"))
    assert made.count == 0 and "model" not in contents
    assert set(contents["adapter"]) == set(quantised.adapters)
    assert all(torch.equal(value, quantised.adapters[name]) for name, value in contents["adapter"].items())
    with Allocations((256, 256)) as made:
        checkpoint_contents(recipe.cfg, recipe.model, recipe.meta, torch.device("cpu"))
    assert made.count > 0


# ------------------------------------------------------------------------------------------------------------ resume


@pytest.mark.parametrize(
    ("family", "builder", "overrides"),
    [
        ("llama3_2", {}, []),
        ("qwen2", {"use_dora": True}, ["save_adapter_weights_only=true"]),
        ("llama2", {"apply_lora_to_output": True}, ["enable_async_checkpointing=true"]),
        ("llama3_2", WIDE_SHAPE | {"quantize_base": True}, []),
        # torchtune's llama3_2 takes no notice of low_cpu_ram.
        ("llama2", WIDE_SHAPE | {"quantize_base": True}, ["low_cpu_ram=true", "enable_async_checkpointing=true"]),
    ],
    ids=["lora", "dora, adapters only", "lora in shards", "qlora", "qlora in shards with little memory"],
)
def test_resume_gives_the_losses_of_the_run_that_never_stopped(
    family, builder, overrides, tmp_path, tokenizer_folder, monkeypatch
):
    """From the middle of the first epoch, with dropout in the adapters and of layers: the very losses and weights."""
    monkeypatch.setattr(common_utils, "_use_low_cpu_ram", False)  # what the recipe makes of it goes with the test
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


def test_resume_on_other_weights_is_refused(tmp_path, tokenizer_folder):
    """The adapters were trained on others."""
    make_start(tmp_path / "start", "llama3_2", tokenizer_folder)
    make_checkpoint(tmp_path / "other", tokenizer_folder)
    path = adapter_config(tmp_path, tokenizer_folder, "llama3_2", tmp_path / "start")
    train(path)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*checkpoint_dir.*start.*other"):
        train(path, "resume_from_checkpoint=true", "epochs=2", f"checkpointer.checkpoint_dir={tmp_path}/other")


# --------------------------------------------------------------------------------------------------------- bad input


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


@pytest.fixture
def no_weights(monkeypatch, tmp_path):
    """Weights must not be read before a mistake is found."""

    def load(self, *args, **kwargs):
        raise AssertionError("the weights are loaded before the mistake is found")

    monkeypatch.setattr(FullModelHFCheckpointer, "load_checkpoint", load)
    monkeypatch.chdir(tmp_path)


FILE = "checkpointer.adapter_checkpoint"
BAD = [
    # Training.
    ("adapters", "model.lora_attn_modules=[qproj]; model.apply_lora_to_mlp=false", "model.lora_attn_modules",
     "'qproj'", "q_proj"),
    ("adapters", "model.lora_attn_modules=[]", "model", "lora_attn_modules=[]", "q_proj"),
    ("adapters", "model.lora_dropout=2", "model", "lora_dropout=2", "between 0 and 1"),
    ("adapters", "checkpointer.safe_serialization=false", "checkpointer.safe_serialization", "False", "=true"),
    ("adapters", "model.lora_rank=four", "model.lora_rank", "'four'", "lora_rank=8"),
    ("adapters", "model.lora_rnk=4", "model.lora_rnk", "no such argument", "lora_rank"),
    ("adapters", "~model.lora_rank", "model.lora_rank", "missing", "model.lora_rank="),
    ("adapters", "model.apply_lora_to_output=true", "model", "apply_lora_to_output=True", "tie"),
    ("adapters", "optimizer_in_bwd=true", "optimizer_in_bwd", "True", "false"),
    ("adapters", f"{FILE}=somewhere", FILE, "'somewhere'", "resume_from_checkpoint=true"),
    ("adapters", "checkpointer.checkpoint_files=[]", "checkpointer.checkpoint_files", "missing", "[model.safetensors]"),
    ("scratch", "seed=1", "checkpointer.checkpoint_files", "missing", "[model.safetensors]"),
    ("full", "save_adapter_weights_only=true", "save_adapter_weights_only", "True", "lora_llama3_2_1b"),
    ("full", "save_adapter_weights_only=maybe", "save_adapter_weights_only", "'maybe'", "true, false"),
    ("full", "low_cpu_ram=maybe", "low_cpu_ram", "'maybe'", "true, false"),
    ("adapters", "model.lora_rank=0", "model", "0", ""),
    ("adapters", "model.lora_alpha=eight", "model", "eight", ""),
    ("adapters", "model.lora_attn_modules=[q_proj,v_prj]", "model", "v_prj", "v_proj"),
    # Generation.
    ("generate", f"~{FILE}", FILE, "None", f"{FILE}="),
    ("generate", f"{FILE}=null", FILE, "None", f"{FILE}="),
    ("generate full", f"{FILE}=CHECKPOINT", FILE, "epoch_0", "neither"),
    ("generate", f"{FILE}=3", FILE, "3", "text"),
    ("generate", f"{FILE}=[a]", FILE, "['a']", "text"),
    ("generate", f"{FILE}=/nowhere", FILE, "'/nowhere'", "adapter_model.pt"),
    ("generate", f"{FILE}=START", FILE, "start'", "adapter_model.pt"),
    ("generate", f"{FILE}=CHECKPOINT/config.json", FILE, "config.json'", "adapter_model.pt"),
    ("generate", f"{FILE}=CHECKPOINT/adapter_model.safetensors", FILE, "adapter_model.safetensors'", "lora_a"),
    ("generate", "model.lora_rank=8", FILE, "(3, 32)", "(8, 32)"),
    ("generate", "model.lora_attn_modules=[q_proj]", FILE, "k_proj", ""),
    ("generate", "model.apply_lora_to_mlp=false", FILE, "mlp", ""),
    ("generate", "model.use_dora=true", FILE, "magnitude", ""),
    ("generate", "model.num_layers=5; checkpointer.checkpoint_dir=START", FILE, "layers.4", ""),
    ("generate", f"{FILE}=NUMBERS", FILE, "holds no tensors", ""),
    ("generate", "model.lora_alpha=70", "model.lora_alpha", "70", "7"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "overrides", "key", "given", "allowed"), BAD)
def test_bad_input(name, overrides, key, given, allowed, adapter_paths, no_weights):
    """One ValueError with the key, the value and what works, before weights are loaded or anything is written."""
    recipe = "generate" if name.startswith("generate") else "finetune"
    places = {"CHECKPOINT": "checkpoint", "NUMBERS": "numbers"}
    for place, path in places.items():
        overrides = overrides.replace(place, str(adapter_paths[path]))
    overrides = overrides.replace("START", str(adapter_paths["numbers"].parent / "start"))
    check(recipe, adapter_paths[name], overrides, key, given, allowed)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"{FILE}=/nowhere", r"'/nowhere' is neither an adapter_model\.pt nor a folder with one"),
        ("model.lora_rank=8", r"\(3, 32\) there and \(8, 32\) in the model; check model\.lora_rank"),
        ("model.lora_attn_modules=[q_proj]", "not of this model, it has in addition .*k_proj.lora_a"),
        ("model.use_dora=true", "not of this model, it lacks .*magnitude"),
    ],
)
def test_the_adapters_of_another_model(override, message, adapter_paths):
    """What the message says, wherever it is found."""
    recipe = LayerSkipGenerate(load_config(str(adapter_paths["generate"]), [override]))
    with pytest.raises(ValueError, match=rf"^checkpointer\.adapter_checkpoint: .*{message}"):
        recipe.setup()


def test_adapters_of_a_model_whose_config_has_no_key_value_heads(tmp_path):
    """Llama 1's: all heads have their own. DoRA's magnitudes of k go into Hugging Face's order by that number."""
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    magnitude = torch.arange(8.0)
    name = "base_model.model.model.layers.0.self_attn.k_proj.lora_magnitude_vector.weight"
    save_file({name: magnitude}, tmp_path / "adapter_model.safetensors")
    correct_peft_form(tmp_path, "LLAMA2", {})
    # Of each head the even rows, then the odd ones: torchtune rotates neighbours, Hugging Face halves.
    assert load_file(tmp_path / "adapter_model.safetensors")[name].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
