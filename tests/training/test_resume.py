"""A resumed run is the run that never stopped: losses, weights, learning rates by the schedule's formula."""

import math

import pytest
import torch
from helpers.configs import MODEL, finetune_config
from helpers.resuming import COSINE, MOVING, checkpoints, final_weights, keep_only, packed, written
from helpers.training import losses, train
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune.utils import get_logger

pytestmark = pytest.mark.slow

# So wide that some of its state is whole blocks of 8 bits.
EIGHT_BIT = {
    "model": MODEL | {"attn_dropout": 0.1, "intermediate_dim": 128},
    "optimizer": {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2},
}


RUNS = {
    "packed data, accumulation, gradual": {
        "packed": True, "gradient_accumulation_steps": 2, "clip_grad_norm": 1.0,
        "early_exit_loss": {"scale": 0.5, "curriculum": "gradual"},
    },
    "8-bit AdamW, rotational": EIGHT_BIT,
    "optimizer in backward": {"optimizer_in_bwd": True},
    "shards, accumulation": {"enable_async_checkpointing": True, "gradient_accumulation_steps": 2},
    "SGD without momentum": {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-2}},
    "shards, 8-bit AdamW": EIGHT_BIT | {"enable_async_checkpointing": True},
    "shards, SGD without momentum": {
        "enable_async_checkpointing": True, "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-2},
    },
    "a layer without a step": {"layer_dropout": {"prob": 1.0, "layers_scale": "step"}},
    "shards, a layer without a step": {
        "enable_async_checkpointing": True, "layer_dropout": {"prob": 1.0, "layers_scale": "step"},
    },
    "no seed given": {"seed": None},
    "shards, layers that step later": {
        "enable_async_checkpointing": True, "layer_dropout": {"prob": 0.8, "layers_scale": "uniform"}, "batch_size": 1,
    },
}  # fmt: skip


# From the middle of the first epoch, from its end and from the middle of the third: three runs from all of them, the
# others in turns from one; those in shards from shards, which an epoch's end has not.
POINTS = (("step_1", 1), ("epoch_0", 2), ("step_5", 5))


FROM_ALL = ("packed data, accumulation, gradual", "optimizer in backward", "shards, accumulation")


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_the_run_that_never_stopped(name, tmp_path, tokenizer_folder, eager):
    """Every loss and the weights. The learning rate of each step is the schedule's, also as a tensor (torchao)."""
    changes = MOVING | RUNS[name]
    overrides = []
    if changes.pop("packed", False):
        changes["dataset"], overrides = packed(tmp_path), ["tokenizer.max_seq_len=48"]
    path = finetune_config(tmp_path, tokenizer_folder, epochs=3, save_every_n_steps=1, **changes)
    recipe = train(path, *overrides)
    kinds = {type(value) for state in recipe.optimizers.all[0].state.values() for value in state.values()}
    assert (OptimState8bit in kinds) == ("8-bit" in name)
    out = tmp_path / "out"
    whole, end = losses(out), final_weights(out / "epoch_2")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    for step, line in whole.items():
        warm, progress = (step - 1) / 3, (step - 4) / 3
        expected = 1e-2 * (warm if step <= 3 else 0.5 * (1 + math.cos(math.pi * progress)))
        assert line["lr"] == pytest.approx(expected, rel=1e-6)
    turn = list(RUNS).index(name) % 3
    for checkpoint, done in POINTS if name in FROM_ALL else POINTS[turn : turn + 1]:
        again = keep_only(out, checkpoint, tmp_path / checkpoint)
        recipe = train(path, *overrides, f"output_dir={again}", "resume_from_checkpoint=true")
        assert losses(again) == {step: whole[step] for step in range(done + 1, 7)}
        assert all(torch.equal(end[name], value) for name, value in final_weights(again / "epoch_2").items())
        assert recipe.step == 6


def test_more_epochs_go_on(tmp_path, tokenizer_folder):
    """A finished run of one epoch, resumed with three, is the run of three: nothing here depends on T."""
    path = finetune_config(tmp_path, tokenizer_folder, layer_dropout={"prob": 0.5}, shuffle=True)
    train(path, f"output_dir={tmp_path}/whole", "epochs=3")
    train(path)
    train(path, "epochs=3", "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert checkpoints(tmp_path / "out") == ["epoch_0", "epoch_1", "epoch_2"]


def test_a_finished_run_has_nothing_to_do(tmp_path, tokenizer_folder, caplog):
    path = finetune_config(tmp_path, tokenizer_folder)
    train(path)
    out = tmp_path / "out"
    before = written(out)
    with caplog.at_level("INFO", logger=get_logger().name):
        recipe = train(path, "resume_from_checkpoint=true")
    assert recipe.step == 2
    assert written(out) == before
    assert "All 2 steps are done; for more, set epochs higher." in caplog.messages


@pytest.mark.parametrize("scheduler", [None, COSINE], ids=["constant", "cosine"])
def test_another_learning_rate_counts(scheduler, tmp_path, tokenizer_folder):
    """It may change, and is what the recipe itself suggests after a loss that is not finite."""
    path = finetune_config(tmp_path, tokenizer_folder, epochs=2, lr_scheduler=scheduler)
    train(path)
    before = losses(tmp_path / "out")
    again = keep_only(tmp_path / "out", "epoch_0", tmp_path / "again")
    train(path, f"output_dir={again}", "resume_from_checkpoint=true", "optimizer.lr=1e-4")
    for step in (3, 4):
        assert losses(again)[step]["lr"] == pytest.approx(before[step]["lr"] / 10)


def test_another_learning_rate_counts_from_shards_of_an_8_bit_optimizer(tmp_path, tokenizer_folder):
    """Its learning rate is a tensor, into which shards are read."""
    path = finetune_config(
        tmp_path, tokenizer_folder, save_every_n_steps=1, enable_async_checkpointing=True,
        optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 1e-3},
    )  # fmt: skip
    train(path)
    again = keep_only(tmp_path / "out", "step_1", tmp_path / "again")
    train(path, f"output_dir={again}", "resume_from_checkpoint=true", "optimizer.lr=1e-4")
    assert losses(again)[2]["lr"] == pytest.approx(1e-4)


class Counted(torch.optim.AdamW):
    """An optimizer that counts its steps."""

    steps = 0

    def step(self, closure=None):
        Counted.steps += 1
        return super().step(closure)


@pytest.mark.parametrize("in_backward", [False, True])
def test_reading_an_optimizers_state_is_its_own_business(in_backward, tmp_path, tokenizer_folder):
    """torch would step it once without gradients, and wants all of its state on one device; bitsandbytes pages it."""
    path = finetune_config(
        tmp_path, tokenizer_folder, epochs=2, optimizer_in_bwd=in_backward,
        optimizer={"_component_": "test_resume.Counted", "lr": 1e-2},
    )  # fmt: skip
    whole = train(path)
    before = losses(tmp_path / "out")
    again = keep_only(tmp_path / "out", "epoch_0", tmp_path / "again")
    Counted.steps = 0
    resumed = train(path, f"output_dir={again}", "resume_from_checkpoint=true")
    assert Counted.steps == 2 * len(resumed.optimizers.all)
    assert losses(again) == {step: before[step] for step in (3, 4)}
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dropout_of_attention_goes_on_too(tmp_path, tokenizer_folder):
    """It draws from torch's own generator, whose state is a part of the run."""
    model = MODEL | {"attn_dropout": 0.5}
    path = finetune_config(tmp_path, tokenizer_folder, model=model, max_steps_per_epoch=4, save_every_n_steps=1)
    train(path)
    out = tmp_path / "out"
    whole = losses(out)
    again = keep_only(out, "step_2", tmp_path / "again")
    torch.manual_seed(99)
    train(path, f"output_dir={again}", "resume_from_checkpoint=true")
    assert losses(again) == {step: whole[step] for step in (3, 4)}
