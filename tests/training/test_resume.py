"""A resumed run is the run that never stopped: losses, weights, learning rates by the schedule's formula."""

import math

import pytest
from helpers.configs import MODEL
from helpers.resuming import COSINE, MOVING, SHORT_TEXTS, checkpoints, final_weights, resumed, same_tensors, written
from helpers.training import losses, text_data, train
from torchao.optim.subclass_8bit import OptimState8bit
from torchtune.utils import get_logger

pytestmark = pytest.mark.slow

ADAM8 = {"_component_": "torchao.optim.AdamW8bit", "lr": 1e-2}
STOCHASTIC = {"_component_": "layerskip_recipes.training.stochastic_adamw.StochasticAdamW", "lr": 1e-2}
# So wide that some of its state is whole blocks of 8 bits.
EIGHT_BIT = {"model": MODEL | {"attn_dropout": 0.1, "intermediate_dim": 128}, "optimizer": ADAM8}
SHARDS = {"enable_async_checkpointing": True}
SGD = {"optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-2}}
NO_STEP = {"layer_dropout": {"prob": 1.0, "layers_scale": "step"}}


RUNS = {
    "packed data, accumulation, gradual": {
        "packed": True, "gradient_accumulation_steps": 2, "clip_grad_norm": 1.0,
        "early_exit_loss": {"scale": 0.5, "curriculum": "gradual"},
        "layer_dropout": {"prob": 0.5, "schedule": "linear_decay", "inverted": True},
    },
    "optimizer in backward": {"optimizer_in_bwd": True},
    "shards, accumulation": SHARDS | {"gradient_accumulation_steps": 2},
    "shards, 8-bit AdamW": SHARDS | EIGHT_BIT,
    "no seed given": {"seed": None},
    "shards, SGD without momentum": SHARDS | SGD,
    "shards, a layer without a step": SHARDS | NO_STEP,
    "rounded stochastically": {"dtype": "bf16", "optimizer": STOCHASTIC},
    "shards, layers that step later": SHARDS | {
        "layer_dropout": {"prob": 0.8, "layers_scale": "uniform"}, "batch_size": 1,
    },
}  # fmt: skip
# From the middle of the first epoch, from its end and from the middle of the third: two runs from all of them, the
# others in turns from one; those in shards from shards, which an epoch's end has not.
POINTS = (("step_1", 1), ("epoch_0", 2), ("step_5", 5))
FROM_ALL = ("packed data, accumulation, gradual", "shards, accumulation")


@pytest.mark.parametrize("name", RUNS)
def test_resume_is_the_run_that_never_stopped(name, tmp_path, finetune, eager):
    """Every loss and the weights. The learning rate of each step is the schedule's, also as a tensor (torchao)."""
    changes, overrides = MOVING | RUNS[name], []
    if changes.pop("packed", False):
        changes["dataset"] = text_data(tmp_path / "t.json", SHORT_TEXTS, packed=True)
        overrides = ["tokenizer.max_seq_len=48"]
    path = finetune(epochs=3, save_every_n_steps=1, **changes)
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
        again = resumed(path, checkpoint, *overrides)
        assert losses(again) == {step: whole[step] for step in range(done + 1, 7)}
        assert same_tensors(end, final_weights(again / "epoch_2"))


def test_a_run_resumed_with_more_epochs_is_the_longer_run(tmp_path, finetune):
    """A finished run of one epoch, resumed with three, is the run of three: nothing here depends on T."""
    path = finetune(layer_dropout={"prob": 0.5}, shuffle=True)
    train(path, f"output_dir={tmp_path}/whole", "epochs=3")
    train(path)
    train(path, "epochs=3", "resume_from_checkpoint=true")
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert checkpoints(tmp_path / "out") == ["epoch_0", "epoch_1", "epoch_2"]


def test_a_finished_run_has_nothing_to_do(tmp_path, finetune, caplog):
    path = finetune()
    train(path)
    before = written(tmp_path / "out")
    with caplog.at_level("INFO", logger=get_logger().name):
        assert train(path, "resume_from_checkpoint=true").step == 2
    before.pop(config := tmp_path / "out" / "torchtune_config.yaml")  # a logger writes it at the start of each run
    assert {file: when for file, when in written(tmp_path / "out").items() if file != config} == before
    assert not (tmp_path / "out" / ".incomplete").exists()
    assert "All 2 steps are done; for more, set epochs higher." in caplog.messages


@pytest.mark.parametrize(
    ("changes", "checkpoint"),
    [
        ({}, "epoch_0"),
        ({"lr_scheduler": COSINE}, "epoch_0"),
        # Its learning rate is a tensor, into which shards are read.
        (SHARDS | {"save_every_n_steps": 1, "optimizer": ADAM8}, "step_1"),
    ],
    ids=["constant", "cosine", "shards of an 8-bit optimizer"],
)
def test_a_resumed_run_takes_another_learning_rate(changes, checkpoint, tmp_path, finetune, eager):
    """It may change, and is what the recipe itself suggests after a loss that is not finite."""
    path = finetune(epochs=2, **changes)
    train(path, "optimizer.lr=1e-3")
    before, after = losses(tmp_path / "out"), losses(resumed(path, checkpoint, "optimizer.lr=1e-4"))
    assert len(after) >= 2
    for step, line in after.items():
        assert line["lr"] == pytest.approx(before[step]["lr"] / 10)
