"""A loss or a gradient that is not finite stops the run before the weights change, and names step and samples."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_start, plain_section, reader
from helpers.commands import last_line, run_tune
from helpers.configs import finetune_config, make_checkpoint
from helpers.resuming import COSINE, checkpoints, final_weights
from helpers.training import losses, read_log, train
from safetensors.torch import load_file, save_file

from layerskip_recipes.config.loading import load_config
from layerskip_recipes.training.early_exit import EarlyExitLoss
from layerskip_recipes.training.recipe import LayerSkipFinetune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer_folder) -> Path:
    """A checkpoint whose exits differ."""
    return make_checkpoint(tmp_path_factory.mktemp("validation") / "start", tokenizer_folder)


def order(samples: int, seed: int, epoch: int) -> list[int]:
    """The shuffled order of an epoch."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


@pytest.fixture
def poisoned(tmp_path, tokenizer_folder) -> tuple[Path, int]:
    """A config with one poisonous sample, and its number: the embedding of a token that only it has is NaN."""
    sample = order(20, seed=3, epoch=0)[13]  # late in the first epoch, so that there are checkpoints before it
    texts = [{"text": f"x{n} = {n * 37}\n" + "@" * (n == sample)} for n in range(20)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    dataset = {
        "_component_": "torchtune.datasets.text_completion_dataset", "source": "json", "split": "train",
        "data_files": str(tmp_path / "texts.json"), "column": "text",
    }  # fmt: skip
    make_start(tmp_path / "start", "llama2", tokenizer_folder)  # its head is not the embedding
    path = finetune_config(
        tmp_path, tokenizer_folder, model=plain_section("llama2"), checkpointer=reader(tmp_path / "start", "llama2"),
        dataset=dataset, layer_dropout=None, shuffle=True, gradient_accumulation_steps=2, max_steps_per_epoch=None,
        epochs=2, save_every_n_steps=1, seed=3,
    )  # fmt: skip
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    recipe.cleanup()
    tokens = [set(recipe.data.dataset[i]["tokens"]) for i in range(20)]
    (token,) = tokens[sample] - set().union(*(tokens[:sample] + tokens[sample + 1 :]))
    weights = load_file(tmp_path / "start" / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.nan
    save_file(weights, tmp_path / "start" / "model.safetensors")
    return path, sample


def test_a_poisonous_sample_stops_the_run_and_is_named(poisoned, tmp_path):
    """By the real command: one last line with the step and its samples, exit status 1, and the checkpoint before it."""
    path, sample = poisoned
    places = order(20, seed=3, epoch=0)
    step = places.index(sample) // 4 + 1
    assert step == 4
    run = run_tune("run", "layerskip_finetune", "--config", str(path), cwd=tmp_path)
    assert run.returncode == 1
    last = last_line(run.stderr)
    named = places[4 * (step - 1) : 4 * step]
    assert last.startswith(f"ValueError: loss: not finite at step {step}, with samples {named} of the dataset.")
    assert sample in named and "Traceback" not in run.stderr
    out = tmp_path / "out"
    assert f"The last checkpoint under {str(out)!r} is whole; for example resume_from_checkpoint=true" in last
    assert "optimizer.lr=0.0005" in last
    assert checkpoints(out) == [f"step_{n}" for n in range(1, step)]
    assert sorted(read_log(out)) == list(range(1, step))
    assert all(math.isfinite(line["loss"]) for line in read_log(out).values())
    # It goes on from there, up to the sample.
    recipe = LayerSkipFinetune(load_config(str(path), ["resume_from_checkpoint=true"]))
    recipe.setup()
    assert recipe.step == step - 1
    with pytest.raises(ValueError, match=re.escape(f"not finite at step {step}, with samples {named}")):
        recipe.train()


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_passing_fault_is_forgotten_on_resume(in_backward, start, tmp_path, tokenizer_folder, monkeypatch):
    """A loss that is NaN once, in the second epoch: resumed, the run is the one that never had it."""
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), epochs=2, max_steps_per_epoch=3,
        save_every_n_steps=1, shuffle=True, optimizer_in_bwd=in_backward, lr_scheduler=COSINE,
        layer_dropout={"prob": 0.5},
    )  # fmt: skip
    train(path, f"output_dir={tmp_path}/whole")
    whole, sound = losses(tmp_path / "whole"), EarlyExitLoss.__call__

    def faulty(self, *args, step, **kwargs):
        loss, exits = sound(self, *args, step=step, **kwargs)
        return (loss * math.inf if step == 4 else loss), exits

    monkeypatch.setattr(EarlyExitLoss, "__call__", faulty)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    named = order(8, seed=0, epoch=1)[2:4]
    with pytest.raises(ValueError, match=re.escape(f"loss: not finite at step 5, with samples {named} of the dataset")):
        recipe.train()
    assert checkpoints(tmp_path / "out")[-1] == "step_4"
    monkeypatch.undo()
    train(path, "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == whole


@pytest.mark.parametrize("weight", ["model.norm.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_start_that_is_not_finite(weight, start, tmp_path, tokenizer_folder):
    """The first step says it, and nothing is written over or saved."""
    folder = tmp_path / "start"
    folder.mkdir()
    for file in start.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights[weight].flatten()[3] = math.nan
    save_file(weights, folder / "model.safetensors")
    section = reader(folder, "llama3_2")
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=section, shuffle=False, layer_dropout=None)
    recipe = LayerSkipFinetune(load_config(str(path)))
    recipe.setup()
    with pytest.raises(ValueError, match=r"^loss: not finite at step 1, with samples \[0, 1\] of the dataset"):
        recipe.train()
    assert not checkpoints(tmp_path / "out")


def test_a_learning_rate_that_explodes(start, tmp_path, tokenizer_folder):
    """The step after the update says it, with half the rate as an example."""
    path = finetune_config(tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), shuffle=False)
    recipe = LayerSkipFinetune(load_config(str(path), ["optimizer.lr=1e18"]))
    recipe.setup()
    with pytest.raises(ValueError, match=r"^loss: not finite at step 2, with samples \[2, 3\].*lr=5e\+17") as error:
        recipe.train()
    assert "There is no checkpoint under" in str(error.value) and "resume_from" not in str(error.value)


def test_the_rate_to_try_next_is_half_of_the_configs_not_of_the_schedules(start, tmp_path, tokenizer_folder):
    warm_up = {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 9}
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), shuffle=False, lr_scheduler=warm_up
    )
    recipe = LayerSkipFinetune(load_config(str(path), ["optimizer.lr=1e-3"]))
    recipe.setup()
    with torch.no_grad():
        recipe.model.tok_embeddings.weight.fill_(math.nan)
    with pytest.raises(ValueError, match=r"not finite at step 1.*optimizer.lr=0.0005"):
        recipe.train()


def gradients_explode_at(step: int, monkeypatch) -> None:
    """The gradient of one number is infinite at optimizer step `step` (from 1); the loss is not."""
    sound = LayerSkipFinetune._train_step

    def faulty(self, batches):
        parameter = self.model.layers[1].mlp.w1.weight
        hook = parameter.register_hook(lambda grad: grad * (math.inf if self.step == step - 1 else 1))
        try:
            return sound(self, batches)
        finally:
            hook.remove()

    monkeypatch.setattr(LayerSkipFinetune, "_train_step", faulty)


@pytest.mark.parametrize(
    "clip",
    [
        "1.0",
        "inf",
        "null",
    ],
)  # fmt: skip
def test_a_gradient_that_is_not_finite(clip, start, tmp_path, tokenizer_folder, monkeypatch):
    """Named with its own step and samples, before the weights or a checkpoint have it; the run goes on from there."""
    path = finetune_config(
        tmp_path, tokenizer_folder, checkpointer=reader(start, "llama3_2"), shuffle=False, layer_dropout=None,
        max_steps_per_epoch=4, save_every_n_steps=1,
    )  # fmt: skip
    gradients_explode_at(2, monkeypatch)
    recipe = LayerSkipFinetune(load_config(str(path), [f"clip_grad_norm={clip}"]))
    recipe.setup()
    with pytest.raises(ValueError, match=r"^gradient.*: not finite at step 2, with samples \[2, 3\] of the dataset"):
        recipe.train()
    assert checkpoints(tmp_path / "out") == ["step_1"]
    monkeypatch.undo()
    assert train(path, f"clip_grad_norm={clip}", "resume_from_checkpoint=true").step == 4
    assert all(value.isfinite().all() for value in final_weights(tmp_path / "out" / "epoch_0").values())
